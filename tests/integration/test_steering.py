"""Changing, removing and retrying jobs; giving batches back; taking a drain back."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from farm.context import Farm
from farm.domain.spec import Priority
from farm.domain.verbs import Order, Verb
from farm.errors import Conflict, NotFound
from farm.services.steering import pause, resume, steer
from farm.store import job_commands, leases, retention, workers
from farm.store.engine import transaction
from farm.store.frames import FailedAttempt, fail
from tests.integration.test_api_refusals import check_problem
from tests.integration.test_limits import limit
from tests.integration.test_shares import share, sound
from tests.support.api_server import Api, serving
from tests.support.cli_runner import farm as command
from tests.support.store import (
    FakeWorker,
    counts_add_up,
    fence,
    job_row,
    register_worker,
    sql,
    state_of,
    submit,
)


@pytest.fixture
def api(farm: Farm) -> Iterator[Api]:
    with serving(farm) as running:
        yield running


@pytest.fixture
def worker(farm: Farm) -> FakeWorker:
    return register_worker(farm)


def reprioritize(farm: Farm, tenant: uuid.UUID, job_id: uuid.UUID, priority: Priority) -> None:
    steer(farm, Order(Verb.CHANGE, priority=priority), tenant, job_id)


def test_what_waits_of_a_job_moves_with_its_priority(
    farm: Farm, tenant: uuid.UUID, worker: FakeWorker
) -> None:
    job = submit(farm, tenant, images_per_prompt=8, bucket=2, seed=1)
    submit(farm, tenant, images_per_prompt=1, bucket=1, seed=1)
    worker.fail(worker.must_claim())
    assert share(farm, tenant)[2:] == ([0, 7, 0], [0, 2, 0])
    used = sql(farm, "SELECT used FROM shares")
    for priority, waits, again in (
        (Priority.BULK, [0, 1, 6], [0, 0, 2]),
        (Priority.INTERACTIVE, [6, 1, 0], [2, 0, 0]),
    ):
        reprioritize(farm, tenant, job, priority)
        assert share(farm, tenant)[2:] == (waits, again)
        sound(farm)
    assert sql(farm, "SELECT used FROM shares") == used
    assert job_row(farm, tenant, job).priority == Priority.INTERACTIVE
    assert worker.must_claim().priority == Priority.INTERACTIVE
    counts_add_up(farm, tenant, job)
    sound(farm)


def test_a_change_decides_which_job_is_next(
    farm: Farm, tenant: uuid.UUID, worker: FakeWorker
) -> None:
    submit(farm, tenant, images_per_prompt=2, bucket=2, seed=1)
    later = submit(farm, tenant, images_per_prompt=2, bucket=2, seed=2, priority="bulk")
    reprioritize(farm, tenant, later, Priority.INTERACTIVE)
    assert {frame.job_id for frame in worker.must_claim().frames} == {later}


def test_a_paused_job_is_resumed_with_its_new_priority(
    farm: Farm, tenant: uuid.UUID, worker: FakeWorker
) -> None:
    job = submit(farm, tenant, images_per_prompt=4, bucket=2, seed=1)
    worker.fail(worker.must_claim())
    pause(farm, tenant, job)
    reprioritize(farm, tenant, job, Priority.BULK)
    with farm.store.connect() as connection:
        job_commands.follow(connection, 100)
    sound(farm)
    resume(farm, tenant, job)
    with farm.store.connect() as connection:
        job_commands.follow(connection, 100)
    sound(farm)
    assert share(farm, tenant)[2:] == ([0, 0, 2], [0, 0, 2])


def test_priorities_change_while_workers_claim(farm: Farm, tenant: uuid.UUID) -> None:
    jobs = [
        submit(farm, tenant, images_per_prompt=12, bucket=2, seed=number) for number in range(3)
    ]
    errors: list[BaseException] = []
    over = threading.Event()

    def change() -> None:
        try:
            number = 0
            while not over.is_set():
                number += 1
                try:
                    reprioritize(farm, tenant, jobs[number % 3], Priority(number % 3))
                except Conflict:
                    return  # it has ended
        except BaseException as error:
            errors.append(error)

    changing = threading.Thread(target=change)
    changing.start()
    worker = register_worker(farm)
    failed = 0
    while lease := worker.claim():
        if failed < 2:
            worker.fail(lease)
            failed += 1
        else:
            worker.complete(lease)
    over.set()
    changing.join()
    assert errors == []
    sound(farm)
    for job in jobs:
        assert job_row(farm, tenant, job).status == "succeeded"


def test_too_many_requeued_frames_do_not_move_at_once(
    farm: Farm, tenant: uuid.UUID, worker: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_commands, "MOST_MOVED", 1)
    job = submit(farm, tenant, images_per_prompt=2, bucket=2, seed=1)
    worker.fail(worker.must_claim())
    with pytest.raises(Conflict, match="more than 1 of its frames wait for another attempt"):
        reprioritize(farm, tenant, job, Priority.BULK)
    assert job_row(farm, tenant, job).priority == Priority.NORMAL


def test_the_api_changes_priority_and_labels(api: Api) -> None:
    client = api.client()
    job = api.submit(client, labels={"team": "ann", "old": "1"})
    path = f"/v1/jobs/{job['id']}"
    labels = {"team": "bob", "set": "spring", "old": None}
    changed = client.patch(path, json={"priority": "bulk", "labels": labels})
    assert changed.status_code == 200, changed.text
    now = changed.json()
    assert (now["priority"], now["labels"]) == ("bulk", {"team": "bob", "set": "spring"})
    assert [found["id"] for found in listed(client, {"label.set": "spring"})] == [job["id"]]
    kinds = [each["kind"] for each in events(client, path)]
    assert kinds == ["job.queued", "job.changed"]
    [action] = api.done_by_people()
    assert (action["verb"], action["target"], action["owner"]) == (
        "job.change",
        f"job {job['id']}",
        "ann",
    )
    assert action["outcome"] == (
        "priority bulk, label team=bob, label set=spring, without label old"
    )


def listed(client: httpx.Client, params: dict[str, str]) -> list[dict[str, Any]]:
    data: list[dict[str, Any]] = client.get("/v1/jobs", params=params).json()["data"]
    return data


def events(client: httpx.Client, path: str) -> list[dict[str, Any]]:
    answer = client.get(f"{path}/events", headers={"Accept": "application/json"})
    data: list[dict[str, Any]] = answer.json()["data"]
    return data


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, "priority"),
        ({"priority": "low"}, "priority"),
        ({"labels": {"a": 1}}, "labels"),
        ({"labels": {"a": "x" * 201}}, "labels"),
        ({"labels": {"a": "\x00"}}, "labels"),
        ({"labels": {str(number): "x" for number in range(32)}}, "labels"),
        ({"status": "cancelled"}, "status"),
    ],
)
def test_a_wrong_change_is_refused(api: Api, body: dict[str, Any], named: str) -> None:
    client = api.client()
    job = api.submit(client, labels={"team": "ann"})
    answer = client.patch(f"/v1/jobs/{job['id']}", json=body)
    assert named in check_problem(answer, 422)["detail"]
    assert client.get(f"/v1/jobs/{job['id']}").json()["labels"] == {"team": "ann"}


def test_a_priority_that_the_tenant_may_not_use_is_refused(api: Api) -> None:
    client = api.client()
    job = api.submit(client)
    limit(api.farm, "ann", priorities=[1, 2])
    path = f"/v1/jobs/{job['id']}"
    problem = check_problem(client.patch(path, json={"priority": "interactive"}), 403)
    assert "Allowed: normal, bulk" in problem["detail"]
    assert client.patch(path, json={"priority": "bulk"}).status_code == 200


def test_an_ended_job_has_labels_and_no_use_for_a_priority(api: Api) -> None:
    client = api.client()
    path = f"/v1/jobs/{api.submit(client)['id']}"
    client.post(f"{path}/cancel").raise_for_status()
    check_problem(client.patch(path, json={"priority": "bulk"}), 409)
    assert client.patch(path, json={"labels": {"a": "b"}}).json()["labels"] == {"a": "b"}


def test_a_job_is_removed_with_its_rows(api: Api) -> None:
    client, other = api.client(), api.client("bob")
    job_id = api.submit(client, images_per_prompt=2, bucket=2)["id"]
    path = f"/v1/jobs/{job_id}"
    worker = register_worker(api.farm)
    lease = worker.must_claim()
    assert "Cancel it first" in check_problem(client.delete(path), 409)["detail"]
    worker.complete(lease)
    check_problem(other.delete(path), 404)
    assert client.delete(path).status_code == 204
    check_problem(client.get(path), 404)
    check_problem(client.delete(path), 404)
    assert listed(client, {}) == []
    with transaction(api.farm.store) as connection:
        while retention.delete_rows(connection, 100):
            pass
        [empty] = retention.empty_jobs(connection, 10)
        retention.forget(connection, empty[1])
    assert sql(api.farm, "SELECT count(*) FROM frames") == [(0,)]
    assert sql(api.farm, "SELECT count(*) FROM jobs") == [(0,)]
    [action] = api.done_by_people()
    assert (action["verb"], action["outcome"]) == ("job.remove", "removed")


def test_a_removal_waits_for_exports_and_for_room(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = api.client()
    jobs = [api.submit(client)["id"] for _ in range(3)]
    for job_id in jobs:
        client.post(f"/v1/jobs/{job_id}/cancel").raise_for_status()
    export = client.post(f"/v1/jobs/{jobs[0]}/exports", json={"to": "parquet"}).json()
    assert export["id"] in check_problem(client.delete(f"/v1/jobs/{jobs[0]}"), 409)["detail"]
    monkeypatch.setattr(retention, "MAX_JOBS_PER_CALL", 1)
    assert client.delete(f"/v1/jobs/{jobs[1]}").status_code == 204
    check_problem(client.delete(f"/v1/jobs/{jobs[2]}"), 503)


def test_only_frames_that_failed_for_a_reason_are_tried_again(api: Api) -> None:
    client = api.client()
    job_id = uuid.UUID(api.submit(client, images_per_prompt=4, bucket=4)["id"])
    worker = register_worker(api.farm)
    lease = worker.must_claim()
    reasons = ["out_of_memory", "render_error", "render_error", "flagged"]
    failures = [
        FailedAttempt(fence(frame), reason, "It broke.", retryable=False)
        for frame, reason in zip(lease.frames, reasons, strict=True)
    ]
    with transaction(api.farm.store) as connection:
        fail(connection, lease.id, failures, 0.0)
    path = f"/v1/jobs/{job_id}/retry"
    problem = check_problem(client.post(path, params={"reason": "lease_expired"}), 409)
    assert "lease_expired" in problem["detail"]
    retried = client.post(path, params={"reason": "render_error"})
    assert retried.json()["counts"]["waiting"] == 2, retried.text
    states = [state_of(api.farm, job_id, ordinal) for ordinal in range(4)]
    assert states == ["dead", "ready", "ready", "dead"]
    [action] = api.done_by_people()
    assert action["outcome"] == (
        "2 dead frames are requeued, which failed for the reason render_error"
    )
    sound(api.farm)


def test_retries_of_a_reason_go_on_over_slices(
    farm: Farm, tenant: uuid.UUID, worker: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_commands, "RETRY_SLICE", 2)
    job = submit(farm, tenant, images_per_prompt=5, bucket=8, seed=1)
    worker.fail(worker.must_claim(), retryable=False)
    assert steer(farm, Order(Verb.RETRY, reason="render_error"), tenant, job) == 5
    assert job_row(farm, tenant, job).dead == 0


def test_a_batch_is_given_back_without_using_up_an_attempt(api: Api) -> None:
    client, operator = api.client(), api.client("ops", "operator")
    job_id = uuid.UUID(api.submit(client, images_per_prompt=2, bucket=2, max_attempts=1)["id"])
    worker = register_worker(api.farm)
    path = f"/v1/workers/{worker.id}/give-back"
    check_problem(operator.post(path), 409)
    lease = worker.must_claim()
    check_problem(client.post(path), 403)
    assert operator.post(path, params={"why": "stuck"}).json()["batch"] is None
    assert state_of(api.farm, job_id) == "ready"
    with transaction(api.farm.store) as connection:
        assert not leases.report_step(connection, lease.id, 1, 2).wanted
    assert worker.complete(lease) == set()  # the fence holds
    worker.complete(worker.must_claim())
    assert client.get(f"/v1/jobs/{job_id}").json()["status"] == "succeeded"
    [action, refused] = api.done_by_people()
    assert refused["verb"] == "call.refused"
    assert (action["verb"], action["target"], action["why"], action["outcome"]) == (
        "worker.give_back",
        "worker hand",
        "stuck",
        "2 frames are requeued",
    )


def test_pictures_that_wait_for_the_storage_stay_with_their_worker(
    farm: Farm, tenant: uuid.UUID, worker: FakeWorker
) -> None:
    submit(farm, tenant, images_per_prompt=2, bucket=1, seed=1)
    stored, rendered = worker.must_claim(), worker.must_claim()
    with transaction(farm.store) as connection:
        leases.mark_spooled(connection, stored.id)
        assert leases.release_unfinished(connection, worker.id) == 1
    assert worker.complete(stored) == {fence(stored.frames[0])}
    assert worker.complete(rendered) == set()


def test_a_drain_is_taken_back(api: Api) -> None:
    client, operator = api.client(), api.client("ops", "operator")
    worker = register_worker(api.farm)
    path = f"/v1/workers/{worker.id}"
    check_problem(operator.post(f"{path}/undrain"), 409)
    assert operator.post(f"{path}/drain").json()["draining"]
    check_problem(client.post(f"{path}/undrain"), 403)
    assert not operator.post(f"{path}/undrain", params={"why": "a mistake"}).json()["draining"]
    check_problem(operator.post(f"/v1/workers/{uuid.uuid4()}/undrain"), 404)
    with transaction(api.farm.store) as connection:
        workers.leave(connection, worker.id)
    check_problem(operator.post(f"{path}/undrain"), 404)
    log = api.done_by_people()
    verbs = [each["verb"] for each in log if each["verb"] != "call.refused"]
    assert verbs == ["worker.undrain", "worker.drain"]


def test_an_unknown_job_is_not_found(farm: Farm, tenant: uuid.UUID) -> None:
    for verb in Verb:
        with pytest.raises(NotFound):
            steer(farm, Order(verb, priority=Priority.BULK), tenant, uuid.uuid4())


def test_a_change_and_the_janitor_do_not_wait_for_each_other(farm: Farm, tenant: uuid.UUID) -> None:
    """Both lock requeued frames and the share, in one order. The other order was a deadlock."""
    worker = register_worker(farm)
    job = submit(farm, tenant, images_per_prompt=400, bucket=8, seed=1)
    for _ in range(30):
        worker.fail(worker.must_claim())
    over = threading.Event()
    errors: list[BaseException] = []

    def follow() -> None:
        with farm.store.connect() as connection:
            while not over.is_set():
                try:
                    job_commands.follow(connection, 5000)
                except Exception as error:
                    connection.rollback()
                    errors.append(error)

    following = threading.Thread(target=follow)
    following.start()
    for number in range(60):
        pause(farm, tenant, job)
        resume(farm, tenant, job)
        reprioritize(farm, tenant, job, Priority(1 + number % 2))
    over.set()
    following.join()
    assert errors == []
    with farm.store.connect() as connection:
        job_commands.follow(connection, 5000)
    sound(farm)


# The command line


def test_commands_change_and_remove_a_job(api: Api) -> None:
    client = api.client()
    env = {"FARM_API_URL": api.url, "FARM_API_KEY": api.key()}
    job = api.submit(client, labels={"old": "1"})["id"]
    words = ("--priority", "bulk", "--label", "team=ann", "--no-label", "old")
    changed = command("change", job[:8], *words, env=env)
    assert "has priority bulk. Labels: team=ann." in changed.out, changed.err
    assert "Nothing to change" in command("change", job[:8], env=env).err
    assert "Cancel it first" in command("remove", job[:8], "--yes", env=env).err
    assert command("cancel", job[:8], env=env).code == 0
    asked = command("remove", job[:8], env=env)
    assert (asked.code, "its 0 pictures?" in asked.err) == (1, True)
    assert "is removed" in command("remove", job[:8], "--yes", env=env).out
    assert listed(client, {}) == []


def test_commands_hold_lanes_and_steer_workers(api: Api) -> None:
    env = {"FARM_API_URL": api.url, "FARM_API_KEY": api.key("ops", "operator")}
    api.submit(api.client(), images_per_prompt=2, bucket=2)
    worker = register_worker(api.farm)
    worker.must_claim()
    assert "--why" in command("lanes", "hold", "demo", env=env).err
    held = command("lanes", "hold", "demo", "--for", "90", "--why", "new driver", env=env)
    assert "Lane demo is held until" in held.out, held.err
    assert "new driver" in command("lanes", env=env).out
    assert command("lanes", "release", "demo", env=env).code == 0
    assert "is not held" in command("lanes", "release", "demo", env=env).err
    for verb, said in (
        ("give-back", "has given its batch back"),
        ("drain", "claims no more frames"),
        ("undrain", "goes on"),
    ):
        assert said in command("workers", verb, "hand", env=env).out
    assert "does not drain" in command("workers", "undrain", "hand", env=env).err
