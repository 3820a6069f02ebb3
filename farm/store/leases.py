"""The life of leases: renewed, touched and kept; expired, lost with a child, or given back.

A lease is a worker's right to a batch until `expires_at`, on Postgres's clock alone.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, text

from farm.states import FrameState
from farm.store.claim import Fence
from farm.store.frames import Failure, end_attempts, give_back
from farm.store.tally import lock_jobs

LOADS_BETWEEN = 8.0
"""A frame that took its child down waits for so many times what loading takes, an hour at most."""
MOST_SECONDS = 3600.0

TOUCH = text("""
UPDATE leases l SET step = :step, steps = :steps, stepped_at = clock_timestamp()
WHERE l.id = :id
RETURNING EXISTS (
    SELECT FROM unnest(l.job_ids, l.ordinals, l.attempts) AS d (job_id, ordinal, attempt)
    JOIN frames f USING (job_id, ordinal)
    WHERE f.attempt = d.attempt AND f.state = 'running')
""")

# Whoever locks several leases and waits for them does so by id.
RENEW = text("""
WITH mine AS (SELECT id FROM leases WHERE worker_id = :worker_id ORDER BY id FOR UPDATE)
UPDATE leases l SET expires_at = clock_timestamp() + make_interval(secs => :seconds)
FROM mine WHERE l.id = mine.id
RETURNING l.id, pid, clock_timestamp() - stepped_at AS still
""")

EXPIRED = text("""
SELECT id, worker_id, pipeline, kept, job_ids, ordinals, attempts FROM leases
WHERE expires_at < clock_timestamp() ORDER BY expires_at LIMIT 100 FOR UPDATE SKIP LOCKED
""")

LEASES_OF = text("""
SELECT id, worker_id, pipeline, kept, job_ids, ordinals, attempts FROM leases
WHERE worker_id = :worker_id AND pid = :pid AND id <> ALL(:known) ORDER BY id FOR UPDATE
""")

KEEP = text("UPDATE leases SET kept = true WHERE id = :id")

LOAD_SECONDS = text("SELECT load_seconds FROM workers WHERE id = :id")

ALL_LEASES_OF = text("""
SELECT id, worker_id, pipeline, job_ids, ordinals, attempts FROM leases
WHERE worker_id = :worker_id ORDER BY id FOR UPDATE
""")

DROP_LEASES = text("DELETE FROM leases WHERE id = ANY(:ids)")

COUNT_LOST = text("""
UPDATE workers SET returned = returned + :returned, dead = dead + :dead,
                   expired = expired + :expired
WHERE id = :id
""")


def renew(connection: Connection, worker_id: uuid.UUID, lease_seconds: float) -> Sequence[Row[Any]]:
    """Extend every lease a worker holds; returns (id, pid, still) of each.

    `still` is the time since the lease's last denoising step, on Postgres's clock.
    """
    return connection.execute(RENEW, {"worker_id": worker_id, "seconds": lease_seconds}).all()


def touch(connection: Connection, lease_id: uuid.UUID, step: int, steps: int) -> bool:
    """Report a denoising step; returns whether any frame of the lease is still wanted."""
    row = connection.execute(TOUCH, {"id": lease_id, "step": step, "steps": steps}).first()
    return row is not None and bool(row[0])


def keep(connection: Connection, lease_id: uuid.UUID) -> None:
    """Note that a lease's batch is rendered, and waits for the storage."""
    connection.execute(KEEP, {"id": lease_id})


def release_forgotten(
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
        _drop(connection, lease, "lease_expired", "The worker was not heard of.", retry_seconds)
    return {lease.pipeline for lease in leases}


def lose(
    connection: Connection,
    worker_id: uuid.UUID,
    pid: int,
    message: str,
    retry_seconds: float,
    log: str | None = None,
) -> list[tuple[str, Fence | None]]:
    """End the leases of a worker's child that is gone, by pid.

    Returns:
        The lane of each, to ring, and the first frame of what it was rendering; None for what it
        had rendered and only kept.
    """
    values = {"worker_id": worker_id, "pid": pid, "known": []}
    leases = connection.execute(LEASES_OF, values).all()
    _lock_all(connection, leases)
    load_seconds = connection.execute(LOAD_SECONDS, {"id": worker_id}).scalar()
    for lease in leases:
        wait_seconds = 0.0
        if load_seconds is not None and len(lease.job_ids) == 1 and not lease.kept:
            # Alone it may be what killed the child, and will kill the next: most of a worker's
            # time must stay for others, so what loading anew costs is paid rarely.
            wait_seconds = min(LOADS_BETWEEN * load_seconds, MOST_SECONDS)
        _drop(connection, lease, "worker_lost", message, retry_seconds, log, wait_seconds)
    return [(lease.pipeline, None if lease.kept else _held_by(lease)[0]) for lease in leases]


def _drop(
    connection: Connection,
    lease: Row[Any],
    reason: str,
    message: str,
    retry_seconds: float,
    log: str | None = None,
    wait_seconds: float = 0.0,
) -> None:
    held = _held_by(lease)
    several = len(held) > 1
    if lease.kept:
        message += " Its picture waited for the storage, and is lost."
    elif several:
        # Any one of them may be why: nobody is charged, and each is tried alone. The log may tell
        # of other tenants' frames.
        message += " Its batch is tried again frame by frame."
    failures = [
        Failure(
            fence,
            reason,
            message,
            log=None if several else log,
            charged=not (several or lease.kept),
            alone=not lease.kept,
            wait_seconds=wait_seconds,
        )
        for fence in held
    ]
    ended = end_attempts(connection, "frames.failed", failures, retry_seconds)
    states = list(ended.values())
    lost = {
        "returned": states.count(FrameState.READY),
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
