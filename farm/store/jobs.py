"""Jobs: insert, and the owner's commands: pause, resume, cancel, retry."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from psycopg.errors import ForeignKeyViolation
from pydantic_core import to_json
from sqlalchemy import Connection, text
from sqlalchemy.exc import IntegrityError

from farm.domain.deadlines import deadlines_of
from farm.domain.spec import FullSpec, Priority
from farm.domain.states import FRAME_TRANSITIONS, JOB_TRANSITIONS, TERMINAL, FrameState, JobStatus
from farm.errors import Conflict, FarmError, InvalidRequest, KeyReused, NotFound
from farm.store import arrays
from farm.store.job_webhooks import JobWebhook
from farm.store.limits import expected_seconds, lock_rooms
from farm.store.queries import JOB_COLUMNS, JobRow
from farm.store.requeue import INTO_REQUEUED
from farm.store.rows import row_of, rows_of
from farm.store.tally import Delta, tally

CANCELLED, LATE = "cancelled", "late"
"""Reasons of the attempts that a cancelled job ends: by its owner, or by a deadline."""
PROMPTS_PER_CHUNK = 1000
RETRY_SLICE = 5000
JOBS_PER_FOLLOW = 100
"""Jobs that one call of `follow` handles at most."""
LATE_JOBS = 200
"""Late jobs that one call of `cancel_late_jobs` handles at most."""

# Inserts jobs, their prompts and their events. The lanes' rows are last: claims write them too.
# `given` is JSON, and not JSONB: the order of a spec's grid matters.
INSERT_JOBS = text(f"""
WITH unlimited AS MATERIALIZED (
    -- The lock waits for a change of limits in progress, and then sees the new ones.
    SELECT t.id FROM unnest(CAST(:tenants AS uuid[])) AS w (id) CROSS JOIN LATERAL (
        SELECT t.id FROM tenants t WHERE t.id = w.id
          AND num_nonnulls(t.priorities, t.max_open_jobs, t.max_waiting_frames,
                           t.device_seconds_a_month) = 0
        LIMIT 1 FOR KEY SHARE
    ) t
), j AS (
    INSERT INTO jobs (id, tenant_id, pipeline, priority, open, total, run_end, batch_key, bucket,
                      runs, max_attempts, spec, labels, input_id, idempotency_key,
                      idempotency_digest, created_at, due_at)
    SELECT id, tenant_id, pipeline, priority, true, total, run_end, batch_key, bucket, runs,
           max_attempts, spec, labels, input_id, idempotency_key, decode(idempotency_digest, 'hex'),
           statement_timestamp() + place * interval '1 microsecond',
           least(statement_timestamp() + due_seconds * interval '1 second', due_at)
    FROM json_to_recordset(CAST(:given AS json)) AS g (
        id uuid, tenant_id uuid, pipeline text, priority smallint, total bigint, run_end bigint,
        batch_key text, bucket smallint, runs jsonb, max_attempts smallint, spec json, labels jsonb,
        input_id uuid, idempotency_key text, idempotency_digest text, place int,
        due_seconds float, due_at timestamptz)
    WHERE :counted OR g.tenant_id IN (SELECT id FROM unlimited)
    ON CONFLICT (tenant_id, idempotency_key) DO NOTHING
    RETURNING *
), chunk AS (
    INSERT INTO job_prompts (job_id, first, prompts)
    SELECT j.id, min(p.n) - 1, array_agg(p.prompt ORDER BY p.n)
    FROM json_to_recordset(CAST(:given AS json)) AS g (id uuid, prompts json)
    JOIN j ON j.id = g.id
    CROSS JOIN json_array_elements_text(g.prompts) WITH ORDINALITY AS p (prompt, n)
    GROUP BY j.id, (p.n - 1) / {PROMPTS_PER_CHUNK}
), hook AS (
    INSERT INTO job_webhooks (job_id, webhook_id, url, kinds)
    SELECT j.id, h.webhook_id, h.url, h.kinds
    FROM json_to_recordset(CAST(:given AS json)) AS g (id uuid, webhook json)
    JOIN j ON j.id = g.id
    CROSS JOIN json_to_record(g.webhook) AS h (webhook_id uuid, url text, kinds text[])
    WHERE json_typeof(g.webhook) = 'object'
), event AS (
    INSERT INTO events (job_id, tenant_id, kind, data)
    SELECT id, tenant_id, 'job.queued', '{{}}' FROM j
), lane AS (
    -- Triggers count what waits, and decide with which share a tenant joins: migrations 21 and 23.
    INSERT INTO shares (pipeline, tenant_id, priority, retry_at)
    SELECT DISTINCT pipeline, tenant_id, NULL::smallint, NULL::timestamptz FROM j ORDER BY 1, 2
    ON CONFLICT (pipeline, tenant_id) DO NOTHING
)
SELECT {JOB_COLUMNS} FROM j
""")  # noqa: S608 - constants only

INSERT_EVENT = text("""
INSERT INTO events (job_id, tenant_id, kind, data)
SELECT id, tenant_id, :kind, CAST(:data AS jsonb) FROM jobs WHERE id = :job_id
""")

BY_IDEMPOTENCY = text(f"""
SELECT j.idempotency_key, j.idempotency_digest, j.removed_at, {JOB_COLUMNS} FROM jobs j
WHERE j.tenant_id = :tenant_id AND j.idempotency_key = ANY(:keys)
""")  # noqa: S608 - constants only


@dataclass(frozen=True)
class Idempotency:
    """Values by which a repeated submission is recognized."""

    key: str
    digest: bytes
    """SHA-256 of the request's body in canonical form."""


@dataclass(frozen=True, eq=False)
class NewJob:
    """A job that passed every check, before it is stored."""

    tenant_id: uuid.UUID
    spec: FullSpec
    prompts: Sequence[str]
    idempotency: Idempotency | None = None
    webhook: JobWebhook | None = None
    id: uuid.UUID = field(default_factory=uuid.uuid4)

    def given(self, place: int) -> dict[str, object]:
        """Return its values for INSERT_JOBS, for pydantic to serialize."""
        run_end, batch_key, bucket = self.spec.runs[0]
        due = self.spec.start_within, self.spec.finish_by  # times are all in UTC, in one form
        return {
            "id": self.id,
            "tenant_id": self.tenant_id,
            "pipeline": self.spec.pipeline,
            "priority": Priority.parse(self.spec.priority),
            "total": self.spec.total,
            "run_end": run_end,
            "batch_key": batch_key,
            "bucket": bucket,
            "runs": self.spec.runs,
            "max_attempts": self.spec.max_attempts,
            "labels": self.spec.labels,
            "input_id": self.spec.input,
            "idempotency_key": self.idempotency.key if self.idempotency else None,
            "idempotency_digest": self.idempotency.digest.hex() if self.idempotency else None,
            "webhook": self.webhook._asdict() if self.webhook else None,
            "prompts": self.prompts,
            "place": place,
            "due_seconds": min((each for each in due if isinstance(each, float)), default=None),
            "due_at": min((each for each in due if isinstance(each, str)), default=None),
            "spec": self.spec.stored(),
        }


def insert_jobs(
    connection: Connection, jobs: Sequence[NewJob], *, counted: bool = False
) -> list[JobRow | FarmError | None]:
    """Insert jobs with their prompts. This is one statement, and another for repeated keys.

    Every group takes its locks in the same order. Each job is a microsecond younger than the one
    before it, so they are claimed in the order of `jobs`.

    Args:
        connection: with autocommit, or in a transaction.
        jobs: the jobs.
        counted: True if the limits of their tenants allow them.

    Returns:
        For each job its row, or that of the same job submitted before; or KeyReused, if its
        idempotency key was used with another body. None: it is not stored, because its tenant has
        limits, or because the job with its key has just been removed.

    Raises:
        InvalidRequest: an input was deleted before the insert. Nothing is inserted.
    """
    values = {
        "given": "[" + ",".join(_given_in_lock_order(jobs)) + "]",
        "tenants": arrays.ids(sorted({job.tenant_id for job in jobs})),
        "counted": counted,
    }
    try:
        rows = rows_of(connection.execute(INSERT_JOBS, values), JobRow)
    except IntegrityError as error:
        named = [str(job.spec.input) for job in jobs if job.spec.input is not None]
        if not named or not isinstance(error.orig, ForeignKeyViolation):
            raise
        raise InvalidRequest(
            f"input: {', '.join(named)} has just been deleted. Upload it again.", param="input"
        ) from error
    inserted = {row.id: row for row in rows}
    same = _same_of_tenants(connection, [job for job in jobs if job.id not in inserted])
    return [inserted.get(job.id) or same.get(job.id) for job in jobs]


def insert_counted_jobs(connection: Connection, jobs: Sequence[NewJob]) -> list[JobRow | FarmError]:
    """Insert those jobs that the limits of their tenants allow, in the order of `jobs`.

    Returns:
        As insert_jobs does; and for a job beyond a limit, the refusal that names it. A repeated
        idempotency key gets its job also then.
    """
    rooms = lock_rooms(connection, {job.tenant_id for job in jobs})
    with_budget = [job for job in jobs if (room := rooms.get(job.tenant_id)) and room.has_budget]
    runs = [(job.spec.pipeline, job.spec.runs) for job in with_budget]
    seconds = dict(zip(with_budget, expected_seconds(connection, runs), strict=True))
    answers: dict[uuid.UUID, JobRow | FarmError | None] = {}
    answers |= _same_of_tenants(connection, jobs)
    counted: set[tuple[uuid.UUID, str]] = set()
    for job in jobs:
        key = (job.tenant_id, job.idempotency.key) if job.idempotency else None
        if job.id in answers or key in counted:  # it is stored, or will be for an earlier one
            continue
        room = rooms.get(job.tenant_id)
        priority = Priority.parse(job.spec.priority)
        refusal = room and room.take(priority, job.spec.total, seconds.get(job))
        if refusal:
            answers[job.id] = refusal
        elif key:
            counted.add(key)
    allowed = [job for job in jobs if job.id not in answers]
    if allowed:
        rows = insert_jobs(connection, allowed, counted=True)
        answers |= zip([job.id for job in allowed], rows, strict=True)
    gone = NotFound("The job with this idempotency key has just been removed. Submit it again.")
    return [answers[job.id] or gone for job in jobs]


def _given_in_lock_order(jobs: Sequence[NewJob]) -> list[str]:
    """Return the JSON of each job. Groups of several processes must not wait for each other."""

    def order(placed: tuple[int, NewJob]) -> tuple[str, str, str]:
        job = placed[1]
        key = job.idempotency.key if job.idempotency else ""
        return job.spec.pipeline, str(job.tenant_id), key

    placed = sorted(enumerate(jobs), key=order)
    return [to_json(job.given(place)).decode() for place, job in placed]


def _same_of_tenants(
    connection: Connection, jobs: Sequence[NewJob]
) -> dict[uuid.UUID, JobRow | FarmError]:
    """Find the jobs that were stored before under the same keys, by the ids of these jobs."""
    found: dict[uuid.UUID, JobRow | FarmError] = {}
    for tenant_id in {job.tenant_id for job in jobs}:
        own = {job.id: job.idempotency for job in jobs if job.tenant_id == tenant_id}
        keys = [each for each in own.values() if each is not None]
        same = same_jobs(connection, tenant_id, keys)
        found |= {
            job_id: same[each] for job_id, each in own.items() if each is not None and each in same
        }
    return found


def same_jobs(
    connection: Connection, tenant_id: uuid.UUID, keys: Sequence[Idempotency]
) -> dict[Idempotency, JobRow | FarmError]:
    """Find the jobs that a tenant submitted before under the same idempotency keys.

    Returns:
        The job's row; or KeyReused, if that job had another body; or NotFound, if it was removed.
        A key without a job is left out.
    """
    if not keys:
        return {}
    values = {"tenant_id": tenant_id, "keys": list({each.key for each in keys})}
    stored = {
        key: (digest, removed_at, JobRow(*row))
        for key, digest, removed_at, *row in connection.execute(BY_IDEMPOTENCY, values)
    }
    return {each: _same_or_refused(each, *stored[each.key]) for each in keys if each.key in stored}


def _same_or_refused(
    sent: Idempotency, digest: bytes, removed_at: datetime | None, row: JobRow
) -> JobRow | FarmError:
    if digest != sent.digest:
        return KeyReused(
            f"Idempotency-Key: {sent.key!r} was used for job {row.id} with another body. "
            "Send the same body, or a new key.",
            param="Idempotency-Key",
        )
    return row if removed_at is None else NotFound(f"There is no job {row.id}.")


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

RETRY_FRAMES = text(f"""
WITH chosen AS (
    SELECT ordinal FROM frames WHERE job_id = :id AND state = ANY(:from_states)
    ORDER BY ordinal LIMIT :slice
), requeued AS (
    UPDATE frames f SET state = 'ready', uncharged = attempt, isolated = false,
                        rerolls = f.rerolls + (f.rerolls > 0)::int  -- another seed
    FROM chosen c WHERE f.job_id = :id AND f.ordinal = c.ordinal
    RETURNING f.job_id, f.ordinal, 0.0 AS delay, false AS isolated
)
{INTO_REQUEUED}""")  # noqa: S608 - constants only

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
    job = _lock(connection, tenant_id, job_id)
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
    job = _lock(connection, tenant_id, job_id)
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
        job = _lock(connection, tenant_id, job_id)
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
    connection: Connection, tenant_id: uuid.UUID, job_id: uuid.UUID, *, whole: bool = True
) -> int:
    """Requeue the first RETRY_SLICE dead frames of a job with fresh attempts. Return the number.

    One transaction writes one slice, so that claims do not wait long for the job's row. `whole`:
    refuse unless the tenant's limits allow all dead frames, and not only the slice.

    Raises:
        Conflict: the job was cancelled, or has no dead frames.
        LimitExceeded: its frames would be more than its tenant may have.
    """
    room = lock_rooms(connection, [tenant_id]).get(tenant_id)  # before jobs, as submissions do
    job = _lock(connection, tenant_id, job_id)
    if job.status == JobStatus.CANCELLED or job.dead == 0:
        raise Conflict(
            f"Job {job_id} cannot be retried: its status is {job.status}, "
            f"and it has {job.dead} dead frames."
        )
    was_open = job.status not in TERMINAL
    more = job.dead if whole else min(job.dead, RETRY_SLICE)
    seconds: float | None = None
    if room and room.has_budget:
        values = {"id": job_id, "frames": more}
        seconds = connection.execute(EXPECTED_OF_FRAMES, values).scalar_one()
    refusal = room and room.take(Priority(job.priority), more, seconds, jobs=0 if was_open else 1)
    if refusal:
        raise refusal
    frames: int = connection.execute(
        RETRY_FRAMES, {"id": job_id, "from_states": _from_states("retry"), "slice": RETRY_SLICE}
    ).rowcount
    connection.execute(RETRY_JOB, {"id": job_id, "from_states": list(JOB_TRANSITIONS["retry"])})
    tally(connection, "frames.retried", {job_id: Delta(dead=-frames, data={"count": frames})})
    if job.status in JOB_TRANSITIONS["retry"]:
        _append(connection, job_id, "job.running")
    return frames


def _from_states(transition: str) -> list[FrameState]:
    return list(FRAME_TRANSITIONS[transition])


def _lock(connection: Connection, tenant_id: uuid.UUID, job_id: uuid.UUID) -> JobRow:
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
