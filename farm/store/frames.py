"""What happens to frames after their claim: complete, fail, release.

Every write is fenced by (job, ordinal, attempt, running). No row matched means that the lease was
lost: the result is dropped, and the caller is told which were accepted.
"""

from __future__ import annotations

import builtins
import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection, Row, text

from farm.domain.spec import Run, shrunk
from farm.domain.states import FrameState, after_failure, retry_delay
from farm.store import arrays
from farm.store.claim import Fence
from farm.store.requeue import INTO_REQUEUED
from farm.store.tally import Delta, lock_jobs, tally
from farm.store.workers import ADD, Account

FAILED = "frames.failed"
"""The event of attempts that did not succeed, whoever is to blame"""

WORKER_LOST = "worker_lost"
"""Why an attempt ended whose process did"""

LOST_BESIDE_AT_MOST = 10
"""So often a frame's process may end, uncharged, while another frame is on the device"""


@dataclass(frozen=True)
class CompletedFrame:
    """A frame whose artifact is stored."""

    fence: Fence
    sha256: bytes
    bytes: int
    slot: int
    digest: builtins.bytes | None = None
    """Of all that decides its bytes, where it may be used again"""
    reused: bool = False
    """Whether it is the picture of another frame"""


@dataclass(frozen=True)
class FailedAttempt:
    """An attempt that did not succeed."""

    fence: Fence
    reason: str
    """A word: render_error, worker_lost, lease_expired, released, …"""
    message: str
    retryable: bool = True
    log: str | None = None
    """What the process said last, for an operator: a traceback, or lines of its log."""
    charged: bool = True
    """Whether the attempt counts towards max_attempts."""
    isolated: bool = False
    """Whether the frame is rendered alone from now on; one that is charged always is."""
    smaller: bool = False
    """Whether a smaller bucket may help: then, where the job left it open, the next one is half."""
    delay_seconds: float | None = None
    """Before the frame may be claimed again; None: longer with each attempt."""
    reroll: bool = False
    """Whether its picture was rejected: it is drawn again with another seed, until `max_rerolls`"""


LOCK_LEASE = text("SELECT job_ids FROM leases WHERE id = :id FOR UPDATE")

COMPLETE = """
SELECT * FROM pg_temp.complete(
    CAST(:lease_ids AS uuid[]), CAST(:job_ids AS uuid[]), CAST(:ordinals AS bigint[]),
    CAST(:attempts AS smallint[]), CAST(:sha256 AS bytea[]), CAST(:bytes AS int[]),
    CAST(:slots AS smallint[]), CAST(:seconds AS float), CAST(:digests AS bytea[]),
    CAST(:reused AS bool[]))
"""

FINISH = text(f"""
WITH accepted AS MATERIALIZED ({COMPLETE}), come AS (
    SELECT count(*) AS succeeded, :done - count(*) AS dropped FROM accepted HAVING count(*) > 0
), accounted AS ({ADD})
SELECT * FROM accepted
""")  # noqa: S608 - constants only

ALREADY = text("""
SELECT count(*)
FROM unnest(CAST(:job_ids AS uuid[]), CAST(:ordinals AS bigint[]), CAST(:attempts AS smallint[]),
            CAST(:sha256 AS bytea[])) AS d (job_id, ordinal, attempt, sha256)
JOIN frames f USING (job_id, ordinal)
WHERE f.attempt = d.attempt AND f.state = 'succeeded' AND f.sha256 = d.sha256
""")

HELD = text("""
SELECT f.job_id, f.ordinal, f.attempt, f.uncharged, f.rerolls, j.max_attempts,
       coalesce((j.spec ->> 'max_rerolls')::int, 0) AS max_rerolls
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
    SET state = d.state, uncharged = f.uncharged + d.uncharged, rerolls = f.rerolls + d.reroll,
        finished_at = clock_timestamp(),
        error = d.message, isolated = f.isolated OR d.isolated
    FROM unnest(CAST(:job_ids AS uuid[]), CAST(:ordinals AS bigint[]), CAST(:states AS text[]),
                CAST(:uncharged AS smallint[]), CAST(:rerolls AS smallint[]),
                CAST(:reasons AS text[]), CAST(:messages AS text[]),
                CAST(:logs AS text[]), CAST(:delays AS float[]), CAST(:isolated AS bool[]))
         AS d (job_id, ordinal, state, uncharged, reroll, reason, message, log, delay, isolated)
    WHERE f.job_id = d.job_id AND f.ordinal = d.ordinal AND f.state = 'running'
    RETURNING f.*, d.reason, d.message, d.log, d.delay
), recorded AS (
    INSERT INTO attempts (job_id, ordinal, attempt, worker, reason, message, traceback, started_at)
    SELECT job_id, ordinal, attempt, worker, reason, message, log, started_at FROM ended
), unprinted AS (
    DELETE FROM perceptual_hashes p USING ended e
    WHERE p.job_id = e.job_id AND p.ordinal = e.ordinal AND e.state = 'dead'
), requeued AS (
    SELECT job_id, ordinal, delay, isolated FROM ended WHERE state = 'ready'
)
{INTO_REQUEUED}""")  # noqa: S608 - constants only

CLOSE_LEASE = text("""
DELETE FROM leases l WHERE l.id = :id AND NOT EXISTS (
    SELECT FROM unnest(l.job_ids, l.ordinals, l.attempts) AS d (job_id, ordinal, attempt)
    JOIN frames f USING (job_id, ordinal)
    WHERE f.attempt = d.attempt AND f.state = 'running')
""")

# Where the job left its bucket open: what a frame was claimed in, and the job's runs.
ROOM = text("""
SELECT j.id, j.runs, f.ordinal, f.bucket
FROM unnest(CAST(:job_ids AS uuid[]), CAST(:ordinals AS bigint[]), CAST(:attempts AS smallint[]))
     AS d (job_id, ordinal, attempt)
JOIN frames f USING (job_id, ordinal) JOIN jobs j ON j.id = f.job_id
WHERE f.attempt = d.attempt AND f.state = 'running' AND f.bucket > 1 AND j.spec ->> 'bucket' IS NULL
ORDER BY j.id, f.ordinal
""")

# A job that is claimed whole stands behind its last run.
SHRINK = text("""
UPDATE jobs SET runs = CAST(:runs AS jsonb),
                batch_key = coalesce(CAST(:runs AS jsonb) -> run ->> 1, batch_key),
                bucket = coalesce((CAST(:runs AS jsonb) -> run ->> 2)::smallint, bucket)
WHERE id = :id
""")

# What waits among the requeued follows the job's runs.
SHRINK_RETURNS = text("""
UPDATE requeued_frames t SET batch_key = run.key, bucket = run.bucket
FROM jobs j CROSS JOIN LATERAL (
    SELECT DISTINCT run ->> 1 AS key, (run ->> 2)::smallint AS bucket
    FROM jsonb_array_elements(j.runs) AS e (run)
) run
WHERE t.job_id = j.id AND j.id = ANY(:ids) AND t.bucket > run.bucket
  AND split_part(t.batch_key, '/', 1) = split_part(run.key, '/', 1)
""")


def complete(
    connection: Connection,
    lease_id: uuid.UUID,
    done: Sequence[CompletedFrame],
    seconds: float = 0.0,
) -> set[Fence]:
    """Make frames `succeeded`; returns the fences accepted, the others lost their lease.

    `seconds` is how long a device denoised them, all together.
    """
    if not done:
        return set()
    rows = connection.execute(text(COMPLETE), _results([lease_id], done, seconds))
    return {(row.job_id, row.ordinal, row.attempt) for row in rows}


def complete_batches(
    connection: Connection,
    lease_ids: Sequence[uuid.UUID],
    done: Sequence[CompletedFrame],
    worker_id: uuid.UUID,
    account: Account,
) -> set[Fence]:
    """Complete batches of which every frame is done, and add them to their worker's sums.

    Where none is accepted nothing is added: see already_complete. One statement.
    """
    results = _results(lease_ids, done, account.denoise_seconds)
    values = {**results, "done": len(done), **account.values(worker_id)}
    rows = connection.execute(FINISH, values)
    return {(row.job_id, row.ordinal, row.attempt) for row in rows}


def _results(
    lease_ids: Sequence[uuid.UUID], done: Sequence[CompletedFrame], seconds: float
) -> dict[str, str | float | None]:
    return {
        "seconds": seconds,
        **_reuse(done),
        **_fences([item.fence for item in done]),
        "lease_ids": arrays.ids(lease_ids),
        "sha256": arrays.byte_strings(item.sha256 for item in done),
        "bytes": arrays.numbers(item.bytes for item in done),
        "slots": arrays.numbers(item.slot for item in done),
    }


def _reuse(done: Sequence[CompletedFrame]) -> dict[str, str | None]:
    """Both are null where no job of a batch asks for it."""
    if not any(item.digest for item in done):
        return {"digests": None, "reused": None}
    return {
        "digests": arrays.byte_strings(item.digest for item in done),
        "reused": "{" + ",".join("t" if item.reused else "f" for item in done) + "}",
    }


def already_complete(connection: Connection, done: Sequence[CompletedFrame]) -> bool:
    """Whether these very results are what the frames hold: the reply to a COMMIT was lost."""
    sha256 = arrays.byte_strings(item.sha256 for item in done)
    values = {**_fences([item.fence for item in done]), "sha256": sha256}
    return bool(connection.execute(ALREADY, values).scalar_one() == len(done))


def fail(
    connection: Connection,
    lease_id: uuid.UUID,
    failures: Sequence[FailedAttempt],
    retry_seconds: float,
) -> dict[Fence, FrameState]:
    """End attempts that did not succeed; returns where each accepted frame went: ready or dead."""
    if not failures:
        return {}
    _lock(connection, lease_id, [failure.fence for failure in failures])
    ended = end_attempts(connection, FAILED, failures, retry_seconds)
    connection.execute(CLOSE_LEASE, {"id": lease_id})
    return ended


def release(connection: Connection, lease_id: uuid.UUID, fences: Sequence[Fence]) -> set[Fence]:
    """Return frames that were claimed but not rendered, at no charge to their attempts."""
    _lock(connection, lease_id, fences)
    released = give_back(connection, fences)
    connection.execute(CLOSE_LEASE, {"id": lease_id})
    return released


def give_back(connection: Connection, fences: Sequence[Fence]) -> set[Fence]:
    """Return frames, uncharged and due at once; their jobs must be locked."""
    failures = [
        FailedAttempt(
            fence, "released", "The worker gave it back.", charged=False, delay_seconds=0.0
        )
        for fence in fences
    ]
    return set(end_attempts(connection, "frames.released", failures, 0.0))


def _lock(connection: Connection, lease_id: uuid.UUID, fences: Sequence[Fence]) -> None:
    """Lock a lease and every job of it, also those that a later write of the transaction needs."""
    lease = connection.execute(LOCK_LEASE, {"id": lease_id}).first()
    lock_jobs(connection, [*(lease.job_ids if lease else []), *(job_id for job_id, _, _ in fences)])


def end_attempts(
    connection: Connection, kind: str, failures: Sequence[FailedAttempt], retry_seconds: float
) -> dict[Fence, FrameState]:
    """End attempts, as far as they still run; their jobs must be locked.

    Args:
        connection: in a transaction.
        kind: the event's.
        failures: why each ended.
        retry_seconds: the back-off before a second attempt.

    Returns:
        Where each went: ready or dead.
    """
    if not failures:
        return {}
    of = {failure.fence: failure for failure in failures}
    held = connection.execute(HELD, _fences(list(of))).all()
    for fence in _shrink(connection, [failure for failure in failures if failure.smaller]):
        # A smaller bucket is tried next, with neighbours.
        of[fence] = replace(of[fence], charged=False, isolated=False)
    endings = [
        _ending(row, of[row.job_id, row.ordinal, row.attempt], retry_seconds) for row in held
    ]
    deltas: dict[uuid.UUID, Delta] = {}
    for ending in endings:
        job_id, ordinal, attempt = ending.failure.fence
        reason = ending.failure.reason
        delta = deltas.setdefault(job_id, Delta(data={"frames": [], "reason": reason}))
        delta.running -= 1
        delta.dead += ending.state is FrameState.DEAD
        if kind == FAILED:
            delta.failures[reason] += 1
        delta.data["frames"].append([ordinal, attempt, ending.state])
    if endings:
        connection.execute(END, _columns(endings))
    tally(connection, kind, deltas)
    return {ending.failure.fence: ending.state for ending in endings}


def _shrink(connection: Connection, failures: Sequence[FailedAttempt]) -> list[Fence]:
    """Halve the bucket of what did not fit in memory, for the rest of its job too.

    Returns those whose job had left the bucket open, so that it could be halved.
    """
    if not failures:
        return []
    fences = {failure.fence[:2]: failure.fence for failure in failures}
    rows = connection.execute(ROOM, _fences(list(fences.values()))).all()
    runs: dict[uuid.UUID, list[Run]] = {}
    for row in rows:
        runs[row.id] = shrunk(runs.get(row.id, row.runs), row.ordinal, row.bucket // 2)
    for job_id, smaller in runs.items():
        connection.execute(SHRINK, {"id": job_id, "runs": json.dumps(smaller)})
    if runs:
        connection.execute(SHRINK_RETURNS, {"ids": list(runs)})
    return [fences[row.id, row.ordinal] for row in rows]


@dataclass(frozen=True)
class _Ending:
    failure: FailedAttempt
    state: FrameState
    charged: bool
    delay_seconds: float


def _ending(row: Row[Any], failure: FailedAttempt, retry_seconds: float) -> _Ending:
    if failure.reroll:
        return _redraw(row, failure)
    charged = failure.charged
    if failure.reason == WORKER_LOST and row.uncharged >= LOST_BESIDE_AT_MOST:
        charged = True  # whatever it is, it is never there when a process does not end
    state = after_failure(failure.retryable, row.attempt - row.uncharged, row.max_attempts)
    delay = failure.delay_seconds
    if delay is None:
        delay = retry_delay(row.attempt, retry_seconds)
    return _Ending(failure, state if charged else FrameState.READY, charged, delay)


def _redraw(row: Row[Any], failure: FailedAttempt) -> _Ending:
    """Say what becomes of a frame whose picture was rejected: retried by hand, it may go on."""
    again = row.rerolls % (row.max_rerolls + 1) < row.max_rerolls
    state = FrameState.READY if again else FrameState.DEAD
    return _Ending(failure, state, charged=not again, delay_seconds=0.0)


def _columns(endings: Sequence[_Ending]) -> dict[str, Any]:
    failures = [ending.failure for ending in endings]
    return {
        **_fences([failure.fence for failure in failures]),
        "states": [ending.state for ending in endings],
        "delays": [ending.delay_seconds for ending in endings],
        "uncharged": [0 if ending.charged else 1 for ending in endings],
        # What may be to blame goes alone from now on.
        "isolated": [failure.isolated or failure.charged for failure in failures],
        "rerolls": [
            int(ending.failure.reroll and ending.state is FrameState.READY) for ending in endings
        ],
        "reasons": [failure.reason for failure in failures],
        "messages": [failure.message for failure in failures],
        "logs": [failure.log for failure in failures],
    }


def _fences(fences: Sequence[Fence]) -> dict[str, str]:
    return {
        "job_ids": arrays.ids(job_id for job_id, _, _ in fences),
        "ordinals": arrays.numbers(ordinal for _, ordinal, _ in fences),
        "attempts": arrays.numbers(attempt for _, _, attempt in fences),
    }
