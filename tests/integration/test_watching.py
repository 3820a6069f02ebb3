"""Watching a job: its pace, its failures with their reasons, and its size."""

from __future__ import annotations

import uuid

import pytest

from farm.context import Farm
from farm.services import steering
from farm.store import queries
from farm.store.engine import transaction
from tests.support.api_server import serving
from tests.support.store import FakeWorker, fence, job_row, register_worker, sql, submit


def later(farm: Farm, job_id: uuid.UUID, seconds: float) -> None:
    """Move the times of a job's pace into the past."""
    sql(
        farm,
        "UPDATE jobs SET pace_since = pace_since - make_interval(secs => :seconds),"
        " pace_next = pace_next - make_interval(secs => :seconds) WHERE id = :id",
        id=job_id,
        seconds=seconds,
    )


def render(worker: FakeWorker, batches: int) -> None:
    for _ in range(batches):
        worker.complete(worker.must_claim())


def test_bytes_and_failures_are_those_of_the_rows(farm: Farm, tenant: uuid.UUID) -> None:
    job_id = submit(farm, tenant, images_per_prompt=12, bucket=4, max_attempts=2)
    worker = register_worker(farm)
    lease = worker.must_claim()
    worker.fail(lease, fences=[fence(frame) for frame in lease.frames[:2]])
    worker.complete(lease, [fence(frame) for frame in lease.frames[2:]])
    worker.release(worker.must_claim())
    worker.must_claim()
    worker.lose()
    sql(farm, "UPDATE requeued_frames SET not_before = clock_timestamp()")
    while again := worker.claim():
        if 0 in [frame.ordinal for frame in again.frames]:
            worker.fail(again)
        else:
            worker.complete(again)
    job = job_row(farm, tenant, job_id)
    assert job.status == "partial"
    [stored] = sql(farm, "SELECT sum(bytes) FROM frames WHERE job_id = :id", id=job_id)
    assert job.bytes == stored[0] > 0
    counted = sql(
        farm,
        "SELECT reason, count(*) FROM attempts"
        " WHERE job_id = :id AND reason <> 'released' GROUP BY reason",
        id=job_id,
    )
    assert job.failures == {row.reason: row.count for row in counted}
    assert set(job.failures) == {"render_error", "worker_lost"}


def test_a_late_result_takes_up_nothing(farm: Farm, tenant: uuid.UUID) -> None:
    job_id = submit(farm, tenant, images_per_prompt=2, bucket=2)
    worker = register_worker(farm)
    lease = worker.must_claim()
    worker.complete(lease)
    before = job_row(farm, tenant, job_id).bytes
    worker.complete(lease)
    assert job_row(farm, tenant, job_id).bytes == before


def test_the_pace_is_that_of_late(farm: Farm, tenant: uuid.UUID) -> None:
    job_id = submit(farm, tenant, images_per_prompt=1000, bucket=4)
    worker = register_worker(farm)
    with serving(farm) as api:
        client = api.client("default")

        def seen() -> tuple[float | None, float | None]:
            found = client.get(f"/v1/jobs/{job_id}").json()
            return found["pace"], found["eta_seconds"]

        assert seen() == (None, None)
        worker.must_claim()
        assert seen() == (None, None)
        # An hour for the first 32 frames, then 40 frames in 40 seconds, twice.
        render(worker, 8)
        later(farm, job_id, 3600)
        pace, eta = seen()
        assert pace == pytest.approx(32 / 3600, rel=0.01)
        assert eta == pytest.approx(968 * 3600 / 32, rel=0.01)
        for _ in range(2):
            render(worker, 10)
            later(farm, job_id, 40)
        render(worker, 1)  # a batch sets the mark
        pace, eta = seen()
        assert pace == pytest.approx(1.1, rel=0.1)
        assert eta == pytest.approx(884 / 1.1, rel=0.1)
        # Without new frames the pace sinks.
        later(farm, job_id, 360)
        assert seen()[0] == pytest.approx(0.11, rel=0.1)


def test_a_mark_needs_enough_batches_behind_it(farm: Farm, tenant: uuid.UUID) -> None:
    """One slow batch a minute: a window of half a minute would be empty, or show twice the pace."""
    job_id = submit(farm, tenant, images_per_prompt=1000, bucket=4)
    worker = register_worker(farm)
    for _ in range(7):
        later(farm, job_id, 60)
        render(worker, 1)
    row = job_row(farm, tenant, job_id)
    assert row.pace_since_frames == 0
    assert (row.now - row.pace_since).total_seconds() == pytest.approx(360, abs=20)


def test_the_pace_is_told_anew_after_a_pause(farm: Farm, tenant: uuid.UUID) -> None:
    job_id = submit(farm, tenant, images_per_prompt=1000, bucket=4)
    worker = register_worker(farm)
    render(worker, 5)
    steering.pause(farm, tenant, job_id)
    later(farm, job_id, 3600)
    steering.resume(farm, tenant, job_id)
    render(worker, 5)
    later(farm, job_id, 10)
    row = job_row(farm, tenant, job_id)
    assert row.succeeded - row.pace_since_frames == 20
    assert (row.now - row.pace_since).total_seconds() == pytest.approx(10, abs=5)


def test_the_pace_of_a_job_that_was_under_way_before_paces_were_told(
    farm: Farm, tenant: uuid.UUID
) -> None:
    job_id = submit(farm, tenant, images_per_prompt=1000, bucket=4)
    worker = register_worker(farm)
    render(worker, 20)
    without = "pace_since = NULL, pace_since_frames = 0, pace_next = NULL, pace_next_frames = 0"
    sql(farm, f"UPDATE jobs SET {without}")
    for _ in range(2):
        render(worker, 10)
        later(farm, job_id, 40)
        row = job_row(farm, tenant, job_id)
        seconds = (row.now - row.pace_since).total_seconds()
        assert (row.succeeded - row.pace_since_frames) / seconds == pytest.approx(1.0, rel=0.1)


def test_a_pause_before_the_start_is_no_start(farm: Farm, tenant: uuid.UUID) -> None:
    job_id = submit(farm, tenant, images_per_prompt=8, bucket=4)
    steering.pause(farm, tenant, job_id)
    steering.resume(farm, tenant, job_id)
    assert job_row(farm, tenant, job_id).pace_since is None


def test_what_the_tables_take_up(farm: Farm) -> None:
    with transaction(farm.store) as connection:
        size = queries.database_bytes(connection)
    [tables] = sql(
        farm,
        "SELECT sum(pg_total_relation_size(oid)) FROM pg_class"
        " WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace",
    )
    assert size >= tables[0] > 100_000
    with serving(farm) as api:
        metrics = api.client().get("/metrics").text
    [line] = [each for each in metrics.splitlines() if each.startswith("farm_database_bytes ")]
    assert float(line.split()[1]) == pytest.approx(size, rel=0.2)
