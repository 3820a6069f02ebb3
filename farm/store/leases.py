"""The life of leases: renewed, touched and kept; expired, lost with a child, or given back.

A lease is a worker's right to a batch until `expires_at`, on Postgres's clock alone.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, text

from farm.domain.spec import Priority
from farm.domain.states import FrameState
from farm.store.claim import Fence
from farm.store.frames import FAILED, WORKER_LOST, FailedAttempt, end_attempts, give_back
from farm.store.tally import lock_jobs

LOADS_BETWEEN = 12.0
"""A frame that took its child down waits for so many times what loading takes, an hour at most."""
MAX_SECONDS = 3600.0

REPORT_STEP = text("""
UPDATE leases l SET step = :step, steps = :steps, stepped_at = clock_timestamp()
WHERE l.id = :id
RETURNING EXISTS (
    SELECT FROM unnest(l.job_ids, l.ordinals, l.attempts) AS d (job_id, ordinal, attempt)
    JOIN frames f USING (job_id, ordinal)
    WHERE f.attempt = d.attempt AND f.state = 'running') AS wanted,
    EXISTS (SELECT FROM workers w WHERE w.id = l.worker_id AND w.draining) AS draining,
    EXISTS (SELECT FROM pg_temp.leader(
        l.pipeline, '{}', CAST(:urgent_priority AS smallint))) AS urgent
""")

# Whoever locks several leases and waits for them does so by id.
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

LOAD_SECONDS = text("SELECT load_seconds FROM workers WHERE id = :id")

ALL_LEASES_OF = text("""
SELECT id, worker_id, pipeline, job_ids, ordinals, attempts FROM leases
WHERE worker_id = :worker_id ORDER BY id FOR UPDATE
""")

DROP_LEASES = text("DELETE FROM leases WHERE id = ANY(:ids)")

COUNT_LOST = text("""
UPDATE workers SET requeued = requeued + :requeued, dead = dead + :dead,
                   expired = expired + :expired
WHERE id = :id
""")


def renew(connection: Connection, worker_id: uuid.UUID, lease_seconds: float) -> Sequence[Row[Any]]:
    """Extend every lease a worker holds; returns (id, pid, still) of each.

    `still` is the time since the lease's last denoising step, on Postgres's clock.
    """
    return connection.execute(RENEW, {"worker_id": worker_id, "seconds": lease_seconds}).all()


@dataclass(frozen=True)
class LeaseStatus:
    """What a worker learns when it reports a step."""

    wanted: bool = False
    """Whether any frame of the lease is still wanted"""
    draining: bool = False
    """Whether the worker is to claim nothing more"""
    urgent: bool = False
    """Whether interactive work waits on the lane"""


def report_step(connection: Connection, lease_id: uuid.UUID, step: int, steps: int) -> LeaseStatus:
    """Report a denoising step, and learn what is new."""
    values = {"id": lease_id, "step": step, "steps": steps}
    row = connection.execute(
        REPORT_STEP, {**values, "urgent_priority": Priority.INTERACTIVE}
    ).first()
    return LeaseStatus() if row is None else LeaseStatus(*row)


def mark_spooled(connection: Connection, lease_id: uuid.UUID) -> None:
    """Note that a lease's batch is rendered, and waits for the storage."""
    connection.execute(MARK_SPOOLED, {"id": lease_id})


def release_unknown(
    connection: Connection, worker_id: uuid.UUID, pid: int, known: Sequence[uuid.UUID] = ()
) -> None:
    """Return, uncharged, what a child holds without knowing: the reply to its claim was lost.

    Called by the child itself; `known` are the leases that it knows of.
    """
    values = {"worker_id": worker_id, "pid": pid, "known": list(known)}
    _release_leases(connection, connection.execute(LEASES_OF, values).all())


def release_all(connection: Connection, worker_id: uuid.UUID) -> set[str]:
    """Return, uncharged, all that a worker holds; returns the lanes to ring."""
    leases = connection.execute(ALL_LEASES_OF, {"worker_id": worker_id}).all()
    _release_leases(connection, leases)
    return {lease.pipeline for lease in leases}


def _release_leases(connection: Connection, leases: Sequence[Row[Any]]) -> None:
    if not leases:
        return
    _lock_all(connection, leases)
    give_back(connection, [fence for lease in leases for fence in _held_by(lease)])
    connection.execute(DROP_LEASES, {"ids": [lease.id for lease in leases]})


def expire(connection: Connection, retry_seconds: float) -> set[str]:
    """End the leases whose time is up, on Postgres's clock; returns the lanes to ring."""
    leases = connection.execute(EXPIRED).all()
    _lock_all(connection, leases)
    for lease in leases:
        message = "The worker was not heard of."
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
    """End the leases of a worker's child that is gone, by pid.

    Args:
        connection: in a transaction.
        worker_id: whose child it was.
        pid: the child's.
        message: why it is gone.
        retry_seconds: the back-off before a second attempt.
        log: what it said last.
        on_device: the lease whose batch it was denoising, or any other id where it had none there;
            the others had no part in its end. None: any of them may be why.

    Returns:
        The lane of each, to ring, and the first frame of what it was rendering; None for what had
        no part in it.
    """
    values = {"worker_id": worker_id, "pid": pid, "known": []}
    leases = connection.execute(LEASES_OF, values).all()
    _lock_all(connection, leases)
    load_seconds = connection.execute(LOAD_SECONDS, {"id": worker_id}).scalar()
    known = {lease.id for lease in leases if not lease.spooled}
    suspects = known if on_device is None else known & {on_device}
    for lease in leases:
        suspect, delay_seconds = lease.id in suspects, None
        if load_seconds is not None and len(lease.job_ids) == 1 and suspect:
            # It will kill the next child too: the lane keeps its pace if loading anew is rare.
            delay_seconds = min(LOADS_BETWEEN * load_seconds, MAX_SECONDS)
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
    lease: Row[Any],
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
        message += " Its picture waited for the storage, and is lost."
    elif not suspect:
        message += " It was not being denoised then."
    elif several:
        # Any one of them may be why: nobody is charged, and each is tried alone. The log may tell
        # of other tenants' frames.
        message += " Its batch is tried again frame by frame."
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


def _lock_all(connection: Connection, leases: Sequence[Row[Any]]) -> None:
    """Lock the jobs of all leases at once: one after the other would break the order of locks."""
    lock_jobs(connection, [job_id for lease in leases for job_id in lease.job_ids])


def _held_by(lease: Row[Any]) -> list[Fence]:
    return list(zip(lease.job_ids, lease.ordinals, lease.attempts, strict=True))
