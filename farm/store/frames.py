"""What happens to frames after their claim: complete, fail, release, expire, and the lease's life.

Every write is fenced by (job, ordinal, attempt, running). No row matched means that the lease was
lost: the result is dropped, and the caller is told which were accepted.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, text

from farm.states import FrameState, after_failure, retry_delay
from farm.store.claim import Fence
from farm.store.returns import INTO_RETURNS
from farm.store.tally import Delta, lock_jobs, tally


@dataclass(frozen=True)
class Done:
    """A frame whose artifact is stored."""

    fence: Fence
    sha256: bytes
    bytes: int
    slot: int


@dataclass(frozen=True)
class Failure:
    """An attempt that did not succeed."""

    fence: Fence
    reason: str
    """A word: render_error, worker_lost, lease_expired, released, …"""
    message: str
    retryable: bool = True
    traceback: str | None = None
    charged: bool = True
    """Whether the attempt counts towards max_attempts."""
    alone: bool = False
    """Whether the frame is rendered alone from now on; one whose attempt is charged always is."""
    delay_seconds: float | None = None
    """Before the frame may be claimed again; None: longer with each attempt."""


LOCK_LEASE = text("SELECT job_ids FROM leases WHERE id = :id FOR UPDATE")

COMPLETE = text("""
UPDATE frames f
SET state = 'succeeded', finished_at = clock_timestamp(), error = NULL,
    sha256 = d.sha256, bytes = d.bytes, slot = d.slot
FROM unnest(CAST(:job_ids AS uuid[]), CAST(:ordinals AS bigint[]), CAST(:attempts AS smallint[]),
            CAST(:sha256 AS bytea[]), CAST(:bytes AS int[]), CAST(:slots AS smallint[]))
     AS d (job_id, ordinal, attempt, sha256, bytes, slot)
WHERE f.job_id = d.job_id AND f.ordinal = d.ordinal
  AND f.attempt = d.attempt AND f.state = 'running'
RETURNING f.job_id, f.ordinal, f.attempt
""")

ALREADY = text("""
SELECT count(*)
FROM unnest(CAST(:job_ids AS uuid[]), CAST(:ordinals AS bigint[]), CAST(:attempts AS smallint[]),
            CAST(:sha256 AS bytea[])) AS d (job_id, ordinal, attempt, sha256)
JOIN frames f USING (job_id, ordinal)
WHERE f.attempt = d.attempt AND f.state = 'succeeded' AND f.sha256 = d.sha256
""")

HELD = text("""
SELECT f.job_id, f.ordinal, f.attempt, f.spared, j.max_attempts
FROM unnest(CAST(:job_ids AS uuid[]), CAST(:ordinals AS bigint[]), CAST(:attempts AS smallint[]))
     AS d (job_id, ordinal, attempt)
JOIN frames f USING (job_id, ordinal) JOIN jobs j ON j.id = f.job_id
WHERE f.attempt = d.attempt AND f.state = 'running'
ORDER BY f.job_id, f.ordinal
FOR UPDATE OF f
""")

# The frame leaves `running`, its attempt goes on record, and a ready one may be claimed again.
END = text(f"""
WITH ended AS (
    UPDATE frames f
    SET state = d.state, spared = f.spared + d.spared, finished_at = clock_timestamp(),
        error = d.message
    FROM unnest(CAST(:job_ids AS uuid[]), CAST(:ordinals AS bigint[]), CAST(:states AS text[]),
                CAST(:spared AS smallint[]), CAST(:reasons AS text[]), CAST(:messages AS text[]),
                CAST(:tracebacks AS text[]), CAST(:delays AS float[]), CAST(:alone AS bool[]))
         AS d (job_id, ordinal, state, spared, reason, message, traceback, delay, alone)
    WHERE f.job_id = d.job_id AND f.ordinal = d.ordinal AND f.state = 'running'
    RETURNING f.*, d.reason, d.message, d.traceback, d.delay, d.alone
), recorded AS (
    INSERT INTO attempts (job_id, ordinal, attempt, worker, reason, message, traceback, started_at)
    SELECT job_id, ordinal, attempt, worker, reason, message, traceback, started_at FROM ended
), returned AS (
    -- A frame whose attempt failed may be why: it is rendered without neighbours from now on.
    SELECT job_id, ordinal, delay, alone OR attempt > spared AS alone
    FROM ended WHERE state = 'ready'
)
{INTO_RETURNS}""")  # noqa: S608 - constants only

CLOSE_LEASE = text("""
DELETE FROM leases l WHERE l.id = :id AND NOT EXISTS (
    SELECT FROM unnest(l.job_ids, l.ordinals, l.attempts) AS d (job_id, ordinal, attempt)
    JOIN frames f USING (job_id, ordinal)
    WHERE f.attempt = d.attempt AND f.state = 'running')
""")

TOUCH = text("""
UPDATE leases l SET step = :step, steps = :steps, stepped_at = clock_timestamp()
WHERE l.id = :id
RETURNING EXISTS (
    SELECT FROM unnest(l.job_ids, l.ordinals, l.attempts) AS d (job_id, ordinal, attempt)
    JOIN frames f USING (job_id, ordinal)
    WHERE f.attempt = d.attempt AND f.state = 'running')
""")

RENEW = text("""
UPDATE leases SET expires_at = clock_timestamp() + make_interval(secs => :seconds)
WHERE worker_id = :worker_id
RETURNING id, pid, clock_timestamp() - stepped_at AS still
""")

EXPIRED = text("""
SELECT id, worker_id, pipeline, job_ids, ordinals, attempts FROM leases
WHERE expires_at < clock_timestamp() ORDER BY expires_at LIMIT 100 FOR UPDATE SKIP LOCKED
""")

LEASES_OF = text("""
SELECT id, worker_id, pipeline, job_ids, ordinals, attempts FROM leases
WHERE worker_id = :worker_id AND pid = ANY(:pids) FOR UPDATE
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


def complete(connection: Connection, lease_id: uuid.UUID, done: Sequence[Done]) -> set[Fence]:
    """Make frames `succeeded`; returns the fences accepted, the others lost their lease."""
    _lock(connection, lease_id, [item.fence for item in done])
    rows = connection.execute(
        COMPLETE,
        {
            **_fences([item.fence for item in done]),
            "sha256": [item.sha256 for item in done],
            "bytes": [item.bytes for item in done],
            "slots": [item.slot for item in done],
        },
    )
    accepted = {(row.job_id, row.ordinal, row.attempt) for row in rows}
    deltas: dict[uuid.UUID, Delta] = {}
    for job_id, ordinal, attempt in sorted(accepted):
        delta = deltas.setdefault(job_id, Delta(data={"frames": []}))
        delta.running -= 1
        delta.succeeded += 1
        delta.data["frames"].append([ordinal, attempt])
    tally(connection, "frames.succeeded", deltas)
    connection.execute(CLOSE_LEASE, {"id": lease_id})
    return accepted


def already_complete(connection: Connection, done: Sequence[Done]) -> bool:
    """Whether these very results are what the frames hold: the reply to a COMMIT was lost."""
    values = {**_fences([item.fence for item in done]), "sha256": [item.sha256 for item in done]}
    return bool(connection.execute(ALREADY, values).scalar_one() == len(done))


def fail(
    connection: Connection,
    lease_id: uuid.UUID,
    failures: Sequence[Failure],
    retry_seconds: float,
) -> dict[Fence, FrameState]:
    """End attempts that did not succeed; returns where each accepted frame went: ready or dead."""
    _lock(connection, lease_id, [failure.fence for failure in failures])
    ended = _end(connection, "frames.failed", failures, retry_seconds)
    connection.execute(CLOSE_LEASE, {"id": lease_id})
    return ended


def release(connection: Connection, lease_id: uuid.UUID, fences: Sequence[Fence]) -> set[Fence]:
    """Return frames that were claimed but not rendered, at no charge to their attempts."""
    _lock(connection, lease_id, fences)
    released = _release(connection, fences)
    connection.execute(CLOSE_LEASE, {"id": lease_id})
    return released


def release_forgotten(connection: Connection, worker_id: uuid.UUID, pid: int) -> None:
    """Return, uncharged, what a child holds without knowing: the reply to its claim was lost.

    Called by the child itself, when it holds nothing that it knows of.
    """
    leases = connection.execute(LEASES_OF, {"worker_id": worker_id, "pids": [pid]}).all()
    fences = [fence for lease in leases for fence in _held_by(lease)]
    if leases:
        lock_jobs(connection, [job_id for job_id, _, _ in fences])
        _release(connection, fences)
        connection.execute(DROP_LEASES, {"ids": [lease.id for lease in leases]})


def _release(connection: Connection, fences: Sequence[Fence]) -> set[Fence]:
    failures = [
        Failure(fence, "released", "The worker gave it back.", charged=False, delay_seconds=0.0)
        for fence in fences
    ]
    return set(_end(connection, "frames.released", failures, 0.0))


def _lock(connection: Connection, lease_id: uuid.UUID, fences: Sequence[Fence]) -> None:
    """Lock a lease and every job of it, also those that a later write of the transaction needs."""
    held = connection.execute(LOCK_LEASE, {"id": lease_id}).scalar()
    lock_jobs(connection, [*(held or []), *(job_id for job_id, _, _ in fences)])


def expire(connection: Connection, retry_seconds: float) -> set[str]:
    """End the leases whose time is up, on Postgres's clock; returns the lanes to ring."""
    leases = connection.execute(EXPIRED).all()
    return _drop(connection, leases, "lease_expired", "The worker was not heard of.", retry_seconds)


def lose(
    connection: Connection,
    worker_id: uuid.UUID,
    pids: Sequence[int],
    message: str,
    retry_seconds: float,
) -> set[str]:
    """End the leases of a worker's children that are gone, by pid; returns the lanes to ring."""
    leases = connection.execute(LEASES_OF, {"worker_id": worker_id, "pids": list(pids)}).all()
    return _drop(connection, leases, "worker_lost", message, retry_seconds)


def _drop(
    connection: Connection,
    leases: Sequence[Row[Any]],
    reason: str,
    message: str,
    retry_seconds: float,
) -> set[str]:
    lock_jobs(connection, [job_id for lease in leases for job_id in lease.job_ids])
    for lease in leases:
        failures = [Failure(fence, reason, message) for fence in _held_by(lease)]
        states = list(_end(connection, "frames.failed", failures, retry_seconds).values())
        lost = {
            "returned": states.count(FrameState.READY),
            "dead": states.count(FrameState.DEAD),
            "expired": int(reason == "lease_expired"),
        }
        connection.execute(COUNT_LOST, {"id": lease.worker_id, **lost})
    connection.execute(DROP_LEASES, {"ids": [lease.id for lease in leases]})
    return {lease.pipeline for lease in leases}


def _held_by(lease: Row[Any]) -> list[Fence]:
    return list(zip(lease.job_ids, lease.ordinals, lease.attempts, strict=True))


def _end(
    connection: Connection, kind: str, failures: Sequence[Failure], retry_seconds: float
) -> dict[Fence, FrameState]:
    if not failures:
        return {}
    of = {failure.fence: failure for failure in failures}
    endings = [
        _ending(row, of[row.job_id, row.ordinal, row.attempt], retry_seconds)
        for row in connection.execute(HELD, _fences(list(of)))
    ]
    deltas: dict[uuid.UUID, Delta] = {}
    for ending in endings:
        failure = of[ending.fence]
        job_id, ordinal, attempt = ending.fence
        delta = deltas.setdefault(job_id, Delta(data={"frames": [], "reason": failure.reason}))
        delta.running -= 1
        delta.dead += ending.state is FrameState.DEAD
        delta.data["frames"].append([ordinal, attempt, ending.state])
    if endings:
        connection.execute(END, _columns(endings, [of[ending.fence] for ending in endings]))
    tally(connection, kind, deltas)
    return {ending.fence: ending.state for ending in endings}


@dataclass(frozen=True)
class _Ending:
    fence: Fence
    state: FrameState
    delay_seconds: float


def _ending(row: Row[Any], failure: Failure, retry_seconds: float) -> _Ending:
    charged = row.attempt - row.spared
    state = after_failure(failure.retryable, charged, row.max_attempts)
    delay = failure.delay_seconds
    return _Ending(
        failure.fence,
        state if failure.charged else FrameState.READY,
        retry_delay(row.attempt, retry_seconds) if delay is None else delay,
    )


def _columns(endings: Sequence[_Ending], failures: Sequence[Failure]) -> dict[str, list[Any]]:
    return {
        **_fences([ending.fence for ending in endings]),
        "states": [ending.state for ending in endings],
        "delays": [ending.delay_seconds for ending in endings],
        "spared": [0 if failure.charged else 1 for failure in failures],
        "alone": [failure.alone for failure in failures],
        "reasons": [failure.reason for failure in failures],
        "messages": [failure.message for failure in failures],
        "tracebacks": [failure.traceback for failure in failures],
    }


def _fences(fences: Sequence[Fence]) -> dict[str, list[Any]]:
    return {
        "job_ids": [job_id for job_id, _, _ in fences],
        "ordinals": [ordinal for _, ordinal, _ in fences],
        "attempts": [attempt for _, _, attempt in fences],
    }
