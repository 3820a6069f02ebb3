"""Operations: a verb on all jobs of a filter, previewed, frozen, carried out, stopped, logged."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from farm.context import Farm
from farm.domain.spec import Priority
from farm.domain.verbs import Order, Verb
from farm.errors import Conflict, FarmError
from farm.services import operations as use_cases
from farm.services import steering
from farm.services.audit import audited
from farm.services.operations import start, take_turn
from farm.services.steering import cancel, steer
from farm.store import operations, retention
from farm.store.actions import Actor
from farm.store.engine import transaction
from farm.store.frames import FailedAttempt, fail
from farm.store.job_lists import JobFilter
from farm.store.workers import Account, account
from tests.integration.test_api_refusals import check_problem
from tests.integration.test_limits import limit
from tests.integration.test_migrations import env_of
from tests.support.api_server import Api, serving
from tests.support.cli_runner import farm as command
from tests.support.cli_runner import inherited
from tests.support.store import fence, job_row, new_tenant, register_worker, sql, submit
from tests.support.waiting import wait_until

ACTOR = Actor(uuid.UUID(int=7), "ann", "client", "ann", "api", "10.0.0.1", "ticket 7", "ann")
PATH = "/v1/operations"
KILLED_JOBS = int(os.environ.get("FARM_TEST_KILLED_JOBS", "600"))


@pytest.fixture
def api(farm: Farm) -> Iterator[Api]:
    with serving(farm) as running:
        yield running


def run(farm: Farm) -> None:
    """Carry out every operation to its end."""
    while take_turn(farm):
        pass


def row_of(farm: Farm, operation_id: uuid.UUID) -> operations.OperationRow:
    with transaction(farm.store) as connection:
        found = operations.find_operation(connection, operation_id, None)
    assert found is not None
    return found


def counts(farm: Farm, operation_id: uuid.UUID) -> tuple[str, int, int, int]:
    row = row_of(farm, operation_id)
    return row.state, row.done, row.skipped, row.failed


def cancelling(farm: Farm, tenant: uuid.UUID | None) -> uuid.UUID:
    return start(farm, Order(Verb.CANCEL), JobFilter(tenant), ACTOR)


def asked(verb: str, **fields: Any) -> dict[str, Any]:
    return {"verb": verb, "filter": fields.pop("filter", {}), **fields}


def previewed(client: httpx.Client, verb: str, tenant: str = "", **fields: Any) -> dict[str, Any]:
    params = {"dry_run": "true", **({"tenant": tenant} if tenant else {})}
    answer = client.post(PATH, params=params, json=asked(verb, **fields))
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def begun(client: httpx.Client, verb: str, tenant: str = "", **fields: Any) -> dict[str, Any]:
    params = {"why": "ticket 7", **({"tenant": tenant} if tenant else {})}
    answer = client.post(PATH, params=params, json=asked(verb, **fields))
    assert answer.status_code == 202, answer.text
    found: dict[str, Any] = answer.json()
    return found


def statuses(client: httpx.Client) -> list[str]:
    jobs = client.get("/v1/jobs").json()["data"]
    return [f"{job['status']}{' paused' if job['paused'] else ''}" for job in reversed(jobs)]


# Preview


def test_a_preview_counts_what_a_verb_would_change(api: Api) -> None:
    client, farm = api.client(), api.farm
    worker = register_worker(farm)
    api.submit(client, images_per_prompt=4, bucket=4, seed=1)  # partial: two pictures, two dead
    lease = worker.must_claim()
    worker.complete(lease, [fence(frame) for frame in lease.frames[:2]])
    failures = [
        FailedAttempt(fence(lease.frames[2]), "out_of_memory", "It broke.", retryable=False),
        FailedAttempt(fence(lease.frames[3]), "render_error", "It broke.", retryable=False),
    ]
    with transaction(farm.store) as connection:
        fail(connection, lease.id, failures, 0.0)
    api.submit(client, images_per_prompt=4, bucket=2, seed=1)  # two run, two wait
    worker.must_claim()
    paused = api.submit(client, images_per_prompt=8, bucket=2, seed=1, priority="bulk")
    client.post(f"/v1/jobs/{paused['id']}/pause").raise_for_status()
    other = api.client("bob")
    api.submit(other)

    facts = ("jobs", "unfinished", "running", "dead", "pictures")
    expected = {
        "cancel": (2, 12, 2, 0, 0),
        "pause": (1, 4, 2, 0, 0),
        "resume": (1, 8, 0, 0, 0),
        "retry": (1, 0, 0, 2, 2),
        "remove": (1, 0, 0, 2, 2),
    }
    for verb, numbers in expected.items():
        found = previewed(client, verb)
        assert tuple(found[name] for name in facts) == numbers, verb
    assert previewed(client, "change", labels={"a": "b"})["jobs"] == 3
    assert previewed(client, "change", priority="bulk")["jobs"] == 1
    for reason, jobs in {"out_of_memory": 1, "lease_expired": 0}.items():
        assert previewed(client, "retry", reason=reason)["jobs"] == jobs
    assert previewed(client, "remove")["bytes"] == 201  # of the pictures of `complete`
    assert previewed(client, "cancel", filter={"priority": "bulk"})["jobs"] == 1
    assert previewed(client, "cancel", filter={"ids": [paused["id"]]})["jobs"] == 1
    assert previewed(client, "cancel", filter={"q": paused["id"][:8]})["jobs"] == 1
    operator = api.client("ops", "operator")
    assert [previewed(operator, "cancel", who)["jobs"] for who in ("", "bob", "*")] == [0, 1, 3]
    assert sql(farm, "SELECT * FROM operations") == []


def test_a_preview_tells_the_expected_device_time(api: Api) -> None:
    client = api.client()
    api.submit(client, images_per_prompt=4, steps=10, width=64, height=64)
    assert previewed(client, "cancel")["unfinished_seconds"] is None
    worker = register_worker(api.farm)
    with transaction(api.farm.store) as connection:
        cost = 10.0 * 64 * 64
        account(connection, worker.id, Account(cost=5 * cost, cost_seconds=10.0))
    assert previewed(client, "cancel")["unfinished_seconds"] == pytest.approx(8.0)
    assert previewed(client, "retry")["dead_seconds"] == 0


# Start and end


def test_every_verb_is_done_to_all_that_match(api: Api) -> None:
    client = api.client()
    for number in range(3):
        api.submit(client, labels={"set": "spring"}, images_per_prompt=number + 1)
    api.submit(client, labels={"set": "autumn"})
    spring = {"labels": {"set": "spring"}}
    steps: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("pause", {}, "queued paused"),
        ("change", {"priority": "bulk", "labels": {"team": "ann"}}, "queued paused"),
        ("resume", {}, "queued"),
        ("cancel", {}, "cancelled"),
    )
    for verb, fields, becomes in steps:
        operation = begun(client, verb, filter=spring, **fields)
        assert (operation["state"], operation["expected"]) == ("running", 3)
        run(api.farm)
        now = client.get(f"{PATH}/{operation['id']}").json()
        assert (now["state"], now["done"], now["skipped"], now["failed"]) == ("ended", 3, 0, 0)
        assert statuses(client) == [becomes] * 3 + ["queued"]
    changed = client.get("/v1/jobs", params={"label.team": "ann"}).json()["data"]
    assert [job["priority"] for job in changed] == ["bulk"] * 3
    begun(client, "remove", filter=spring)
    run(api.farm)
    assert statuses(client) == ["queued"]
    assert audited(api.farm).findings == []


def test_each_job_leaves_its_row_in_the_log(api: Api) -> None:
    client = api.client()
    jobs = {api.submit(client)["id"] for _ in range(3)}
    operation = begun(client, "cancel")["id"]
    run(api.farm)
    operator = api.client("ops", "operator")
    log = operator.get("/v1/actions", params={"operation": operation}).json()["data"]
    assert {each["target"] for each in log} == {f"job {job}" for job in jobs}
    assert {(each["verb"], each["who"], each["why"], each["owner"]) for each in log} == {
        ("job.cancel", "client", "ticket 7", "ann")
    }
    [begin] = operator.get("/v1/actions", params={"verb": "operation.start"}).json()["data"]
    assert (begin["target"], begin["outcome"]) == (f"operation {operation}", "cancel of 3 jobs")
    assert begin["operation"] is None


def test_dead_frames_of_a_reason_are_tried_again_everywhere(api: Api) -> None:
    farm = api.farm
    worker = register_worker(farm)
    for name in ("ann", "bob"):
        for reason in ("out_of_memory", "render_error"):
            api.submit(api.client(name), images_per_prompt=2, bucket=2, seed=1)
            lease = worker.must_claim()
            broken = [
                FailedAttempt(fence(frame), reason, "It broke.", retryable=False)
                for frame in lease.frames
            ]
            with transaction(farm.store) as connection:
                fail(connection, lease.id, broken, 0.0)
    operator = api.client("ops", "operator")
    operation = begun(operator, "retry", "*", reason="out_of_memory")
    assert (operation["tenant"], operation["expected"]) == (None, 2)
    run(farm)
    assert counts(farm, uuid.UUID(operation["id"])) == ("ended", 2, 0, 0)
    assert sql(farm, "SELECT count(*) FROM requeued_frames") == [(4,)]
    owners = operator.get("/v1/actions", params={"verb": "job.retry"}).json()["data"]
    assert sorted(each["owner"] for each in owners) == ["ann", "bob"]
    assert audited(farm).findings == []


def test_a_job_that_is_submitted_after_the_preview_is_untouched(api: Api) -> None:
    client = api.client()
    first = api.submit(client)["id"]
    preview = previewed(client, "cancel")
    later = api.submit(client)["id"]
    until = {"until": preview["until"]}
    operation = begun(client, "cancel", filter=until, expected=preview["jobs"])
    latest = api.submit(client)["id"]
    run(api.farm)
    assert counts(api.farm, uuid.UUID(operation["id"])) == ("ended", 1, 0, 0)
    found = {job["id"]: job["status"] for job in client.get("/v1/jobs").json()["data"]}
    assert found == {first: "cancelled", later: "queued", latest: "queued"}


def test_without_a_preview_only_what_is_there_at_the_start_is_touched(
    farm: Farm, tenant: uuid.UUID
) -> None:
    submit(farm, tenant)
    operation = cancelling(farm, tenant)
    later = submit(farm, tenant)
    run(farm)
    assert counts(farm, operation) == ("ended", 1, 0, 0)
    assert job_row(farm, tenant, later).status == "queued"


@pytest.mark.parametrize("blank", ["", " ", "\t\n"])
def test_a_blank_search_selects_nothing(api: Api, blank: str) -> None:
    client = api.client()
    api.submit(client)
    answer = client.post(PATH, json=asked("cancel", filter={"q": blank}))
    assert "blank" in check_problem(answer, 422)["detail"]
    assert statuses(client) == ["queued"]


def test_a_time_out_of_range_is_refused(api: Api) -> None:
    client = api.client("ops", "operator")
    late = {"until": "9999-12-31T23:59:59-14:00"}
    check_problem(client.post("/v1/lanes/demo/hold", params={"why": "x"}, json=late), 422)
    early = "0001-01-01T00:00:00+14:00"
    check_problem(client.get("/v1/jobs", params={"until": early}), 422)
    check_problem(client.post(PATH, json=asked("cancel", filter={"until": early})), 422)


def test_what_an_operator_started_is_stopped_by_one(api: Api) -> None:
    ann, operator = api.client("ann"), api.client("ops", "operator")
    api.submit(ann)
    theirs = begun(operator, "cancel", "ann")["id"]
    check_problem(ann.post(f"{PATH}/{theirs}/stop"), 403)
    assert operator.post(f"{PATH}/{theirs}/stop").json()["state"] == "stopped"


def test_a_revoked_key_leaves_no_operation_running(farm: Farm, api: Api) -> None:
    ann, bob = api.client("ann"), api.client("bob")
    for client in (ann, bob):
        api.submit(client)
    own, other = (uuid.UUID(begun(client, "cancel")["id"]) for client in (ann, bob))
    key_id = row_of(farm, own).key_id
    assert command("keys", "revoke", str(key_id), env=env_of(farm.settings)).code == 0
    run(farm)
    assert counts(farm, own) == ("stopped", 0, 0, 0)
    assert counts(farm, other) == ("ended", 1, 0, 0)
    outcome = sql(farm, "SELECT outcome FROM actions WHERE verb = 'key.revoke'")[0][0]
    assert outcome.endswith("; operations stopped: 1")


def test_more_than_was_seen_starts_nothing(api: Api) -> None:
    client = api.client()
    api.submit(client)
    preview = previewed(client, "cancel")
    api.submit(client)
    answer = client.post(PATH, json=asked("cancel", expected=preview["jobs"]))
    assert "2 jobs match now, and not 1" in check_problem(answer, 409)["detail"]
    assert sql(api.farm, "SELECT * FROM operations") == []
    api.submit(client)
    assert begun(client, "cancel", expected=4)["expected"] == 3  # fewer are no surprise


def test_what_has_changed_in_between_is_skipped(farm: Farm, tenant: uuid.UUID) -> None:
    jobs = [submit(farm, tenant) for _ in range(3)]
    operation = start(farm, Order(Verb.PAUSE), JobFilter(tenant), ACTOR)
    cancel(farm, tenant, jobs[0])
    steer(farm, Order(Verb.PAUSE), tenant, jobs[1])
    run(farm)
    # Those that no longer match are not even looked at.
    assert counts(farm, operation) == ("ended", 1, 0, 0)


def test_a_refusal_is_counted_and_the_rest_goes_on(farm: Farm, tenant: uuid.UUID) -> None:
    bob = new_tenant(farm, "bob")
    jobs = [submit(farm, tenant), submit(farm, bob)]
    limit(farm, "bob", priorities=[1, 2])
    order = Order(Verb.CHANGE, priority=Priority.INTERACTIVE)
    operation = start(farm, order, JobFilter(), ACTOR)
    run(farm)
    assert counts(farm, operation) == ("ended", 1, 0, 1)
    problem = row_of(farm, operation).problem or ""
    assert problem == f"Job {jobs[1]}: priority: this tenant may not use interactive. " + (
        "Allowed: normal, bulk."
    )
    assert job_row(farm, tenant, jobs[0]).priority == Priority.INTERACTIVE


def test_a_defect_in_a_verb_stops_one_job_and_not_the_operation(
    farm: Farm, tenant: uuid.UUID, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    jobs = [submit(farm, tenant) for _ in range(2)]
    act = steering.act

    def broken(connection: Any, order: Any, tenant_id: Any, job_id: Any, *rest: Any, **more: Any):  # type: ignore[no-untyped-def]
        if job_id == jobs[1]:
            raise ZeroDivisionError
        return act(connection, order, tenant_id, job_id, *rest, **more)

    monkeypatch.setattr(use_cases, "act", broken)
    operation = cancelling(farm, tenant)
    run(farm)
    assert counts(farm, operation) == ("ended", 1, 0, 1)
    assert row_of(farm, operation).problem == f"Job {jobs[1]}: internal error."
    assert str(jobs[1]) in caplog.text


def test_removals_wait_until_the_janitor_has_deleted_others(
    farm: Farm, tenant: uuid.UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "MAX_JOBS_PER_CALL", 2)
    monkeypatch.setattr(use_cases, "JOBS_PER_PAGE", 2)
    for _ in range(5):
        cancel(farm, tenant, submit(farm, tenant))
    operation = start(farm, Order(Verb.REMOVE), JobFilter(tenant), ACTOR)
    for done in (2, 4, 5):
        run(farm)
        assert counts(farm, operation)[1:] == (done, 0, 0)
        with transaction(farm.store) as connection:
            for _, job_id in retention.empty_jobs(connection, 10):
                retention.forget(connection, job_id)
    run(farm)
    assert counts(farm, operation)[0] == "ended"
    assert sql(farm, "SELECT * FROM jobs") == []


# Stop, interruption


def test_an_operation_is_stopped_between_two_jobs(api: Api) -> None:
    client = api.client()
    for _ in range(4):
        api.submit(client)
    operation = begun(client, "cancel")["id"]
    left = iter([True, True, False])
    take_turn(api.farm, lambda: next(left))
    stopped = client.post(f"{PATH}/{operation}/stop", params={"why": "a mistake"}).json()
    assert (stopped["state"], stopped["done"]) == ("stopped", 2)
    assert stopped["ended_at"] is not None
    assert not take_turn(api.farm)
    assert statuses(client) == ["queued", "queued", "cancelled", "cancelled"]
    check_problem(client.post(f"{PATH}/{operation}/stop"), 409)
    log = api.client("ops", "operator").get("/v1/actions", params={"verb": "operation.stop"})
    [action] = log.json()["data"]
    assert (action["outcome"], action["why"]) == ("stopped after 2 of 4 jobs", "a mistake")


def test_of_two_janitors_only_one_handles_a_job(
    farm: Farm, tenant: uuid.UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one read the operation before the first one went on."""
    for _ in range(3):
        submit(farm, tenant)
    operation = cancelling(farm, tenant)
    stale = row_of(farm, operation)
    take_turn(farm)
    before = sql(farm, "SELECT count(*) FROM actions")
    monkeypatch.setattr(operations, "next_operation", lambda _connection: stale)
    monkeypatch.setattr("farm.services.operations.job_lists.list_for", lambda *_, **__: [])
    sql(farm, "UPDATE operations SET state = 'running'")
    job = submit(farm, tenant)
    monkeypatch.setattr(
        "farm.services.operations.job_lists.list_for",
        lambda *_, **__: [job_row(farm, tenant, job)],
    )
    take_turn(farm)
    assert job_row(farm, tenant, job).status == "queued"
    assert sql(farm, "SELECT count(*) FROM actions") == before


def test_operations_take_turns(
    farm: Farm, tenant: uuid.UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(use_cases, "TURN_SECONDS", 0.0001)
    monkeypatch.setattr(use_cases, "JOBS_PER_PAGE", 1)
    bob = new_tenant(farm, "bob")
    for owner in (tenant, bob):
        for _ in range(3):
            submit(farm, owner)
    first = cancelling(farm, tenant)
    second = start(farm, Order(Verb.PAUSE), JobFilter(bob), ACTOR)
    for _ in range(4):
        take_turn(farm)
    assert (row_of(farm, first).done, row_of(farm, second).done) == (2, 2)


@contextmanager
def janitor(farm: Farm) -> Iterator[subprocess.Popen[bytes]]:
    words = [sys.executable, "-m", "farm.cli", "janitor"]
    environment = inherited() | env_of(farm.settings)
    with subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.full_size
def test_an_operation_goes_on_after_its_janitor_was_killed(farm: Farm, tenant: uuid.UUID) -> None:
    job = submit(farm, tenant)
    columns = "tenant_id, pipeline, priority, open, total, run_end, batch_key, bucket, runs"
    sql(
        farm,
        f"INSERT INTO jobs (id, {columns}, max_attempts, spec, labels)"
        f" SELECT gen_random_uuid(), {columns}, max_attempts, spec, labels"
        " FROM jobs, generate_series(2, :jobs) WHERE id = :id",
        jobs=KILLED_JOBS,
        id=job,
    )
    sql(
        farm,
        "INSERT INTO events (job_id, tenant_id, kind, data)"
        " SELECT id, tenant_id, 'job.queued', '{}' FROM jobs WHERE id <> :id",
        id=job,
    )
    operation = cancelling(farm, tenant)
    for share in (4, 2):
        with janitor(farm) as process:
            wait_until(
                lambda share=share: row_of(farm, operation).done > KILLED_JOBS // share,  # type: ignore[misc]
                60,
                "it works",
            )
            process.kill()
            process.wait(30)
        assert row_of(farm, operation).state == "running"
    with janitor(farm):
        wait_until(lambda: row_of(farm, operation).state == "ended", 120, "it has ended")
    assert counts(farm, operation) == ("ended", KILLED_JOBS, 0, 0)
    once = "SELECT count(*), count(DISTINCT target) FROM actions WHERE operation_id IS NOT NULL"
    assert sql(farm, once) == [(KILLED_JOBS, KILLED_JOBS)]
    assert audited(farm).findings == []


# Refusals and tenants


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"verb": "delete", "filter": {}}, "verb"),
        ({"verb": "cancel"}, "filter"),
        ({"verb": "cancel", "filter": {"state": "queued"}}, "state"),
        ({"verb": "cancel", "filter": {"status": "paused"}}, "status"),
        ({"verb": "cancel", "filter": {"ids": []}}, "ids"),
        ({"verb": "cancel", "filter": {"ids": ["x"]}}, "ids"),
        ({"verb": "cancel", "filter": {"until": "yesterday"}}, "until"),
        ({"verb": "cancel", "filter": {"q": "\x00"}}, "q"),
        ({"verb": "cancel", "filter": {}, "priority": "bulk"}, "priority"),
        ({"verb": "cancel", "filter": {}, "reason": "x"}, "reason"),
        ({"verb": "pause", "filter": {}, "labels": {"a": "b"}}, "labels"),
        ({"verb": "change", "filter": {}}, "priority"),
        ({"verb": "change", "filter": {}, "labels": {"a": "\x00"}}, "labels"),
        ({"verb": "cancel", "filter": {}, "expected": -1}, "expected"),
        ({"verb": "cancel", "filter": {"status": "running"}}, "filter"),
    ],
)
def test_a_wrong_operation_is_refused(api: Api, body: dict[str, Any], named: str) -> None:
    client = api.client()
    api.submit(client)
    assert named in check_problem(client.post(PATH, json=body), 422)["detail"]
    assert sql(api.farm, "SELECT * FROM operations") == []


def test_a_key_has_one_running_operation_of_a_verb(api: Api) -> None:
    client = api.client()
    for _ in range(2):
        api.submit(client)
    first = begun(client, "cancel")["id"]
    assert first in check_problem(client.post(PATH, json=asked("cancel")), 409)["detail"]
    begun(client, "pause")
    begun(api.client(), "cancel")  # another key
    run(api.farm)
    api.submit(client)
    begun(client, "cancel")


def test_tenants_are_strangers(api: Api) -> None:
    ann, bob = api.client(), api.client("bob")
    viewer, wall = api.client(role="viewer"), api.client("ops", "viewer", everywhere=True)
    operator = api.client("ops", "operator")
    for client in (ann, bob):
        api.submit(client)
    for caller in (viewer, wall):
        check_problem(caller.post(PATH, json=asked("cancel")), 403)
    for whose in ("bob", "*"):
        check_problem(ann.post(PATH, params={"tenant": whose}, json=asked("cancel")), 403)
        check_problem(ann.get(PATH, params={"tenant": whose}), 403)
    own = begun(ann, "pause")["id"]
    theirs = begun(operator, "cancel", "bob")["id"]
    everywhere = begun(operator, "change", "*", labels={"a": "b"})["id"]
    check_problem(bob.get(f"{PATH}/{own}"), 404)
    check_problem(bob.post(f"{PATH}/{own}/stop"), 404)
    check_problem(wall.post(f"{PATH}/{own}/stop"), 403)
    check_problem(ann.get(f"{PATH}/{everywhere}"), 404)
    assert [each["id"] for each in ann.get(PATH).json()["data"]] == [own]
    [seen] = bob.get(PATH).json()["data"]
    assert (seen["id"], seen["who"], seen["why"]) == (theirs, None, None)
    found = wall.get(PATH, params={"tenant": "*"}).json()["data"]
    assert [each["id"] for each in found] == [everywhere, theirs, own]
    page = operator.get(PATH, params={"tenant": "*", "limit": 2}).json()
    rest = operator.get(PATH, params={"tenant": "*", "after": page["next"]}).json()
    assert [each["id"] for each in rest["data"]] == [own]
    check_problem(operator.get(PATH, params={"tenant": "*", "after": str(uuid.uuid4())}), 422)
    run(api.farm)
    assert (statuses(ann), statuses(bob)) == (["queued paused"], ["cancelled"])


def test_a_search_means_the_same_as_in_the_list(api: Api) -> None:
    client = api.client()
    api.submit(client, prompts=["a facade of stone"])  # six digits of an ID, and no ID begins so
    api.submit(client, prompts=["a star"])
    begun(client, "cancel", filter={"q": "facade"})
    run(api.farm)
    assert statuses(client) == ["cancelled", "queued"]


def test_nothing_is_started_without_its_row_in_the_log(
    farm: Farm, tenant: uuid.UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(farm, tenant)

    def refuse(*_: Any) -> None:
        raise FarmError("no log")

    monkeypatch.setattr(use_cases, "record", refuse)
    with pytest.raises(FarmError):
        cancelling(farm, tenant)
    assert sql(farm, "SELECT * FROM operations") == []


def test_old_operations_are_deleted(farm: Farm, tenant: uuid.UUID) -> None:
    job = submit(farm, tenant)
    ended = cancelling(farm, tenant)
    run(farm)
    steer(farm, Order(Verb.REMOVE), tenant, job)
    submit(farm, tenant)
    running = cancelling(farm, tenant)
    sql(farm, "UPDATE operations SET created_at = created_at - interval '401 days'")
    with transaction(farm.store) as connection:
        operations.prune(connection, 0, 10)
        assert len(operations.list_operations(connection, tenant_id=None, limit=9)) == 2
        operations.prune(connection, 400, 10)
        [left] = operations.list_operations(connection, tenant_id=None, limit=9)
    assert left.id == running != ended


def test_the_same_key_cannot_start_twice_at_once(farm: Farm, tenant: uuid.UUID) -> None:
    submit(farm, tenant)
    cancelling(farm, tenant)
    with pytest.raises(Conflict, match="its verb is cancel too"):
        cancelling(farm, tenant)


# What a review found


def test_a_removal_leaves_what_ended_since_the_preview(farm: Farm, tenant: uuid.UUID) -> None:
    worker = register_worker(farm)
    running = submit(farm, tenant, images_per_prompt=2, bucket=2, seed=1)
    lease = worker.must_claim()
    cancel(farm, tenant, submit(farm, tenant))
    operation = start(farm, Order(Verb.REMOVE), JobFilter(tenant), ACTOR, 1)
    worker.complete(lease)
    run(farm)
    assert counts(farm, operation) == ("ended", 1, 0, 0)
    assert job_row(farm, tenant, running).status == "succeeded"


@pytest.mark.parametrize("verb", [Verb.REMOVE, Verb.CANCEL])
def test_words_select_no_older_jobs_as_jobs_are_changed(
    farm: Farm, tenant: uuid.UUID, monkeypatch: pytest.MonkeyPatch, verb: Verb
) -> None:
    monkeypatch.setattr("farm.store.job_lists.SEARCHED", 3)
    monkeypatch.setattr(use_cases, "JOBS_PER_PAGE", 2)
    for _ in range(8):
        job = submit(farm, tenant, prompts=["a star"])
        if verb is Verb.REMOVE:
            cancel(farm, tenant, job)
    status = None if verb is Verb.REMOVE else "queued"
    wanted = JobFilter(tenant, status=status, words="star")
    operation = start(farm, Order(verb), wanted, ACTOR, 3)
    run(farm)
    assert counts(farm, operation) == ("ended", 3, 0, 0)


def test_a_refusal_that_holds_is_a_failure_with_its_reason(
    farm: Farm, tenant: uuid.UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("farm.store.job_commands.MOST_MOVED", 1)
    worker = register_worker(farm)
    submit(farm, tenant, images_per_prompt=4, bucket=2, seed=1)
    worker.fail(worker.must_claim())
    order = Order(Verb.CHANGE, priority=Priority.BULK)
    operation = start(farm, order, JobFilter(tenant), ACTOR)
    run(farm)
    assert counts(farm, operation) == ("ended", 0, 0, 1)
    assert "wait for another attempt" in (row_of(farm, operation).problem or "")


def test_a_change_of_priority_and_labels_is_of_open_jobs(farm: Farm, tenant: uuid.UUID) -> None:
    cancel(farm, tenant, submit(farm, tenant))
    submit(farm, tenant)
    order = Order(Verb.CHANGE, priority=Priority.BULK, labels={"a": "b"})
    operation = start(farm, order, JobFilter(tenant), ACTOR)
    run(farm)
    assert (row_of(farm, operation).expected, *counts(farm, operation)) == (1, "ended", 1, 0, 0)


def test_a_long_retry_is_stopped_between_slices(
    farm: Farm, tenant: uuid.UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("farm.store.job_commands.RETRY_SLICE", 2)
    job = submit(farm, tenant, images_per_prompt=8, bucket=8, seed=1)
    register_worker(farm).fail(register_worker(farm).must_claim(), retryable=False)
    operation = start(farm, Order(Verb.RETRY), JobFilter(tenant), ACTOR)
    still_at = operations.still_at

    def and_stop(connection: Any, found: operations.OperationRow) -> bool:
        is_at = still_at(connection, found)
        operations.end(connection, found.id, "stopped")  # after the first slice
        return is_at

    monkeypatch.setattr(operations, "still_at", and_stop)
    run(farm)
    assert counts(farm, operation)[0] == "stopped"
    assert 0 < job_row(farm, tenant, job).dead < 8


# The command line


def test_the_command_line_asks_before_it_starts(api: Api) -> None:
    client = api.client()
    env = {"FARM_API_URL": api.url, "FARM_API_KEY": api.key()}
    for number in range(2):
        api.submit(client, images_per_prompt=number + 1, labels={"set": "spring"})
    api.submit(client)
    words = ("operations", "start", "cancel", "--label", "set=spring")
    looked = command(*words, "--dry-run", env=env)
    assert "2 jobs match and can be changed in this way." in looked.err
    assert "3 frames wait or run" in looked.err
    assert command(*words, "--dry-run", "--json", env=env).json["jobs"] == 2
    refused = command(*words, env=env)
    assert refused.code == 1
    assert "Cancel 2 jobs?" in refused.err
    assert sql(api.farm, "SELECT * FROM operations") == []
    started = command(*words, "--yes", "--why", "ticket 7", env=env)
    assert "has started: 2 jobs." in started.out, started.err
    [row] = sql(api.farm, "SELECT id, why, expected FROM operations")
    assert (row.why, row.expected) == ("ticket 7", 2)
    assert "0 of 2 jobs" in command("operations", "show", str(row.id), env=env).out
    run(api.farm)
    assert "has ended: 2 of 2 jobs" in command("operations", "show", str(row.id), env=env).out
    assert command("operations", "stop", str(row.id), env=env).code == 1
    assert str(row.id) in command("operations", env=env).out
    operator = {**env, "FARM_API_KEY": api.key("ops", "operator")}
    assert command("operations", "--json", env=operator).json == []
    [listed] = command("operations", "--all-tenants", "--json", env=operator).json
    assert listed["id"] == str(row.id)
    assert statuses(client) == ["cancelled", "cancelled", "queued"]


def test_the_command_line_changes_many_jobs(api: Api) -> None:
    client = api.client()
    env = {"FARM_API_URL": api.url, "FARM_API_KEY": api.key()}
    api.submit(client, labels={"old": "1"})
    words = ("--to", "bulk", "--set-label", "team=ann", "--no-label", "old", "--yes", "--json")
    made = command("operations", "start", "change", *words, env=env)
    assert made.json["expected"] == 1, made.err
    run(api.farm)
    [job] = client.get("/v1/jobs").json()["data"]
    assert (job["priority"], job["labels"]) == ("bulk", {"team": "ann"})
    assert "priority" in command("operations", "start", "change", "--yes", env=env).err
