"""Commands on a stored job: pause, resume, cancel, retry, change; and its deadlines."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import NamedTuple

from sqlalchemy import Connection, text

from farm.domain.deadlines import deadlines_of
from farm.domain.spec import MAX_LABELS, Priority
from farm.domain.states import FRAME_TRANSITIONS, JOB_TRANSITIONS, TERMINAL, FrameState, JobStatus
from farm.errors import Conflict, InvalidRequest, NotFound
from farm.store.limits import lock_rooms
from farm.store.queries import JOB_COLUMNS, JobRow
from farm.store.requeue import INTO_REQUEUED
from farm.store.rows import row_of
from farm.store.tally import Delta, tally

CANCELLED, LATE = "cancelled", "late"
"""Reasons of the attempts that a cancelled job ends: by its owner, or by a deadline."""
RETRY_SLICE = 5000
JOBS_PER_FOLLOW = 100
"""Jobs that one call of `follow` handles at most."""
LATE_JOBS = 200
"""Late jobs that one call of `cancel_late_jobs` handles at most."""

INSERT_EVENT = text("""
INSERT INTO events (job_id, tenant_id, kind, data)
SELECT id, tenant_id, :kind, CAST(:data AS jsonb) FROM jobs WHERE id = :job_id
""")


class Retried(NamedTuple):
    """Dead frames that were requeued."""

    pipeline: str
    frames: int
    """Number of this slice."""
    dead: int
    """Number of those that were chosen before, with this slice."""


LOCK_JOB = text(f"""
SELECT {JOB_COLUMNS} FROM jobs j
WHERE j.id = :id AND j.tenant_id = :tenant_id AND j.removed_at IS NULL FOR UPDATE
""")  # noqa: S608 - constants only

# The pace before a pause or an end says nothing of the pace after it.
RESET_PACE = "pace_since = NULL, pace_next = NULL"

# Requeued frames are updated later, in slices: see `follow`. Each pause, resume or cancel sets
# another number below 0, so that a slice in progress notices the change.
FALLS_BEHIND = """
behind_from = CASE WHEN EXISTS (SELECT FROM requeued_frames WHERE job_id = jobs.id)
              THEN least(coalesce(behind_from, 0), 0) - 1 END
"""

SET_PAUSED = text(f"""
UPDATE jobs SET paused = :paused, open = cursor < total AND NOT :paused,
    {RESET_PACE}, {FALLS_BEHIND}
WHERE id = :id
""")  # noqa: S608 - constants only

CANCEL_FRAMES = text("""
WITH held AS (
    SELECT d.ordinal FROM leases l, unnest(l.job_ids, l.ordinals) AS d (job_id, ordinal)
    WHERE l.pipeline = :pipeline AND d.job_id = :id
), cancelled AS (
    UPDATE frames f SET state = 'cancelled', finished_at = clock_timestamp(),
                        error = :message
    WHERE f.job_id = :id AND f.ordinal IN (SELECT ordinal FROM held) AND f.state = 'running'
    RETURNING f.*
)
INSERT INTO attempts (job_id, ordinal, attempt, worker, reason, message, started_at)
SELECT job_id, ordinal, attempt, worker, :reason, :message, started_at
FROM cancelled
""")

CANCEL_JOB = text(f"""
UPDATE jobs SET status = 'cancelled', open = false, paused = false, running = 0,
                cancelled = total - succeeded - dead, finished_at = clock_timestamp(),
                missed = :missed, due_at = NULL,
                {FALLS_BEHIND}
WHERE id = :id
""")  # noqa: S608 - constants only

# One job of each tenant, then another of each: none waits for the many of another.
DUE = text("""
WITH RECURSIVE with_deadlines AS (
    (SELECT tenant_id AS id FROM jobs WHERE due_at IS NOT NULL ORDER BY tenant_id LIMIT 1)
    UNION ALL
    SELECT (SELECT tenant_id FROM jobs WHERE due_at IS NOT NULL AND tenant_id > t.id
            ORDER BY tenant_id LIMIT 1)
    FROM with_deadlines t WHERE t.id IS NOT NULL
)
SELECT due.id, t.id AS tenant_id FROM with_deadlines t CROSS JOIN LATERAL (
    SELECT id, due_at, row_number() OVER (ORDER BY due_at) AS turn FROM (
        SELECT id, due_at FROM jobs
        WHERE tenant_id = t.id AND due_at <= now() AND removed_at IS NULL
        ORDER BY due_at LIMIT :limit
    ) oldest
) due
ORDER BY due.turn, due.due_at LIMIT :limit
""")

SET_DUE = text("UPDATE jobs SET due_at = :due_at WHERE id = :id")

# The job's shards are whole now.
EXPORT_NEWS = text("""
INSERT INTO export_news (job_id)
SELECT :id WHERE EXISTS (SELECT FROM export_shards WHERE job_id = :id AND whole IS NOT TRUE)
""")

BEHIND = text("""
SELECT id, status, paused, behind_from FROM jobs
WHERE behind_from IS NOT NULL AND removed_at IS NULL ORDER BY id LIMIT :limit
""")

SLICE = """
SELECT ordinal FROM requeued_frames WHERE job_id = :id AND ordinal >= :behind_from
ORDER BY ordinal LIMIT :slice
"""

CANCEL_SLICE = text(f"""
WITH slice AS MATERIALIZED ({SLICE}), gone AS (
    DELETE FROM requeued_frames r USING slice s WHERE r.job_id = :id AND r.ordinal = s.ordinal
), cancelled AS (
    UPDATE frames f SET state = 'cancelled', finished_at = clock_timestamp(),
                        error = 'The job was cancelled.'
    FROM slice s WHERE f.job_id = :id AND f.ordinal = s.ordinal AND f.state = ANY(:from_states)
)
SELECT count(*) AS rows, max(ordinal) AS last FROM slice
""")  # noqa: S608 - constants only

PAUSE_SLICE = text(f"""
WITH slice AS MATERIALIZED ({SLICE}), told AS (
    UPDATE requeued_frames r SET paused = :paused FROM slice s
    WHERE r.job_id = :id AND r.ordinal = s.ordinal AND r.paused <> :paused
)
SELECT count(*) AS rows, max(ordinal) AS last FROM slice
""")  # noqa: S608 - constants only

# No update after another pause, resume or cancel: then all frames of the job are behind again.
FOLLOWED = text("""
UPDATE jobs SET behind_from = :next
WHERE id = :id AND behind_from = :behind_from AND paused = :paused AND status = :status
""")

# Each frame is taken to cost as much as the mean of its job.
EXPECTED_OF_FRAMES = text("""
SELECT (remaining_cost(runs, 0) / total)::float * :frames * pg_temp.seconds_per_cost(pipeline)
FROM jobs WHERE id = :id
""")

OF_CAUSE = """ AND EXISTS (
    SELECT FROM attempts a WHERE a.job_id = f.job_id AND a.ordinal = f.ordinal
      AND a.attempt = f.attempt AND a.reason = coalesce(CAST(:reason AS text), a.reason)
      AND (CAST(:fault AS text) IS NULL OR a.fault = :fault))
"""
"""Condition of a frame whose last attempt failed for a reason, or had a fault."""

COUNT_DEAD = text(f"""
SELECT count(*) FROM frames f WHERE job_id = :id AND state = ANY(:from_states) {OF_CAUSE}
""")  # noqa: S608 - constants only

RETRY_FRAMES = """
WITH chosen AS (
    SELECT ordinal FROM frames f WHERE job_id = :id AND state = ANY(:from_states) {}
    ORDER BY ordinal LIMIT :slice
), requeued AS (
    UPDATE frames f SET state = 'ready', uncharged = attempt, isolated = false,
                        rerolls = f.rerolls + (f.rerolls > 0)::int  -- another seed
    FROM chosen c WHERE f.job_id = :id AND f.ordinal = c.ordinal
    RETURNING f.job_id, f.ordinal, 0.0 AS delay, false AS isolated
)
"""
RETRY_ALL = text(RETRY_FRAMES.format("") + INTO_REQUEUED)
RETRY_OF_CAUSE = text(RETRY_FRAMES.format(OF_CAUSE) + INTO_REQUEUED)

RETRY_JOB = text(f"""
UPDATE jobs SET status = 'running', finished_at = NULL, {RESET_PACE}
WHERE id = :id AND status = ANY(:from_states)
""")  # noqa: S608 - constants only


def pause_job(connection: Connection, tenant_id: uuid.UUID, job_id: uuid.UUID) -> bool:
    """Pause a job: running frames are finished, and no more are claimed.

    This writes only the job's row, for a job of any size: see follow. Return False if it is paused.
    """
    return _set_paused(connection, tenant_id, job_id, "job.paused", paused=True)


def resume_job(connection: Connection, tenant_id: uuid.UUID, job_id: uuid.UUID) -> bool:
    """Resume a paused job, so that its frames are claimed again. Return False if it was not."""
    return _set_paused(connection, tenant_id, job_id, "job.resumed", paused=False)


def _set_paused(
    connection: Connection, tenant_id: uuid.UUID, job_id: uuid.UUID, kind: str, *, paused: bool
) -> bool:
    job = lock_job(connection, tenant_id, job_id)
    _refuse_terminal(job, kind.removeprefix("job."))
    if job.paused == paused:
        return False
    connection.execute(SET_PAUSED, {"id": job_id, "paused": paused})
    _append(connection, job_id, kind)
    return True


def cancel_job(connection: Connection, tenant_id: uuid.UUID, job_id: uuid.UUID) -> bool:
    """Cancel a job for good: after the commit, no frame of it becomes succeeded.

    The cost grows with the running frames only, not with the job's size. Requeued frames are
    updated later: see follow. A second cancel changes nothing: it returns False.
    """
    job = lock_job(connection, tenant_id, job_id)
    if job.status == JobStatus.CANCELLED:
        return False
    if job.status not in JOB_TRANSITIONS["cancel"]:
        _refuse_terminal(job, "cancelled")
    _cancel(connection, job, "The job was cancelled.")
    return True


def _cancel(connection: Connection, job: JobRow, message: str, missed: str | None = None) -> None:
    """Cancel a locked job. `missed`: the field whose deadline it has missed."""
    about = {"reason": LATE if missed else CANCELLED, "message": message}
    where = {"id": job.id, "pipeline": job.pipeline}
    connection.execute(CANCEL_FRAMES, {**where, **about})
    connection.execute(CANCEL_JOB, {"id": job.id, "missed": missed})
    connection.execute(EXPORT_NEWS, {"id": job.id})
    _append(connection, job.id, "job.cancelled", {"reason": missed} if missed else {})


def cancel_late_jobs(connection: Connection) -> list[tuple[uuid.UUID, str]]:
    """Cancel jobs that have missed a deadline. Return them, with the field of the deadline.

    Args:
        connection: in no transaction. Each job has its own.
    """
    with connection.begin():
        due = connection.execute(DUE, {"limit": LATE_JOBS}).all()
    late = []
    for job_id, tenant_id in due:
        with connection.begin():
            missed = _cancel_if_late(connection, tenant_id, job_id)
        if missed is not None:
            late.append((job_id, missed))
    return late


def _cancel_if_late(connection: Connection, tenant_id: uuid.UUID, job_id: uuid.UUID) -> str | None:
    try:
        job = lock_job(connection, tenant_id, job_id)
    except NotFound:  # it was removed a moment ago
        return None
    deadlines = deadlines_of(job.spec, job.created_at)
    missed = deadlines.missed(job.now, started=job.started_at is not None)
    if job.status not in TERMINAL and missed is not None:
        _cancel(connection, job, f"The job missed its deadline: {missed}.", missed)
        return missed
    # A job that has ended has no deadline any more, also if it is retried.
    next_at = None if job.status in TERMINAL else deadlines.next(job.now)
    connection.execute(SET_DUE, {"id": job_id, "due_at": next_at})
    return None


def follow(connection: Connection, rows: int) -> bool:
    """Update the requeued frames of jobs that were paused, resumed or cancelled.

    Until then a claim checks the job itself, so it takes no frame wrongly. Only one caller at a
    time: the leading janitor.

    Args:
        connection: in no transaction. Frames are written in one transaction and the job in the
            next, since everywhere else a job is locked before its frames.
        rows: frames to write, at most.

    Returns:
        True if more is left.
    """
    with connection.begin():
        jobs = connection.execute(BEHIND, {"limit": JOBS_PER_FOLLOW}).all()
    more = False
    share = max(1, rows // max(1, len(jobs)))  # a large job does not delay a small one
    for job in jobs:
        values = {**job._mapping, "slice": share, "from_states": _from_states("cancel")}
        with connection.begin():
            is_cancelled = job.status == JobStatus.CANCELLED
            slice_ = connection.execute(CANCEL_SLICE if is_cancelled else PAUSE_SLICE, values).one()
        is_over = slice_.rows < share
        with connection.begin():
            connection.execute(FOLLOWED, {**values, "next": None if is_over else slice_.last + 1})
        more |= not is_over
    return more or len(jobs) == JOBS_PER_FOLLOW


def retry_job(
    connection: Connection,
    tenant_id: uuid.UUID,
    job_id: uuid.UUID,
    *,
    whole: bool = True,
    reason: str | None = None,
    fault: str | None = None,
) -> Retried:
    """Requeue the first RETRY_SLICE dead frames of a job with fresh attempts.

    One transaction writes one slice, so that claims do not wait long for the job's row.

    Args:
        connection: in a transaction.
        tenant_id: the job's tenant.
        job_id: the job.
        whole: refuse unless the tenant's limits allow all these frames, and not only the slice.
        reason: only frames whose last attempt failed for this reason. None: any.
        fault: only frames whose last attempt had this fault. None: any.

    Raises:
        Conflict: the job was cancelled, or has no such frames.
        LimitExceeded: its frames would be more than its tenant may have.
    """
    room = lock_rooms(connection, [tenant_id]).get(tenant_id)  # before jobs, as submissions do
    job = lock_job(connection, tenant_id, job_id)
    if job.status == JobStatus.CANCELLED or job.dead == 0:
        raise Conflict(
            f"Job {job_id} cannot be retried: its status is {job.status}, "
            f"and it has {job.dead} dead frames."
        )
    chosen = {"id": job_id, "from_states": _from_states("retry"), "reason": reason, "fault": fault}
    dead, of_all = job.dead, reason is None and fault is None
    if not of_all:
        dead = connection.execute(COUNT_DEAD, chosen).scalar_one()
        if dead == 0:
            why = f"had the fault {fault}" if reason is None else f"failed for the reason {reason}"
            raise Conflict(f"Job {job_id} has no dead frame whose last attempt {why}.")
    was_open = job.status not in TERMINAL
    more = dead if whole else min(dead, RETRY_SLICE)
    seconds: float | None = None
    if room and room.has_budget:
        values = {"id": job_id, "frames": more}
        seconds = connection.execute(EXPECTED_OF_FRAMES, values).scalar_one()
    refusal = room and room.take(Priority(job.priority), more, seconds, jobs=0 if was_open else 1)
    if refusal:
        raise refusal
    statement = RETRY_ALL if of_all else RETRY_OF_CAUSE
    frames: int = connection.execute(statement, {**chosen, "slice": RETRY_SLICE}).rowcount
    connection.execute(RETRY_JOB, {"id": job_id, "from_states": list(JOB_TRANSITIONS["retry"])})
    tally(connection, "frames.retried", {job_id: Delta(dead=-frames, data={"count": frames})})
    if job.status in JOB_TRANSITIONS["retry"]:
        _append(connection, job_id, "job.running")
    return Retried(job.pipeline, frames, dead)


MOST_MOVED = 10_000
"""Requeued frames of a job whose priority is changed at most. It takes a fifth of a second."""

REQUEUED_OF_JOB = text("""
SELECT count(*) FROM (SELECT FROM requeued_frames WHERE job_id = :id LIMIT :limit) found
""")
# A trigger moves what waits in the tenant's share: migration 40.
SET_PRIORITY = text("UPDATE jobs SET priority = :priority WHERE id = :id")
SET_PRIORITY_OF_REQUEUED = text("""
UPDATE requeued_frames SET priority = :priority WHERE job_id = :id
""")
LOCK_REQUEUED_OF_JOB = text("""
SELECT FROM requeued_frames WHERE job_id = :id ORDER BY ordinal FOR UPDATE
""")
SET_LABELS = text("UPDATE jobs SET labels = CAST(:labels AS jsonb) WHERE id = :id")


def change_job(
    connection: Connection,
    tenant_id: uuid.UUID,
    job_id: uuid.UUID,
    *,
    priority: Priority | None = None,
    labels: Mapping[str, str | None] | None = None,
) -> JobRow:
    """Change a job's priority and labels. Return it as it was.

    Frames that run go on. A batch that is claimed from now on has the new priority.

    Args:
        connection: in a transaction.
        tenant_id: the job's tenant.
        job_id: the job.
        priority: the new priority. None: as it is.
        labels: labels to set. Those of None are taken off.

    Raises:
        NotFound: there is no such job, or it is another tenant's.
        Conflict: it has ended, and so has no use for a priority; or too many frames wait again.
        Forbidden: its tenant may not use this priority.
        InvalidRequest: it would have too many labels.
    """
    room = None
    if priority is not None:  # before jobs, as submissions do
        room = lock_rooms(connection, [tenant_id]).get(tenant_id)
    job = lock_job(connection, tenant_id, job_id)
    if priority not in (None, job.priority):
        assert priority is not None
        _refuse_terminal(job, "given another priority")
        if refusal := room and room.refusal(priority):
            raise refusal
        values = {"id": job_id, "priority": priority, "limit": MOST_MOVED + 1}
        if connection.execute(REQUEUED_OF_JOB, values).scalar_one() > MOST_MOVED:
            raise Conflict(
                f"Job {job_id} cannot be given another priority now: more than {MOST_MOVED} of its "
                "frames wait for another attempt."
            )
        # Frames before shares, which the triggers of both statements lock.
        connection.execute(LOCK_REQUEUED_OF_JOB, values)
        connection.execute(SET_PRIORITY_OF_REQUEUED, values)
        connection.execute(SET_PRIORITY, values)
    if labels:
        kept = {
            name: value for name, value in {**job.labels, **labels}.items() if value is not None
        }
        if len(kept) > MAX_LABELS:
            raise InvalidRequest(
                f"labels: job {job_id} would have {len(kept)}. The limit is {MAX_LABELS}.",
                param="labels",
            )
        connection.execute(SET_LABELS, {"id": job_id, "labels": json.dumps(kept)})
    _append(connection, job_id, "job.changed")
    return job


def _from_states(transition: str) -> list[FrameState]:
    return list(FRAME_TRANSITIONS[transition])


def lock_job(connection: Connection, tenant_id: uuid.UUID, job_id: uuid.UUID) -> JobRow:
    """Lock a job's row, and read it.

    Raises:
        NotFound: there is no such job, or it is another tenant's.
    """
    values = {"id": job_id, "tenant_id": tenant_id}
    row = row_of(connection.execute(LOCK_JOB, values), JobRow)
    if row is None:
        raise NotFound(f"There is no job {job_id}.")
    return row


def _refuse_terminal(job: JobRow, wish: str) -> None:
    if job.status in TERMINAL:
        raise Conflict(f"Job {job.id} cannot be {wish}: it has ended as {job.status}.")


def _append(
    connection: Connection, job_id: uuid.UUID, kind: str, data: Mapping[str, str] | None = None
) -> None:
    values = {"job_id": job_id, "kind": kind, "data": json.dumps(data or {})}
    connection.execute(INSERT_EVENT, values)
