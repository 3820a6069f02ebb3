"""Damages to the jobs of `situations.py`, by the invariant that each violates."""

from __future__ import annotations

from dataclasses import dataclass

from farm.domain.invariants import Invariant


@dataclass(frozen=True)
class Damage:
    """A change that breaks one job, and the finding that the audit must report for it."""

    job: str
    """Name of the job in `Jobs`, such as "succeeded"."""
    statements: str
    """SQL, with `:id` for the job's ID. Several statements are separated by "; "."""
    detail: str
    """Part of the finding's detail."""
    frame: int | None = None
    """Ordinal of the frame that the finding names. None when it names the whole job."""


DURABILITY: dict[str, Damage] = {
    "a job that is gone": Damage(
        "succeeded",
        "DELETE FROM jobs WHERE id = :id",
        detail="is missing",
    ),
    "a job without an event of its submission": Damage(
        "partial",
        "DELETE FROM events WHERE kind = 'job.queued' AND job_id = :id",
        detail="0 events",
    ),
    "a job with two events of its submission": Damage(
        "queued",
        "INSERT INTO events (job_id, tenant_id, kind, data)"
        " SELECT id, tenant_id, 'job.queued', '{}' FROM jobs WHERE id = :id",
        detail="2 events",
    ),
}

CONSERVATION: dict[str, Damage] = {
    "a wrong counter": Damage(
        "cancelled",
        "UPDATE jobs SET cancelled = cancelled - 1 WHERE id = :id",
        detail="counter says 2 cancelled, but 3",
    ),
    "more waiting frames than there are": Damage(
        "ready",
        "UPDATE jobs SET total = total + 1, open = true WHERE id = :id; "
        "UPDATE jobs SET cursor = cursor + 1, open = false WHERE id = :id",
        detail="its cursor is 3",
    ),
    "a frame of a live job that is gone": Damage(
        "running",
        "DELETE FROM frames WHERE job_id = :id AND ordinal = 1",
        frame=1,
        detail="its attempt is none",
    ),
    "a wrong status": Damage(
        "partial",
        "UPDATE jobs SET status = 'succeeded' WHERE id = :id",
        detail="it is succeeded, but its counters say partial",
    ),
    "a job that never ends": Damage(
        "succeeded",
        "UPDATE jobs SET status = 'running', finished_at = NULL WHERE id = :id",
        detail="it is running, but its counters say succeeded",
    ),
    "a job that no claim would find": Damage(
        "queued",
        "UPDATE shares SET priority = NULL"
        " WHERE tenant_id = (SELECT tenant_id FROM jobs WHERE id = :id)",
        detail="no claim would find it",
    ),
    "a waiting job with an end": Damage(
        "queued",
        "UPDATE jobs SET finished_at = clock_timestamp() WHERE id = :id",
        detail="its end is",
    ),
    "a waiting job that is closed to claims": Damage(
        "queued",
        "UPDATE jobs SET open = false WHERE id = :id",
        detail="closed",
    ),
    "a ready frame nobody can claim": Damage(
        "ready",
        "DELETE FROM requeued_frames WHERE job_id = :id AND ordinal = 0",
        frame=0,
        detail="not among the requeued",
    ),
    "a succeeded frame that may be claimed": Damage(
        "succeeded",
        "INSERT INTO requeued_frames SELECT :id, 1, pipeline, tenant_id, priority, batch_key,"
        " bucket, not_before, job_created_at, paused, isolated FROM requeued_frames LIMIT 1",
        frame=1,
        detail="it is succeeded, but among the requeued",
    ),
    "a running frame nobody holds": Damage(
        "running",
        "DELETE FROM leases",
        frame=0,
        detail="held by 0 leases",
    ),
    "a frame held twice": Damage(
        "running",
        "INSERT INTO leases SELECT gen_random_uuid(), worker_id, pid, pipeline,"
        " created_at, expires_at, job_ids, ordinals, attempts FROM leases",
        frame=1,
        detail="held by 2 leases",
    ),
    "a lease on an attempt that never began": Damage(
        "running",
        "UPDATE leases SET attempts = '{1,7}'",
        frame=1,
        detail="its attempt is 1",
    ),
}

LEDGER: dict[str, Damage] = {
    "an earlier attempt that is missing": Damage(
        "retried",
        "DELETE FROM attempts WHERE job_id = :id AND ordinal = 0 AND attempt = 1",
        frame=0,
        detail="1 earlier attempts are recorded, not 2",
    ),
    "an attempt too many": Damage(
        "partial",
        "INSERT INTO attempts SELECT job_id, ordinal, 9, worker, reason, message,"
        " traceback, started_at, ended_at FROM attempts WHERE job_id = :id",
        frame=1,
        detail="that it never had",
    ),
    "a dead frame's last attempt that is missing": Damage(
        "partial",
        "DELETE FROM attempts WHERE job_id = :id",
        frame=1,
        detail="is not recorded",
    ),
    "a running frame that has ended": Damage(
        "running",
        "INSERT INTO attempts SELECT job_id, ordinal, attempt, worker, 'x', '', '',"
        " started_at FROM frames WHERE job_id = :id AND ordinal = 0",
        frame=0,
        detail="it is running, but recorded as ended",
    ),
    "an attempt without a reason": Damage(
        "ready",
        "UPDATE attempts SET reason = '' WHERE job_id = :id AND ordinal = 1",
        frame=1,
        detail="without a reason",
    ),
    "more attempts than allowed": Damage(
        "retried",
        "UPDATE frames SET uncharged = 0 WHERE job_id = :id AND ordinal = 0",
        frame=0,
        detail="3 attempts are charged; the maximum is 2",
    ),
    "a negative number of charged attempts": Damage(
        "partial",
        "UPDATE frames SET uncharged = 2 WHERE job_id = :id AND ordinal = 1",
        frame=1,
        detail="-1 attempts are charged",
    ),
}

SINGLE_WINNER: dict[str, Damage] = {
    "a winner that had failed": Damage(
        "succeeded",
        "INSERT INTO attempts SELECT job_id, ordinal, attempt, worker, 'x', '', '',"
        " started_at FROM frames WHERE job_id = :id AND ordinal = 0",
        frame=0,
        detail="recorded as failed",
    ),
    "two winners in the events": Damage(
        "succeeded",
        "INSERT INTO events (job_id, tenant_id, kind, data)"
        " SELECT job_id, tenant_id, kind, '{\"frames\": [[1, 1]]}' FROM events"
        " WHERE job_id = :id AND kind = 'frames.succeeded'",
        frame=1,
        detail="attempt 1, 1 succeeded",
    ),
    "another winner in the events than in the row": Damage(
        "succeeded",
        "UPDATE frames SET attempt = 2 WHERE job_id = :id AND ordinal = 1; "
        "INSERT INTO attempts SELECT job_id, ordinal, 1, worker, 'x', '', '', started_at"
        " FROM frames WHERE job_id = :id AND ordinal = 1",
        frame=1,
        detail="attempt 1 succeeded, but the frame is succeeded at attempt 2",
    ),
    "a winner in the events for a frame that failed": Damage(
        "partial",
        "INSERT INTO events (job_id, tenant_id, kind, data)"
        " SELECT id, tenant_id, 'frames.succeeded', '{\"frames\": [[1, 1]]}' FROM jobs"
        " WHERE id = :id",
        frame=1,
        detail="the frame is dead at attempt 1",
    ),
}

ARTIFACT_TRUTH: dict[str, Damage] = {
    "another length than the stored image's": Damage(
        "succeeded",
        "UPDATE frames SET bytes = bytes + 1 WHERE job_id = :id AND ordinal = 0",
        frame=0,
        detail="are stored, not",
    ),
    "an image that is not there": Damage(
        "succeeded",
        "UPDATE frames SET sha256 = '\\x" + "ab" * 32 + "' WHERE job_id = :id AND ordinal = 1",
        frame=1,
        detail="not stored",
    ),
}

DAMAGES: dict[Invariant, dict[str, Damage]] = {
    Invariant.DURABILITY: DURABILITY,
    Invariant.CONSERVATION: CONSERVATION,
    Invariant.LEDGER: LEDGER,
    Invariant.SINGLE_WINNER: SINGLE_WINNER,
    Invariant.ARTIFACT_TRUTH: ARTIFACT_TRUTH,
}
