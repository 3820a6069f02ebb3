"""Failed attempts by cause: what they have in common, where they are, what is done about them."""

from __future__ import annotations

import html
import re
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from farm.context import Farm
from farm.domain.verbs import Order, Verb
from farm.errors import Conflict
from farm.services.faults import dimensions_of, report, sentence_of
from farm.services.steering import steer
from farm.store import faults
from farm.store.engine import transaction
from farm.store.faults import Alternative, Place
from farm.store.frames import FailedAttempt, fail
from tests.integration.test_api_access import signed_in
from tests.integration.test_api_refusals import check_problem
from tests.integration.test_attention import codes, followed, idle, opened
from tests.integration.test_operations import begun, previewed, run
from tests.support.api_server import Api, serving
from tests.support.store import FakeWorker, fence, register_worker, sql, state_of, submit

ASKED = {"Accept": "text/html"}
DAY_AGO = datetime.now(UTC) - timedelta(days=1)


@pytest.fixture
def api(farm: Farm) -> Iterator[Api]:
    with serving(farm) as running:
        yield running


@pytest.fixture
def operator(api: Api) -> httpx.Client:
    return signed_in(api, api.key("ops", "operator"))


def break_frames(
    farm: Farm, worker: FakeWorker, message: str = "CUDA error 700", **fields: Any
) -> None:
    """Let all frames of a worker's next batch fail for good."""
    lease = worker.must_claim()
    made = {"reason": "render_error", "retryable": False, "log": "a log", **fields}
    broken = [FailedAttempt(fence(frame), message=message, **made) for frame in lease.frames]
    with transaction(farm.store) as connection:
        fail(connection, lease.id, broken, 0.0)


def note(farm: Farm) -> None:
    with transaction(farm.store) as connection:
        faults.note(connection, 400)


def known(farm: Farm) -> list[faults.FaultRow]:
    with transaction(farm.store) as connection:
        return faults.list_faults(connection, DAY_AGO)


def submit_broken(farm: Farm, tenant: uuid.UUID, frames: int = 2, **fields: Any) -> uuid.UUID:
    worker = register_worker(farm, fields.pop("on", "hand"))
    job = submit(farm, tenant, images_per_prompt=frames, bucket=frames, seed=1)
    break_frames(farm, worker, **fields)
    return job


# Causes


def test_attempts_of_one_cause_are_counted_together(farm: Farm, tenant: uuid.UUID) -> None:
    submit_broken(farm, tenant, 4, message="CUDA error 700", on="a")
    submit_broken(farm, tenant, 2, message="CUDA error 999", on="b")
    submit_broken(farm, tenant, 1, message="The disk is full.")
    note(farm)
    first, second = known(farm)
    assert (first.message, first.attempts, first.jobs, first.workers) == ("CUDA error 700", 6, 2, 2)
    assert (second.message, second.attempts, second.state) == ("The disk is full.", 1, "new")
    assert first.first_at < first.last_at
    note(farm)  # again
    assert known(farm) == [first, second]


def test_what_is_no_failure_has_no_cause(farm: Farm, tenant: uuid.UUID) -> None:
    worker = register_worker(farm)
    job = submit(farm, tenant, images_per_prompt=2, bucket=2, seed=1, max_rerolls=3)
    worker.release(worker.must_claim())
    break_frames(farm, worker, reason="rejected", reroll=True, charged=False)
    break_frames(farm, worker, isolated=True, charged=False)  # a batch: each is tried by itself
    steer(farm, Order(Verb.CANCEL), tenant, job)
    assert {row.fault for row in sql(farm, "SELECT fault FROM attempts")} == {None}
    note(farm)
    assert known(farm) == []


def test_a_cause_is_forgotten_after_its_time(farm: Farm, tenant: uuid.UUID) -> None:
    submit_broken(farm, tenant)
    note(farm)
    sql(farm, "UPDATE faults SET last_at = last_at - interval '401 days'")
    sql(farm, "UPDATE attempts SET ended_at = ended_at - interval '401 days'")
    with transaction(farm.store) as connection:
        faults.note(connection, 0)
    assert sql(farm, "SELECT count(*) FROM faults") == [(1,)]
    note(farm)
    assert sql(farm, "SELECT count(*) FROM faults") == [(0,)]


# Where


def place(**fields: Any) -> Place:
    base: dict[str, Any] = {
        "worker": "a",
        "job_id": uuid.UUID(int=1),
        "pipeline": "demo",
        "tenant": "ann",
        "size": "64x64",
        "device": "H200",
        "version": "1",
        "host": "here",
        "started_at": datetime(2026, 11, 1, 9, 58, tzinfo=UTC),
        "worker_id": uuid.UUID(int=2),
        "attempts": 1,
    }
    return Place(**{**base, **fields})


def jobs(*numbers: int, size: str = "64x64") -> list[Alternative]:
    return [
        Alternative(uuid.UUID(int=each), "demo", uuid.UUID(int=each % 2), size) for each in numbers
    ]


def test_the_sentence_names_what_the_attempts_have_in_common() -> None:
    on_jobs = [place(job_id=uuid.UUID(int=each), attempts=10) for each in range(1, 6)]
    others = [place(worker="b", job_id=uuid.UUID(int=9), attempts=1)]
    found = dimensions_of([*on_jobs, *others], jobs(1, 2, 3, 4, 5, 9), [])
    assert sentence_of(found, [*on_jobs, *others]) == (
        "98% of 51 attempts are on worker a, which started 2026-11-01 09:58 UTC; "
        "there are 2 workers."
    )
    large = [
        place(worker=name, job_id=uuid.UUID(int=number), size="2048x2048", attempts=5)
        for number, name in enumerate("abcd")
    ]
    found = dimensions_of(large, jobs(7, 8), [])
    assert sentence_of(found, large) == (
        "All 20 attempts are on size 2048x2048; there are 2 sizes."
    )


def test_what_the_farm_has_once_says_nothing() -> None:
    """All attempts are on the only pipeline, tenant and version: that is no news."""
    many = [
        place(worker=f"w{number}", job_id=uuid.UUID(int=number), attempts=2) for number in range(5)
    ]
    found = dimensions_of(many, [], [])
    assert sentence_of(found, many) == (
        "The 10 attempts are spread over 5 workers, 5 jobs, 1 tenant."
    )
    assert sentence_of(dimensions_of([], [], []), []) == "No attempt in this time."


def test_a_report_tells_where_the_attempts_are(farm: Farm, tenant: uuid.UUID) -> None:
    for number in range(3):
        submit_broken(farm, tenant, 4, message=f"CUDA error {number}", on="bad")
    submit_broken(farm, tenant, 1, message="CUDA error 7", on="well")
    sql(farm, "UPDATE workers SET gone = true WHERE id NOT IN (SELECT min(id::text)::uuid FROM "
        "workers GROUP BY name)")  # fmt: skip
    note(farm)
    [row] = known(farm)
    found = report(farm, row.fault, DAY_AGO)
    assert found.sentence.startswith("92% of 13 attempts are on worker bad, which started ")
    counts = {each.name: each.counts for each in found.dimensions}
    assert counts["worker"] == [("bad", 12), ("well", 1)]
    assert counts["tenant"] == [("default", 13)]
    assert len(found.samples) == 13


def test_a_part_is_of_all_attempts_and_not_of_those_that_are_shown() -> None:
    many = [place(worker=f"w{number}", job_id=uuid.UUID(int=number)) for number in range(500)]
    bad = [place(worker="bad", attempts=50)]
    found = dimensions_of([*bad, *many], [], [])
    said = sentence_of(found, [*bad, *many])
    assert said == "The 550 attempts are spread over 501 workers, 500 jobs, 1 tenant."


def test_a_lost_batch_is_no_cause_until_its_frames_are_tried_alone(
    farm: Farm, tenant: uuid.UUID
) -> None:
    worker = register_worker(farm)
    submit(farm, tenant, images_per_prompt=4, bucket=4, seed=1)
    worker.must_claim()
    worker.lose("The process was killed.")
    note(farm)
    assert known(farm) == []
    worker.must_claim()  # one frame, isolated
    worker.lose("The process was killed.")
    note(farm)
    [fault] = known(farm)
    assert fault.attempts == 1


# What is done about them


def test_only_dead_frames_of_a_cause_are_tried_again(farm: Farm, tenant: uuid.UUID) -> None:
    worker = register_worker(farm)
    job = submit(farm, tenant, images_per_prompt=3, bucket=3, seed=1)
    lease = worker.must_claim()
    messages = ["CUDA error 1", "The disk is full.", "CUDA error 2"]
    broken = [
        FailedAttempt(fence(frame), "render_error", message, retryable=False)
        for frame, message in zip(lease.frames, messages, strict=True)
    ]
    with transaction(farm.store) as connection:
        fail(connection, lease.id, broken, 0.0)
    fault = broken[0].fault(charged=True)
    assert steer(farm, Order(Verb.RETRY, fault=fault), tenant, job) == 2
    assert [state_of(farm, job, ordinal) for ordinal in range(3)] == ["ready", "dead", "ready"]
    with pytest.raises(Conflict, match=f"had the fault {fault}"):
        steer(farm, Order(Verb.RETRY, fault=fault), tenant, job)


def test_an_operation_tries_a_cause_again_in_all_jobs(api: Api) -> None:
    farm = api.farm
    for name in ("ann", "bob"):
        api.submit(api.client(name), images_per_prompt=2, bucket=2, seed=1)
        break_frames(farm, register_worker(farm, name), f"CUDA error {len(name)}")
    api.submit(api.client(), seed=1)
    break_frames(farm, register_worker(farm), "The disk is full.")
    note(farm)
    fault = known(farm)[0].fault
    operator = api.client("ops", "operator")
    preview = previewed(operator, "retry", "*", fault=fault)
    assert preview["jobs"] == 2
    operation = begun(operator, "retry", "*", fault=fault)
    assert (operation["expected"], operation["fault"]) == (2, fault)
    run(farm)
    assert sql(farm, "SELECT count(*) FROM requeued_frames") == [(4,)]
    for wrong in ({"verb": "cancel", "fault": fault}, {"verb": "retry", "fault": "x"}):
        answer = operator.post("/v1/operations", json={"filter": {}, **wrong})
        assert "fault" in check_problem(answer, 422)["detail"]
    both = {"verb": "retry", "filter": {}, "fault": fault, "reason": "x"}
    check_problem(operator.post("/v1/operations", json=both), 422)


def test_a_cause_is_seen_muted_and_comes_back(api: Api) -> None:
    farm = api.farm
    client, operator = api.client(), api.client("ops", "operator")
    tenant = sql(farm, "SELECT id FROM tenants WHERE name = 'ann'")[0].id
    submit_broken(farm, tenant, 3)
    sql(farm, "UPDATE workers SET gone = true")
    idle(farm)
    note(farm)
    [fault] = operator.get("/v1/faults").json()["data"]
    assert (fault["attempts"], fault["state"], fault["back"]) == (3, "new", False)
    path = f"/v1/faults/{fault['fault']}"
    assert codes(farm) == ["fault"]
    changed = operator.patch(path, params={"why": "ticket 7"}, json={"state": "muted", "note": "x"})
    assert changed.json()["fault"]["note"] == "x", changed.text
    assert codes(farm) == []
    operator.patch(path, json={"state": "resolved"}).raise_for_status()
    assert codes(farm) == []
    submit_broken(farm, tenant, 3)
    note(farm)
    assert operator.get("/v1/faults").json()["data"][0]["back"]
    assert codes(farm) == ["fault"]
    log = operator.get("/v1/actions", params={"verb": "fault.set"}).json()["data"]
    assert [each["outcome"] for each in log] == ["resolved: x", "muted: x"]
    assert [each["target"] for each in log] == [f"fault {fault['fault']}"] * 2
    # Who sees it
    check_problem(client.get("/v1/faults"), 403)
    check_problem(client.get(path), 403)
    wall = api.client("ops", "viewer", everywhere=True)
    assert wall.get(path).json()["samples"][0]["log"] is None
    assert operator.get(path).json()["samples"][0]["log"] == "a log"
    check_problem(wall.patch(path, json={"state": "seen"}), 403)
    check_problem(operator.get(f"/v1/faults/{'0' * 16}"), 404)
    check_problem(operator.patch(f"/v1/faults/{'0' * 16}", json={"state": "seen"}), 404)
    check_problem(operator.get("/v1/faults/xyz"), 422)
    check_problem(operator.patch(path, json={"state": "gone"}), 422)


# Pages


def test_one_cause_behind_a_thousand_failures_is_found(api: Api, operator: httpx.Client) -> None:
    """From the overview, in one click to the cause, and in another to the worker."""
    farm = api.farm
    job = api.submit(api.client(), images_per_prompt=2, bucket=2, seed=1)["id"]
    bad = idle(farm, "bad")
    break_frames(farm, bad, "CUDA error 700")
    idle(farm, "well")
    sql(
        farm,
        "INSERT INTO attempts (job_id, ordinal, attempt, worker, reason, message, started_at,"
        " fault)"
        " SELECT job_id, n, 1, worker, reason, message, started_at, fault"
        " FROM attempts, generate_series(2, 999) n WHERE ordinal = 0",
    )
    note(farm)
    assert codes(farm) == ["fault"]
    page = followed(operator, "One cause: 1,000 failed attempts in the last hour")
    assert "All 1,000 attempts are on worker bad" in page
    assert f'href="/jobs/{job}/frames/' in page
    [link] = set(re.findall(rf'href="(/lanes/demo#worker-{bad.id})"', page))
    assert f'action="/workers/{bad.id}/drain"' in opened(operator, link.partition("#")[0])
    [retry] = re.findall(r'href="(/operations/new[^"]*)"', page)
    assert "Retry 1 job?" in opened(operator, html.unescape(retry))


def test_the_pages_of_failures(api: Api, operator: httpx.Client) -> None:
    farm = api.farm
    api.submit(api.client(), seed=1)
    break_frames(farm, register_worker(farm), "<b>broken</b> \u05db\u05d5\u05db\u05d1")
    note(farm)
    page = operator.get("/failures", headers=ASKED).text
    assert "&lt;b&gt;broken&lt;/b&gt;" in page
    assert "<b>1</b> attempts" in page
    [fault] = known(farm)
    assert (
        operator.post(
            f"/failures/{fault.fault}", data={"state": "seen", "note": "a driver"}
        ).status_code
        == 204
    )
    page = opened(operator, f"/failures/{fault.fault}?range=7d")
    assert "a driver" in page
    assert "a log" in page
    assert operator.post(f"/failures/{fault.fault}", data={"state": "x"}).status_code == 422
    wall = signed_in(api, api.key("ops", "viewer", everywhere=True))
    page = opened(wall, f"/failures/{fault.fault}")
    assert "a log" not in page
    assert "<form" not in page[page.index("<main") : page.index("</main>")]
    assert wall.post(f"/failures/{fault.fault}", data={"state": "seen"}).status_code == 403
    client = signed_in(api, api.key())
    for path in ("/failures", f"/failures/{fault.fault}"):
        assert client.get(path, headers=ASKED).status_code == 403
    assert wall.get(f"/failures/{'0' * 16}", headers=ASKED).status_code == 404
