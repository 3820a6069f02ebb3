"""Transitions of frames after their claim: complete, fail, release.

Every write is fenced by (job, ordinal, attempt, running). If no row matches, the lease was lost:
the result is dropped, and the caller gets the fences that were accepted.
"""

from __future__ import annotations

import builtins
import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection, Row, text

from farm.domain.faults import fault_of
from farm.domain.spec import Run, run_of, shrunk
from farm.domain.states import FrameState, after_failure, retry_delay
from farm.store import arrays
from farm.store.claim import Fence
from farm.store.requeue import INTO_REQUEUED
from farm.store.tally import Delta, lock_jobs, lock_shares, tally
from farm.store.workers import ADD, Account

FAILED = "frames.failed"
"""Kind of the event of unsuccessful attempts, charged or not."""

RELEASED, RENDER_ERROR, LEASE_EXPIRED = "released", "render_error", "lease_expired"
WORKER_LOST = "worker_lost"
"""Reason of an attempt whose process ended."""

MAX_UNCHARGED_LOSSES = 10
"""Uncharged attempts of a frame after which the loss of its process is always charged."""


@dataclass(frozen=True)
class CompletedFrame:
    """A frame whose artifact is stored."""

    fence: Fence
    sha256: bytes
    bytes: int
    slot: int
    digest: builtins.bytes | None = None
    """Hash of everything that decides the artifact's bytes, if it may be reused."""
    reused: bool = False
    """True if the artifact is a copy of another frame's artifact."""
    seconds: float = 0.0
    """Its part of the time in which its batch was denoised. 0 if it was not."""
    provenance: str | None = None
    """All that renders it again, as JSON, if its file does not hold it."""


@dataclass(frozen=True)
class FailedAttempt:
    """An unsuccessful attempt."""

    fence: Fence
    reason: str
    """One word, for example render_error, worker_lost, lease_expired or released."""
    message: str
    retryable: bool = True
    log: str | None = None
    """Last output of the process, for an operator: a traceback, or lines of its log."""
    charged: bool = True
    """True if the attempt counts towards max_attempts."""
    isolated: bool = False
    """True to isolate the frame from now on. A charged frame is always isolated."""
    smaller: bool = False
    """True if a smaller bucket may help. If the job left it open, the next bucket is half."""
    delay_seconds: float | None = None
    """Delay before the frame may be claimed again, in seconds. None: grows with each attempt."""
    reroll: bool = False
    """True if a filter rejected the image. Up to `max_rerolls` other seeds are tried."""

    def fault(self, *, charged: bool) -> str | None:
        """Return its cause.

        None: it is no fault; or its batch failed or was lost, and the cause is seen when its frames
        are tried one by one.
        """
        of_a_batch = self.reason == RENDER_ERROR and self.isolated
        lost = self.reason in (WORKER_LOST, LEASE_EXPIRED)
        if self.reroll or self.reason == RELEASED or ((of_a_batch or lost) and not charged):
            return None
        return fault_of(self.reason, self.message, self.log)


LOCK_LEASE = text("SELECT job_ids FROM leases WHERE id = :id FOR UPDATE")

COMPLETE = """
SELECT * FROM pg_temp.complete(
    CAST(:lease_ids AS uuid[]), CAST(:job_ids AS uuid[]), CAST(:ordinals AS bigint[]),
    CAST(:attempts AS smallint[]), CAST(:sha256 AS bytea[]), CAST(:bytes AS int[]),
    CAST(:slots AS smallint[]), CAST(:seconds AS float[]), CAST(:digests AS bytea[]),
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
JOIN frames f ON f.job_id = ANY (ARRAY[d.job_id]) AND f.ordinal = d.ordinal
WHERE f.attempt = d.attempt AND f.state = 'succeeded' AND f.sha256 = d.sha256
""")

# As in engine.BY_INDEX: a new farm's statistics must not lead to a join that reads all frames.
BY_INDEX = text(
    "SET LOCAL enable_seqscan = off; SET LOCAL enable_hashjoin = off;"
    " SET LOCAL enable_mergejoin = off"
)

HELD = text("""
SELECT f.job_id, f.ordinal, f.attempt, f.uncharged, f.rerolls, j.max_attempts,
       coalesce((j.spec ->> 'max_rerolls')::int, 0) AS max_rerolls
FROM unnest(CAST(:job_ids AS uuid[]), CAST(:ordinals AS bigint[]), CAST(:attempts AS smallint[]))
     AS d (job_id, ordinal, attempt)
JOIN frames f ON f.job_id = ANY (ARRAY[d.job_id]) AND f.ordinal = d.ordinal
JOIN jobs j ON j.id = ANY (ARRAY[d.job_id])
WHERE f.attempt = d.attempt AND f.state = 'running'
ORDER BY f.job_id, f.ordinal
FOR UPDATE OF f
""")

# The frame leaves `running`, its attempt is recorded, and a ready frame may be claimed again.
END = text(f"""
WITH ended AS (
    UPDATE frames f
    SET state = d.state, uncharged = f.uncharged + d.uncharged, rerolls = f.rerolls + d.reroll,
        finished_at = clock_timestamp(),
        error = d.message, isolated = f.isolated OR d.isolated
    FROM unnest(CAST(:job_ids AS uuid[]), CAST(:ordinals AS bigint[]), CAST(:states AS text[]),
                CAST(:uncharged AS smallint[]), CAST(:rerolls AS smallint[]),
                CAST(:reasons AS text[]), CAST(:messages AS text[]),
                CAST(:logs AS text[]), CAST(:delays AS float[]), CAST(:isolated AS bool[]),
                CAST(:faults AS text[]))
         AS d (job_id, ordinal, state, uncharged, reroll, reason, message, log, delay, isolated,
               fault)
    WHERE f.job_id = ANY (ARRAY[d.job_id]) AND f.ordinal = d.ordinal AND f.state = 'running'
    RETURNING f.*, d.reason, d.message, d.log, d.delay, d.fault
), recorded AS (
    INSERT INTO attempts (job_id, ordinal, attempt, worker, reason, message, traceback, started_at,
                          fault)
    SELECT job_id, ordinal, attempt, worker, reason, message, log, started_at, fault FROM ended
), unprinted AS (
    DELETE FROM perceptual_hashes p USING ended e
    WHERE p.job_id = ANY (ARRAY[e.job_id]) AND p.ordinal = e.ordinal AND e.state = 'dead'
), requeued AS (
    SELECT job_id, ordinal, delay, isolated FROM ended WHERE state = 'ready'
)
{INTO_REQUEUED}""")  # noqa: S608 - constants only

CLOSE_LEASE = text("""
DELETE FROM leases l
WHERE l.id = :id AND NOT pg_temp.is_any_running(l.job_ids, l.ordinals, l.attempts)
""")

# For jobs that left their bucket open: the bucket of a frame's claim, its run and the job's runs.
ROOM = text("""
SELECT j.id, j.runs, f.ordinal, f.bucket, f.run
FROM unnest(CAST(:job_ids AS uuid[]), CAST(:ordinals AS bigint[]), CAST(:attempts AS smallint[]))
     AS d (job_id, ordinal, attempt)
JOIN frames f ON f.job_id = ANY (ARRAY[d.job_id]) AND f.ordinal = d.ordinal
JOIN jobs j ON j.id = ANY (ARRAY[d.job_id])
WHERE f.attempt = d.attempt AND f.state = 'running' AND f.bucket > 1 AND j.spec ->> 'bucket' IS NULL
ORDER BY j.id, f.ordinal
""")

# In a job that is claimed whole, `run` is one more than the index of the last run.
SHRINK = text("""
UPDATE jobs SET runs = CAST(:runs AS jsonb),
                batch_key = coalesce(CAST(:runs AS jsonb) -> run ->> 1, batch_key),
                bucket = coalesce((CAST(:runs AS jsonb) -> run ->> 2)::smallint, bucket)
WHERE id = :id
""")

LOCK_RETURNS = text("""
SELECT FROM requeued_frames WHERE job_id = ANY(:ids) ORDER BY job_id, ordinal FOR UPDATE
""")

# The job's requeued frames get the new buckets too.
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
) -> set[Fence]:
    """Complete frames. Return the fences that were accepted; the others had lost their lease."""
    if not done:
        return set()
    rows = connection.execute(text(COMPLETE), _results([lease_id], done))
    return {(row.job_id, row.ordinal, row.attempt) for row in rows}


def complete_batches(
    connection: Connection,
    lease_ids: Sequence[uuid.UUID],
    done: Sequence[CompletedFrame],
    worker_id: uuid.UUID,
    account: Account,
) -> set[Fence]:
    """Complete whole batches, and add them to their worker's sums, in one statement.

    If no frame is accepted, nothing is added: see already_complete.
    """
    values = {**_results(lease_ids, done), "done": len(done), **account.values(worker_id)}
    rows = connection.execute(FINISH, values)
    return {(row.job_id, row.ordinal, row.attempt) for row in rows}


def _results(
    lease_ids: Sequence[uuid.UUID], done: Sequence[CompletedFrame]
) -> dict[str, str | None]:
    return {
        "seconds": arrays.numbers(item.seconds for item in done),
        **_reuse(done),
        **_fences([item.fence for item in done]),
        "lease_ids": arrays.ids(lease_ids),
        "sha256": arrays.byte_strings(item.sha256 for item in done),
        "bytes": arrays.numbers(item.bytes for item in done),
        "slots": arrays.numbers(item.slot for item in done),
    }


def _reuse(done: Sequence[CompletedFrame]) -> dict[str, str | None]:
    """Return the arrays of digests and of reuse. Both are null if no job of a batch asks for it."""
    if not any(item.digest for item in done):
        return {"digests": None, "reused": None}
    return {
        "digests": arrays.byte_strings(item.digest for item in done),
        "reused": "{" + ",".join("t" if item.reused else "f" for item in done) + "}",
    }


def already_complete(connection: Connection, done: Sequence[CompletedFrame]) -> bool:
    """Return True if the frames have exactly these results: the reply to a COMMIT was lost."""
    sha256 = arrays.byte_strings(item.sha256 for item in done)
    values = {**_fences([item.fence for item in done]), "sha256": sha256}
    connection.execute(BY_INDEX)
    return bool(connection.execute(ALREADY, values).scalar_one() == len(done))


def fail(
    connection: Connection,
    lease_id: uuid.UUID,
    failures: Sequence[FailedAttempt],
    retry_seconds: float,
) -> dict[Fence, FrameState]:
    """End unsuccessful attempts. Return the new state of each accepted frame: ready or dead."""
    if not failures:
        return {}
    _lock(connection, lease_id, [failure.fence for failure in failures])
    ended = end_attempts(connection, FAILED, failures, retry_seconds)
    connection.execute(CLOSE_LEASE, {"id": lease_id})
    return ended


def release(connection: Connection, lease_id: uuid.UUID, fences: Sequence[Fence]) -> set[Fence]:
    """Release frames that were claimed but not rendered. Their attempts are uncharged."""
    _lock(connection, lease_id, fences)
    released = give_back(connection, fences)
    connection.execute(CLOSE_LEASE, {"id": lease_id})
    return released


def give_back(connection: Connection, fences: Sequence[Fence]) -> set[Fence]:
    """Requeue frames, uncharged and due at once. Their jobs must be locked."""
    message = "The worker released the frame without rendering it."
    failures = [
        FailedAttempt(fence, RELEASED, message, charged=False, delay_seconds=0.0)
        for fence in fences
    ]
    return set(end_attempts(connection, "frames.released", failures, 0.0))


def _lock(connection: Connection, lease_id: uuid.UUID, fences: Sequence[Fence]) -> None:
    """Lock a lease and all its jobs, including those that later writes of the transaction need."""
    lease = connection.execute(LOCK_LEASE, {"id": lease_id}).first()
    lock_jobs(connection, [*(lease.job_ids if lease else []), *(job_id for job_id, _, _ in fences)])


def end_attempts(
    connection: Connection, kind: str, failures: Sequence[FailedAttempt], retry_seconds: float
) -> dict[Fence, FrameState]:
    """End the attempts that still run. Their jobs must be locked.

    Args:
        connection: in a transaction.
        kind: the kind of the event.
        failures: the attempts, each with its reason.
        retry_seconds: the back-off before a second attempt.

    Returns:
        The new state of each frame: ready or dead.
    """
    if not failures:
        return {}
    of = {failure.fence: failure for failure in failures}
    connection.execute(BY_INDEX)
    held = connection.execute(HELD, _fences(list(of))).all()
    for fence in _shrink(connection, failures):
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


def _shrink(connection: Connection, of_batch: Sequence[FailedAttempt]) -> list[Fence]:
    """Halve the bucket of frames that did not fit in memory, and of the rest of their jobs.

    Return the frames whose bucket was halved: those of jobs that had left it open.
    """
    failures = [failure for failure in of_batch if failure.smaller]
    if not failures:
        return []
    fences = {failure.fence[:2]: failure.fence for failure in failures}
    rows = connection.execute(ROOM, _fences(list(fences.values()))).all()
    runs: dict[uuid.UUID, list[Run]] = {}
    for row in rows:
        known = runs.get(row.id, row.runs)
        of = run_of(known, row.ordinal) if row.run is None else row.run
        runs[row.id] = shrunk(known, of, row.bucket // 2)
    for job_id, smaller in runs.items():
        connection.execute(SHRINK, {"id": job_id, "runs": json.dumps(smaller)})
    if runs:
        connection.execute(LOCK_RETURNS, {"ids": list(runs)})
        lock_shares(connection, [failure.fence[0] for failure in of_batch])
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
        return _reroll(row, failure)
    charged = failure.charged
    if failure.reason == WORKER_LOST and row.uncharged >= MAX_UNCHARGED_LOSSES:
        charged = True  # its processes end too often, so the frame may be the cause after all
    state = after_failure(failure.retryable, row.attempt - row.uncharged, row.max_attempts)
    delay = failure.delay_seconds
    if delay is None:
        delay = retry_delay(row.attempt, retry_seconds)
    return _Ending(failure, state if charged else FrameState.READY, charged, delay)


def _reroll(row: Row[Any], failure: FailedAttempt) -> _Ending:
    """Decide the state of a frame whose image was rejected. A retry by hand restarts the count."""
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
        # A frame that may be the cause is isolated from now on.
        "isolated": [failure.isolated or failure.charged for failure in failures],
        "rerolls": [
            int(ending.failure.reroll and ending.state is FrameState.READY) for ending in endings
        ],
        "reasons": [failure.reason for failure in failures],
        "messages": [failure.message for failure in failures],
        "logs": [failure.log for failure in failures],
        "faults": [ending.failure.fault(charged=ending.charged) for ending in endings],
    }


def _fences(fences: Sequence[Fence]) -> dict[str, str]:
    return {
        "job_ids": arrays.ids(job_id for job_id, _, _ in fences),
        "ordinals": arrays.numbers(ordinal for _, ordinal, _ in fences),
        "attempts": arrays.numbers(attempt for _, _, attempt in fences),
    }
