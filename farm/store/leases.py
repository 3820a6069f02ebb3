"""Leases: renew them, report steps, mark them as spooled, and end them.

A lease is a worker's right to a batch until `expires_at`. Only Postgres's clock counts. A lease
ends early if its child process dies, or if the worker releases it.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

from sqlalchemy import Connection, text

from farm.domain.spec import Priority
from farm.domain.states import FrameState
from farm.store import arrays
from farm.store.claim import Fence
from farm.store.frames import FAILED, WORKER_LOST, FailedAttempt, end_attempts, give_back
from farm.store.rows import rows_of
from farm.store.tally import lock_jobs, lock_shares

RETRY_DELAY_PER_LOAD = 12.0
"""Retry delay of a frame that ended its process, as a multiple of the pipeline's load time."""
MAX_SECONDS = 3600.0
"""Longest such delay, in seconds."""

REPORT_STEP = text("""
UPDATE leases l SET step = :step, steps = :steps, stepped_at = clock_timestamp()
WHERE l.id = :id
RETURNING pg_temp.is_any_running(l.job_ids, l.ordinals, l.attempts) AS wanted,
    EXISTS (SELECT FROM workers w WHERE w.id = l.worker_id AND w.draining) AS draining,
    pg_temp.may_wait(l.pipeline, CAST(:urgent_priority AS smallint)) AS urgent
""")

# Statements that wait for the locks of several leases take them in the order of their ids.
RENEW = text("""
WITH mine AS (SELECT id FROM leases WHERE worker_id = :worker_id ORDER BY id FOR UPDATE)
UPDATE leases l SET expires_at = clock_timestamp() + make_interval(secs => :seconds)
FROM mine WHERE l.id = mine.id
RETURNING l.id, pid, clock_timestamp() - stepped_at AS still
""")

EXPIRED = text("""
SELECT id, worker_id, pipeline, spooled, job_ids, ordinals, attempts FROM leases
WHERE expires_at < clock_timestamp() ORDER BY expires_at LIMIT 100 FOR UPDATE SKIP LOCKED
""")

LEASES_OF = text("""
SELECT id, worker_id, pipeline, spooled, job_ids, ordinals, attempts FROM leases
WHERE worker_id = :worker_id AND pid = :pid AND id <> ALL(:known) ORDER BY id FOR UPDATE
""")

MARK_SPOOLED = text("UPDATE leases SET spooled = true WHERE id = :id")

# All leases are read: there is one for each batch that runs.
STEPS = text("""
SELECT j.id AS job_id, (j.succeeded + j.dead + j.cancelled)::float / j.total AS progress,
       CASE WHEN j.pace_since IS NOT NULL AND j.succeeded > j.pace_since_frames
            THEN extract(epoch FROM clock_timestamp() - j.pace_since)
                 / (j.succeeded - j.pace_since_frames)
                 * (j.total - j.succeeded - j.dead - j.cancelled) END::float AS eta_seconds,
       r.frames
FROM (
    SELECT d.job_id, jsonb_agg(jsonb_build_array(d.ordinal, l.step, l.steps) ORDER BY d.ordinal)
           AS frames
    FROM leases l CROSS JOIN LATERAL unnest(l.job_ids, l.ordinals) AS d (job_id, ordinal)
    WHERE d.job_id = ANY(CAST(:ids AS uuid[])) AND l.steps > 0
    GROUP BY d.job_id
) r JOIN jobs j ON j.id = ANY (ARRAY[r.job_id])
""")

LOAD_SECONDS = text("SELECT load_seconds FROM workers WHERE id = :id")

ALL_LEASES_OF = text("""
SELECT id, worker_id, pipeline, spooled, job_ids, ordinals, attempts FROM leases
WHERE worker_id = :worker_id ORDER BY id FOR UPDATE
""")

DROP_LEASES = text("DELETE FROM leases WHERE id = ANY(:ids)")

COUNT_LOST = text("""
UPDATE workers SET requeued = requeued + :requeued, dead = dead + :dead,
                   expired = expired + :expired
WHERE id = :id
""")


class RenewedLease(NamedTuple):
    """A lease that was extended."""

    id: uuid.UUID
    pid: int
    """Child process that renders the batch."""
    still: timedelta
    """Time since the last denoising step, on Postgres's clock."""


class HeldLease(NamedTuple):
    """A lease that is about to end."""

    id: uuid.UUID
    worker_id: uuid.UUID
    pipeline: str
    spooled: bool
    job_ids: list[uuid.UUID]
    ordinals: list[int]
    attempts: list[int]


class JobSteps(NamedTuple):
    """The progress of a job with running frames."""

    job_id: uuid.UUID
    progress: float
    """Share of the frames that have ended."""
    eta_seconds: float | None
    """Seconds until the job ends at its pace. None: not known."""
    frames: list[tuple[int, int, int]]
    """(ordinal, step, steps) of each frame that runs."""


def steps_of_jobs(connection: Connection, job_ids: Collection[uuid.UUID]) -> list[JobSteps]:
    """Read the steps of the running frames of some jobs. Jobs without any are left out."""
    rows = connection.execute(STEPS, {"ids": arrays.ids(job_ids)})
    return rows_of(rows, JobSteps)


def renew(connection: Connection, worker_id: uuid.UUID, lease_seconds: float) -> list[RenewedLease]:
    """Extend every lease that a worker holds."""
    values = {"worker_id": worker_id, "seconds": lease_seconds}
    return rows_of(connection.execute(RENEW, values), RenewedLease)


@dataclass(frozen=True)
class LeaseStatus:
    """Reply to a worker that reports a step."""

    wanted: bool = False
    """True if any frame of the lease is still wanted."""
    draining: bool = False
    """True if the worker must not claim more."""
    urgent: bool = False
    """True if interactive work may wait on the lane. Only a claim knows."""


def report_step(connection: Connection, lease_id: uuid.UUID, step: int, steps: int) -> LeaseStatus:
    """Record a denoising step, and read the status of the lease."""
    values = {"id": lease_id, "step": step, "steps": steps}
    row = connection.execute(
        REPORT_STEP, {**values, "urgent_priority": Priority.INTERACTIVE}
    ).first()
    return LeaseStatus() if row is None else LeaseStatus(*row)


def mark_spooled(connection: Connection, lease_id: uuid.UUID) -> None:
    """Mark a lease's batch as rendered and waiting for the storage."""
    connection.execute(MARK_SPOOLED, {"id": lease_id})


def release_unknown(
    connection: Connection, worker_id: uuid.UUID, pid: int, known: Sequence[uuid.UUID] = ()
) -> None:
    """Release the leases of a child that it does not know: the reply to its claim was lost.

    Their attempts are uncharged. The child itself calls this, with the leases that it knows.
    """
    values = {"worker_id": worker_id, "pid": pid, "known": list(known)}
    _release_leases(connection, rows_of(connection.execute(LEASES_OF, values), HeldLease))


def release_all(connection: Connection, worker_id: uuid.UUID) -> set[str]:
    """Release all leases of a worker, uncharged. Return the lanes to ring."""
    leases = rows_of(connection.execute(ALL_LEASES_OF, {"worker_id": worker_id}), HeldLease)
    _release_leases(connection, leases)
    return {lease.pipeline for lease in leases}


def release_unfinished(connection: Connection, worker_id: uuid.UUID) -> int:
    """Release the batches that a worker has not rendered yet, uncharged. Return their frames.

    The worker notices at its next step, and drops the batch. Its pictures that wait for the storage
    stay with it.
    """
    found = rows_of(connection.execute(ALL_LEASES_OF, {"worker_id": worker_id}), HeldLease)
    leases = [lease for lease in found if not lease.spooled]
    _release_leases(connection, leases)
    return sum(len(lease.job_ids) for lease in leases)


def _release_leases(connection: Connection, leases: Sequence[HeldLease]) -> None:
    if not leases:
        return
    _lock_all(connection, leases)
    give_back(connection, [fence for lease in leases for fence in _held_by(lease)])
    connection.execute(DROP_LEASES, {"ids": [lease.id for lease in leases]})


def expire(connection: Connection, retry_seconds: float) -> set[str]:
    """End the leases that have expired on Postgres's clock. Return the lanes to ring."""
    leases = rows_of(connection.execute(EXPIRED), HeldLease)
    _lock_all(connection, leases)
    for lease in leases:
        message = "The worker's lease expired: it was not renewed in time."
        _drop(connection, lease, "lease_expired", message, retry_seconds, not lease.spooled)
    return {lease.pipeline for lease in leases}


def end_child_leases(
    connection: Connection,
    worker_id: uuid.UUID,
    pid: int,
    message: str,
    retry_seconds: float,
    log: str | None = None,
    on_device: uuid.UUID | None = None,
) -> list[tuple[str, Fence | None]]:
    """End every lease held by a dead child process, and end the attempts of its frames.

    Args:
        connection: in a transaction.
        worker_id: the worker that owned the child.
        pid: the child's process ID.
        message: the reason of its end.
        retry_seconds: the back-off before a second attempt.
        log: the last output of the child.
        on_device: the lease whose batch it was denoising; the other leases are not suspects. If it
            denoised none, any other ID. None means that every lease is a suspect.

    Returns:
        For each lease, the lane to ring and the batch's first frame. The frame is None for a lease
        that is not a suspect.
    """
    values = {"worker_id": worker_id, "pid": pid, "known": []}
    leases = rows_of(connection.execute(LEASES_OF, values), HeldLease)
    _lock_all(connection, leases)
    load_seconds = connection.execute(LOAD_SECONDS, {"id": worker_id}).scalar()
    known = {lease.id for lease in leases if not lease.spooled}
    suspects = known if on_device is None else known & {on_device}
    for lease in leases:
        suspect, delay_seconds = lease.id in suspects, None
        if load_seconds is not None and len(lease.job_ids) == 1 and suspect:
            # It may kill the next child too. The lane keeps its pace if reloads are rare.
            delay_seconds = min(RETRY_DELAY_PER_LOAD * load_seconds, MAX_SECONDS)
        _drop(
            connection,
            lease,
            WORKER_LOST,
            message,
            retry_seconds,
            suspect,
            log if suspect else None,
            delay_seconds,
        )
    return [
        (lease.pipeline, _held_by(lease)[0] if lease.id in suspects else None) for lease in leases
    ]


def _drop(
    connection: Connection,
    lease: HeldLease,
    reason: str,
    message: str,
    retry_seconds: float,
    suspect: bool,
    log: str | None = None,
    delay_seconds: float | None = None,
) -> None:
    held = _held_by(lease)
    several = len(held) > 1
    if lease.spooled:
        message += " The picture was waiting for the storage, and is lost."
    elif not suspect:
        message += " This frame was not being denoised at that time."
    elif several:
        # Any of the frames may be the cause: none is charged, and each is retried isolated. The log
        # is not kept: it may contain other tenants' frames.
        message += " The frames of this batch are tried again one by one."
    failures = [
        FailedAttempt(
            fence,
            reason,
            message,
            log=None if several else log,
            charged=suspect and not several,
            isolated=suspect,
            delay_seconds=delay_seconds,
        )
        for fence in held
    ]
    ended = end_attempts(connection, FAILED, failures, retry_seconds)
    states = list(ended.values())
    lost = {
        "requeued": states.count(FrameState.READY),
        "dead": states.count(FrameState.DEAD),
        "expired": int(reason == "lease_expired"),
    }
    connection.execute(COUNT_LOST, {"id": lease.worker_id, **lost})
    connection.execute(DROP_LEASES, {"ids": [lease.id]})


def _lock_all(connection: Connection, leases: Sequence[HeldLease]) -> None:
    """Lock jobs and shares of all leases at once. One by one would break the lock order."""
    job_ids = [job_id for lease in leases for job_id in lease.job_ids]
    lock_jobs(connection, job_ids)
    lock_shares(connection, job_ids)


def _held_by(lease: HeldLease) -> list[Fence]:
    return list(zip(lease.job_ids, lease.ordinals, lease.attempts, strict=True))
