"""Deadlines: a late job is cancelled, and says which deadline it missed."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from farm.context import Farm
from farm.store import job_commands, leases
from farm.store.engine import one_statement
from tests.integration.test_api_refusals import check_problem
from tests.integration.test_events import told
from tests.support.api_server import JOB, Api, render, serving
from tests.support.store import (
    FakeWorker,
    attempts_of,
    counts_add_up,
    new_tenant,
    register_worker,
    sql,
)

SOON = 3600.0


@pytest.fixture
def api(farm: Farm) -> Iterator[Api]:
    with serving(farm) as running:
        yield running


@pytest.fixture
def ann(api: Api) -> httpx.Client:
    return api.client("ann")


@pytest.fixture
def worker(farm: Farm) -> FakeWorker:
    return register_worker(farm)


def pass_seconds(farm: Farm, seconds: float) -> None:
    """Move all jobs into the past, as if time had passed."""
    moved = "created_at = created_at - :by, started_at = started_at - :by, due_at = due_at - :by"
    sql(farm, f"UPDATE jobs SET {moved}", by=timedelta(seconds=seconds))


def swept(farm: Farm) -> list[tuple[uuid.UUID, str]]:
    with farm.store.connect() as connection:
        return job_commands.cancel_late_jobs(connection)


def job_of(client: httpx.Client, job: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = client.get(f"/v1/jobs/{job['id']}").raise_for_status().json()
    return found


def time_of(text: str) -> datetime:
    return datetime.fromisoformat(text)


def test_the_times_are_shown(api: Api, ann: httpx.Client) -> None:
    at = "2031-05-06T09:08:07+02:00"
    job = api.submit(ann, start_within=30, finish_by=at)
    assert time_of(job["start_by"]) - time_of(job["created_at"]) == timedelta(seconds=30)
    assert time_of(job["finish_by"]) == datetime(2031, 5, 6, 7, 8, 7, tzinfo=UTC)
    assert (job["spec"]["start_within"], job["missed"]) == (30.0, None)
    now = {name: job[name] for name in ("waiting", "waiting_because")}
    assert job == job_of(ann, job) | now
    again = ann.post("/v1/jobs", json={**JOB, "finish_by": job["spec"]["finish_by"]})
    assert again.status_code == 202, "what is shown can be submitted"
    plain = api.submit(ann)
    assert (plain["start_by"], plain["finish_by"], plain["missed"]) == (None, None, None)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "more than 0"),
        (-5, "more than 0"),
        (1e12, "at most"),
        (True, "send seconds"),
        ([], "send seconds"),
        ("soon", "send seconds"),
        ("2031-05-06T09:08:07", "send seconds"),  # no zone
        ("9999-12-31T23:59:59-23:00", "send seconds"),
        ("2020-01-01T00:00:00Z", "has passed"),
    ],
)
@pytest.mark.parametrize("field", ["start_within", "finish_by"])
def test_a_wrong_deadline_is_refused(
    api: Api, ann: httpx.Client, field: str, value: Any, message: str
) -> None:
    problem = check_problem(ann.post("/v1/jobs", json={**JOB, field: value}), 422)
    assert problem["error"]["param"] == field
    assert message in problem["detail"]
    assert api.jobs_stored() == 0


def test_a_job_that_has_not_started_is_cancelled(
    farm: Farm, api: Api, ann: httpx.Client, worker: FakeWorker
) -> None:
    late = api.submit(ann, start_within=30, images_per_prompt=3)
    other = api.submit(ann, start_within=90)
    assert swept(farm) == []
    pass_seconds(farm, 40)
    assert swept(farm) == [(uuid.UUID(late["id"]), "start_within")]
    ended = job_of(ann, late)
    assert (ended["status"], ended["missed"]) == ("cancelled", "start_within")
    assert ended["counts"]["cancelled"] == 3
    [*_, last] = told(ann, f"/v1/jobs/{late['id']}/events")
    assert (last["kind"], last["reason"]) == ("job.cancelled", "start_within")
    assert job_of(ann, other)["status"] == "queued"
    assert {str(frame.job_id) for frame in worker.must_claim().frames} == {other["id"]}
    assert worker.claim() is None


def test_a_job_that_has_started_may_go_on_until_its_end(
    farm: Farm, api: Api, ann: httpx.Client, worker: FakeWorker
) -> None:
    job = api.submit(ann, start_within=30, finish_by=100, images_per_prompt=4, bucket=2)
    render(worker, worker.must_claim())
    pass_seconds(farm, 40)
    assert swept(farm) == []
    lease = worker.must_claim()
    pass_seconds(farm, 70)
    assert swept(farm) == [(uuid.UUID(job["id"]), "finish_by")]
    ended = job_of(ann, job)
    assert (ended["status"], ended["missed"]) == ("cancelled", "finish_by")
    assert (ended["counts"]["succeeded"], ended["counts"]["cancelled"]) == (2, 2)
    with one_statement(farm.store) as connection:
        news = leases.report_step(connection, lease.id, 1, 2)
    assert not news.wanted, "the batch stops at its next step"
    assert worker.complete(lease) == set()
    assert attempts_of(farm, uuid.UUID(job["id"]), 2) == [(1, "late")]
    counts_add_up(farm, new_tenant(farm, "ann"), uuid.UUID(job["id"]))


def test_the_earlier_of_two_deadlines_counts(farm: Farm, api: Api, ann: httpx.Client) -> None:
    soon = (datetime.now(UTC) + timedelta(seconds=SOON)).isoformat()
    api.submit(ann, start_within=2 * SOON, finish_by=soon)
    api.submit(ann, start_within=soon, finish_by=2 * SOON)
    due = sql(farm, "SELECT due_at FROM jobs ORDER BY created_at")
    assert [at for (at,) in due] == [time_of(soon)] * 2


def test_a_job_that_has_ended_has_no_deadline(
    farm: Farm, api: Api, ann: httpx.Client, worker: FakeWorker
) -> None:
    job = api.submit(ann, start_within=60, finish_by=SOON)
    worker.fail(worker.must_claim(), retryable=False)
    pass_seconds(farm, 100)
    assert swept(farm) == []
    assert sql(farm, "SELECT due_at FROM jobs") == [(None,)]
    assert ann.post(f"/v1/jobs/{job['id']}/retry").json()["status"] == "running"
    assert swept(farm) == []


def test_a_paused_job_has_its_deadline(farm: Farm, api: Api, ann: httpx.Client) -> None:
    job = api.submit(ann, finish_by=60)
    ann.post(f"/v1/jobs/{job['id']}/pause").raise_for_status()
    pass_seconds(farm, 100)
    assert swept(farm) == [(uuid.UUID(job["id"]), "finish_by")]
    assert job_of(ann, job)["status"] == "cancelled"


def test_many_late_jobs_end_in_several_sweeps(
    farm: Farm, api: Api, ann: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_commands, "LATE_JOBS", 2)
    for _ in range(3):
        api.submit(ann, finish_by=60)
    pass_seconds(farm, 100)
    assert [len(swept(farm)) for _ in range(3)] == [2, 1, 0]


def test_no_tenant_waits_for_the_late_jobs_of_another(
    farm: Farm, api: Api, ann: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_commands, "LATE_JOBS", 2)
    for _ in range(5):
        api.submit(ann, finish_by=60)
    bob = api.client("bob")
    own = api.submit(bob, finish_by=70)
    pass_seconds(farm, 100)
    assert (uuid.UUID(own["id"]), "finish_by") in swept(farm)


def test_a_cancelled_job_says_nothing_of_deadlines(farm: Farm, api: Api, ann: httpx.Client) -> None:
    job = api.submit(ann, finish_by=60)
    ended = ann.post(f"/v1/jobs/{job['id']}/cancel").json()
    assert (ended["status"], ended["missed"]) == ("cancelled", None)
    pass_seconds(farm, 100)
    assert swept(farm) == []
    assert job_of(ann, job)["missed"] is None
