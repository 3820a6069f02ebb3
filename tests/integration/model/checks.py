"""The checks of the database against the model."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from psycopg.rows import namedtuple_row

from farm.context import Farm
from farm.domain.states import TERMINAL, FrameState, JobStatus
from farm.store.audit import wrong_shares
from farm.store.claim import Fence
from farm.store.engine import one_statement, transaction
from tests.integration.model.model import LEASE_SECONDS, Announced, Model, Place, R, W

Rows = Sequence[Any]

READ = {
    "jobs": "SELECT * FROM jobs",
    "frames": "SELECT * FROM frames",
    "attempts": "SELECT * FROM attempts ORDER BY attempt",
    "requeued_frames": "SELECT job_id, ordinal, isolated, paused FROM requeued_frames",
    "leases": "SELECT *, extract(epoch FROM expires_at - clock_timestamp()) AS seconds FROM leases",
    "events": "SELECT * FROM events ORDER BY id",
    "tenants": "SELECT id, pg_temp.open_jobs(id) AS open_jobs,"
    " pg_temp.waiting_frames(id) AS waiting,"
    " coalesce((SELECT frames FROM pg_temp.running_frames(ARRAY[id])), 0) AS running,"
    " (SELECT coalesce(sum(seconds), 0) FROM device_use u WHERE u.tenant_id = t.id) AS used,"
    " (SELECT coalesce(sum(device_seconds), 0) FROM jobs j WHERE j.tenant_id = t.id) AS of_jobs"
    " FROM tenants t",
}


def check_database(farm: Farm, model: Model) -> None:
    """Compare the whole database with the model."""
    read = read_all(farm)
    check_jobs(model, read["jobs"])
    behind = {row.id: row.behind_from for row in read["jobs"] if row.behind_from is not None}
    check_frames(model, read["frames"], behind)
    check_attempts(model, read["attempts"])
    check_requeued(model, read["requeued_frames"], behind)
    check_leases(model, read["leases"])
    check_events(model, read["events"])
    model.held = {row.id for row in read["leases"]}
    check_limits(model, read["tenants"], behind)
    with transaction(farm.store) as connection:
        assert wrong_shares(connection, 1) == []


def check_limits(model: Model, read: Rows, behind: Mapping[uuid.UUID, int]) -> None:
    """Limits count jobs, frames and device time. Waiting frames in `behind` may count twice."""
    for row in read:
        own = {job_id: job for job_id, job in model.jobs.items() if job.tenant == row.id}
        unended = [job for job in own.values() if job.status not in TERMINAL]
        waiting = sum(job.count(W) + job.count(FrameState.READY) for job in unended)
        assert row.open_jobs == len(unended)
        assert row.running == model.running(row.id)
        assert row.waiting == waiting or (row.waiting > waiting and own.keys() & behind.keys())
        assert row.used == pytest.approx(row.of_jobs)


def read_all(farm: Farm) -> dict[str, Rows]:
    """Read all tables in one round trip."""
    read: dict[str, Rows] = {}
    with one_statement(farm.store) as connection:
        driver = connection.connection.driver_connection
        assert driver is not None
        with driver.cursor(row_factory=namedtuple_row) as cursor:
            cursor.execute("; ".join(READ.values()))
            for name in READ:
                read[name] = cursor.fetchall()
                cursor.nextset()
    return read


def check_jobs(model: Model, read: Rows) -> None:
    """Check durability and conservation."""
    rows = {row.id: row for row in read}
    assert set(rows) == set(model.jobs)
    for job_id, job in model.jobs.items():
        row, born = rows[job_id], [frame.attempt > 0 for frame in job.frames]
        if job.in_groups:
            assert sum(born) == row.cursor
        else:
            assert born == [ordinal < row.cursor for ordinal in range(row.total)]
        assert (row.status, row.paused) == (job.status, job.paused)
        assert row.open == (row.cursor < row.total and not job.paused and not job.cancelled)
        for state in ("running", "succeeded", "dead", "cancelled"):
            assert getattr(row, state) == job.count(FrameState(state)), state
        assert row.reused == sum(frame.reused for frame in job.frames)


def check_frames(model: Model, read: Rows, behind: Mapping[uuid.UUID, int]) -> None:
    """Each frame has the model's state, and a succeeded one has the hash of its winner's bytes.

    A requeued frame of a cancelled job may still be ready, from the ordinal in `behind` on.
    """
    found = {(row.job_id, row.ordinal): row for row in read}
    for job_id, ordinal, frame in model.every_frame():
        if frame.attempt:
            row = found.pop((job_id, ordinal))
            follows = ordinal >= behind.get(job_id, ordinal + 1) and row.state == "ready"
            state = FrameState.CANCELLED if follows and model.jobs[job_id].cancelled else row.state
            assert (state, row.attempt) == (frame.state, frame.attempt)
            assert row.uncharged == frame.uncharged
            assert (row.sha256, row.reused) == (frame.sha256, frame.reused)
    assert not found


def check_attempts(model: Model, read: Rows) -> None:
    """Ledger: attempts count from 1, each ended one has one reason, at most one is open."""
    found: dict[Place, list[tuple[int, str]]] = {}
    for row in read:
        found.setdefault((row.job_id, row.ordinal), []).append((row.attempt, row.reason))
    for job_id, ordinal, frame in model.every_frame():
        assert found.pop((job_id, ordinal), []) == frame.ended
        assert frame.attempt - frame.uncharged <= model.jobs[job_id].max_attempts
        kept = frame.state in (R, FrameState.SUCCEEDED)
        assert frame.attempt == len(frame.ended) + kept
    assert not found


def check_requeued(model: Model, read: Rows, behind: Mapping[uuid.UUID, int]) -> None:
    """The table `requeued_frames` holds exactly the frames that may be claimed again.

    A job's rows from the ordinal in `behind` on may still be as before its pause or cancel.
    """

    def follows(job_id: uuid.UUID, ordinal: int) -> bool:
        return ordinal >= behind.get(job_id, ordinal + 1)

    told = {tuple(row) for row in read if not follows(row.job_id, row.ordinal)}
    assert told == {
        (job_id, ordinal, frame.isolated, model.jobs[job_id].paused)
        for job_id, ordinal, frame in model.every_frame()
        if frame.state is FrameState.READY and not follows(job_id, ordinal)
    }
    untold = {(row.job_id, row.ordinal) for row in read if follows(row.job_id, row.ordinal)}
    assert untold == {
        (job_id, ordinal)
        for job_id, ordinal, frame in model.every_frame()
        if follows(job_id, ordinal)
        and (frame.state is FrameState.READY or ((job_id, ordinal) in untold and frame.ended))
    }


def check_leases(model: Model, read: Rows) -> None:
    """Each running attempt belongs to one lease, with an end by Postgres's clock."""
    held = Counter[Fence]()
    for row in read:
        low, high = (-60, 0) if row.id in model.lapsed else (LEASE_SECONDS - 120, LEASE_SECONDS)
        assert low < row.seconds <= high
        held.update(model.holding(zip(row.job_ids, row.ordinals, row.attempts, strict=True)))
    assert held == Counter(
        (job_id, ordinal, frame.attempt)
        for job_id, ordinal, frame in model.every_frame()
        if frame.state is R
    )


def check_events(model: Model, read: Rows) -> None:
    """Each attempt has an event at its begin and at its end. None follows a cancel."""
    announced, last = Counter[Announced](), dict[uuid.UUID, str]()
    for row in read:
        assert last.get(row.job_id) != "cancelled", f"{row.kind} after a cancel"
        if row.kind.removeprefix("job.") in list(JobStatus):
            last[row.job_id] = row.kind.removeprefix("job.")
        announced.update((row.kind, row.job_id, *it[:2]) for it in row.data.get("frames", []))
    assert last == {job_id: job.status for job_id, job in model.jobs.items()}
    assert announced == Counter(model.announcements())
