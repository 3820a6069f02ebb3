"""Pausing, resuming or cancelling a job changes its row. Its many requeued frames follow later."""

from __future__ import annotations

import uuid

import pytest

from farm.context import Farm
from farm.domain.invariants import Finding
from farm.domain.states import FrameState
from farm.services import steering
from farm.services.audit import audited
from farm.store import job_commands as stored
from farm.store import lanes
from farm.store.engine import transaction
from tests.support.store import counts_add_up, job_row, new_tenant, register_worker, sql, submit

SLICE = 50
RETURNED = """
WITH o AS (
    SELECT generate_series(CAST(:first AS bigint), :last) AS ordinal
), born AS (
    INSERT INTO frames (job_id, ordinal, state, attempt, worker, bucket, started_at, finished_at)
    SELECT :id, ordinal, 'ready', 1, 'hand', 4, clock_timestamp(), clock_timestamp() FROM o
), ended AS (
    INSERT INTO attempts (job_id, ordinal, attempt, worker, reason, message, started_at)
    SELECT :id, ordinal, 1, 'hand', 'render_error', 'It broke.', clock_timestamp() FROM o
)
INSERT INTO requeued_frames (job_id, ordinal, pipeline, tenant_id, priority, batch_key, bucket,
                             not_before, job_created_at, paused, isolated)
SELECT id, ordinal, pipeline, tenant_id, priority, batch_key, bucket, clock_timestamp(), created_at,
       false, false
FROM jobs CROSS JOIN o WHERE id = :id
"""


def requeued(farm: Farm, tenant: uuid.UUID, frames: int, **fields: object) -> uuid.UUID:
    """Create a job whose frames have all failed once and are due for another attempt."""
    job_id = submit(farm, tenant, images_per_prompt=frames, bucket=4, **fields)
    for first in range(0, frames, 100_000):
        last = min(first + 100_000, frames) - 1
        sql(farm, RETURNED, id=job_id, first=first, last=last)
    sql(
        farm,
        "UPDATE jobs SET cursor = total, open = false, status = 'running',"
        " started_at = clock_timestamp() WHERE id = :id",
        id=job_id,
    )
    return job_id


def findings(farm: Farm) -> list[Finding]:
    return [*audited(farm).findings]


def follow(farm: Farm, rows: int = SLICE) -> bool:
    with farm.store.connect() as connection:
        return stored.follow(connection, rows)


def told(farm: Farm, job_id: uuid.UUID) -> tuple[int, int, int]:
    """Count a job's requeued frames that are paused and not paused, and its ready frames."""
    [row] = sql(
        farm,
        "SELECT count(*) FILTER (WHERE paused) AS paused, count(*) FILTER (WHERE NOT paused) AS on,"
        " (SELECT count(*) FROM frames WHERE job_id = :id AND state = 'ready') AS ready"
        " FROM requeued_frames WHERE job_id = :id",
        id=job_id,
    )
    return row.paused, row.on, row.ready


def test_a_paused_job_is_claimed_no_more_before_its_frames_know(
    farm: Farm, tenant: uuid.UUID
) -> None:
    held = requeued(farm, tenant, 3 * SLICE)
    other = submit(farm, tenant, images_per_prompt=2, bucket=4)
    steering.pause(farm, tenant, held)
    assert told(farm, held) == (0, 3 * SLICE, 3 * SLICE)
    worker = register_worker(farm)
    assert {frame.job_id for frame in worker.must_claim().frames} == {other}
    assert worker.claim() is None
    with transaction(farm.store) as connection:
        assert lanes.claimable_lanes(connection) == []
    assert follow(farm)
    assert told(farm, held) == (SLICE, 2 * SLICE, 3 * SLICE)
    while follow(farm):
        pass
    assert told(farm, held) == (3 * SLICE, 0, 3 * SLICE)
    assert sql(farm, "SELECT count(*) FROM jobs WHERE behind_from IS NOT NULL") == [(0,)]


def test_a_resumed_job_goes_on_with_what_was_never_told_and_then_with_all(
    farm: Farm, tenant: uuid.UUID
) -> None:
    job_id = requeued(farm, tenant, 3 * SLICE)
    steering.pause(farm, tenant, job_id)
    follow(farm)
    steering.resume(farm, tenant, job_id)
    worker = register_worker(farm)
    assert [frame.ordinal for frame in worker.must_claim().frames] == [*range(SLICE, SLICE + 4)]
    while follow(farm):
        pass
    assert [frame.ordinal for frame in worker.must_claim().frames] == [*range(4)]
    assert told(farm, job_id) == (0, 3 * SLICE - 8, 3 * SLICE - 8)
    counts_add_up(farm, tenant, job_id)


def test_a_pause_in_the_middle_of_a_slice_is_not_forgotten(
    farm: Farm, tenant: uuid.UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slice that resumes frames ends after the job was paused again."""
    job_id = requeued(farm, tenant, SLICE // 2)
    steering.pause(farm, tenant, job_id)
    follow(farm)
    steering.resume(farm, tenant, job_id)
    followed = stored.FOLLOWED
    with farm.store.connect() as connection:
        execute = connection.execute

        def watched(statement: object, *args: object) -> object:
            if statement is followed:
                steering.pause(farm, tenant, job_id)
            return execute(statement, *args)  # type: ignore[call-overload]

        monkeypatch.setattr(connection, "execute", watched)
        stored.follow(connection, SLICE)
    assert told(farm, job_id) == (0, SLICE // 2, SLICE // 2)
    follow(farm)
    assert told(farm, job_id) == (SLICE // 2, 0, SLICE // 2)


def test_a_cancelled_job_is_over_at_once_and_its_frames_follow(
    farm: Farm, tenant: uuid.UUID
) -> None:
    job_id = requeued(farm, tenant, 3 * SLICE)
    worker = register_worker(farm)
    lease = worker.must_claim()
    steering.cancel(farm, tenant, job_id)
    job = job_row(farm, tenant, job_id)
    assert (job.status, job.cancelled, job.running) == ("cancelled", 3 * SLICE, 0)
    counts_add_up(farm, tenant, job_id)
    assert worker.complete(lease) == set()
    assert worker.claim() is None
    assert findings(farm) == []
    assert told(farm, job_id) == (0, 3 * SLICE - 4, 3 * SLICE - 4)
    while follow(farm):
        assert findings(farm) == []
    assert told(farm, job_id) == (0, 0, 0)
    counts_add_up(farm, tenant, job_id)
    assert findings(farm) == []


def test_frames_of_other_jobs_fill_a_batch_past_those_that_are_held(
    farm: Farm, tenant: uuid.UUID
) -> None:
    held = [requeued(farm, tenant, 3, steps=9) for _ in range(3)]
    filling = requeued(farm, tenant, 2, steps=9)
    for job_id in held:
        steering.pause(farm, tenant, job_id)
    leader = submit(farm, tenant, images_per_prompt=1, steps=9, bucket=4, priority="interactive")
    batch = register_worker(farm).must_claim()
    assert {frame.job_id for frame in batch.frames} == {leader, filling}
    assert len(batch.frames) == 3


def test_a_frame_with_as_many_attempts_as_can_be_counted_is_dead_and_stops_no_lane(
    farm: Farm, tenant: uuid.UUID
) -> None:
    worn = requeued(farm, tenant, 5)
    sql(farm, "UPDATE frames SET attempt = 32767, uncharged = 32766 WHERE ordinal < 2")
    other = submit(farm, new_tenant(farm, "bob"), images_per_prompt=1)
    worker = register_worker(farm)
    claimed = [frame for _ in range(2) for frame in worker.must_claim().frames]
    assert {(frame.job_id, frame.ordinal) for frame in claimed} == {
        (worn, 2),
        (worn, 3),
        (other, 0),
    }
    job = job_row(farm, tenant, worn)
    assert (job.dead, job.running) == (2, 2)
    counts_add_up(farm, tenant, worn)
    [(state, error)] = sql(
        farm, "SELECT DISTINCT state, error FROM frames WHERE ordinal < 2 AND job_id = :id", id=worn
    )
    assert state == FrameState.DEAD
    assert error == "The frame has had 32767 attempts, and more cannot be counted."
