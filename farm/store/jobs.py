"""Jobs: insert them with their prompts, and find those that were submitted before."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from psycopg.errors import ForeignKeyViolation
from pydantic_core import to_json
from sqlalchemy import Connection, text
from sqlalchemy.exc import IntegrityError

from farm.domain.keeping import too_long
from farm.domain.spec import FullSpec, Priority
from farm.errors import Conflict, FarmError, InvalidRequest, KeyReused, NotFound
from farm.store import arrays
from farm.store.job_webhooks import JobWebhook
from farm.store.limits import expected_seconds, lock_rooms
from farm.store.queries import JOB_COLUMNS, JobRow
from farm.store.rows import rows_of

PROMPTS_PER_CHUNK = 1000

# Inserts jobs, their prompts and their events. The lanes' rows are last: claims write them too.
# `given` is JSON, and not JSONB: the order of a spec's grid matters.
INSERT_JOBS = text(f"""
WITH unlimited AS MATERIALIZED (
    -- The lock waits for a change of limits in progress, and then sees the new ones.
    SELECT t.* FROM unnest(CAST(:tenants AS uuid[])) AS w (id) CROSS JOIN LATERAL (
        SELECT t.id, t.max_keep_for FROM tenants t WHERE t.id = w.id
          AND num_nonnulls(t.priorities, t.max_open_jobs, t.max_waiting_frames,
                           t.device_seconds_a_month) = 0
        LIMIT 1 FOR KEY SHARE
    ) t
), j AS (
    INSERT INTO jobs (id, tenant_id, pipeline, priority, open, total, run_end, batch_key, bucket,
                      runs, max_attempts, spec, labels, input_id, idempotency_key,
                      idempotency_digest, created_at, due_at, stretch, keep_for)
    SELECT id, tenant_id, pipeline, priority, true, total, run_end, batch_key, bucket, runs,
           max_attempts, spec, labels, input_id, idempotency_key, decode(idempotency_digest, 'hex'),
           statement_timestamp() + place * interval '1 microsecond',
           least(statement_timestamp() + due_seconds * interval '1 second', due_at), stretch,
           coalesce(keep_for, (
               SELECT coalesce(t.keep_for, CASE
                   WHEN (g.retention_seconds <= t.max_keep_for) IS NOT TRUE THEN t.max_keep_for END)
               FROM tenants t WHERE t.id = g.tenant_id))
    FROM json_to_recordset(CAST(:given AS json)) AS g (
        id uuid, tenant_id uuid, pipeline text, priority smallint, total bigint, run_end bigint,
        batch_key text, bucket smallint, runs jsonb, max_attempts smallint, spec json, labels jsonb,
        input_id uuid, idempotency_key text, idempotency_digest text, place int,
        due_seconds float, due_at timestamptz, stretch bigint, keep_for int,
        retention_seconds float)
    WHERE (:counted OR EXISTS (
               SELECT FROM unlimited u
               WHERE u.id = g.tenant_id AND g.keep_for <= u.max_keep_for IS NOT FALSE))
      AND (  -- of a removed job; not EXISTS, which could change the order of the jobs
               SELECT k.job_id FROM used_keys k WHERE k.tenant_id = g.tenant_id
                 AND k.idempotency_key = g.idempotency_key AND k.ends_at > statement_timestamp()
          ) IS NULL
    ON CONFLICT (tenant_id, idempotency_key) DO NOTHING
    RETURNING *
), chunk AS (
    INSERT INTO job_prompts (job_id, first, prompts)
    SELECT j.id, min(p.n) - 1, array_agg(p.prompt ORDER BY p.n)
    FROM json_to_recordset(CAST(:given AS json)) AS g (id uuid, prompts json)
    JOIN j ON j.id = g.id
    CROSS JOIN json_array_elements_text(g.prompts) WITH ORDINALITY AS p (prompt, n)
    GROUP BY j.id, (p.n - 1) / {PROMPTS_PER_CHUNK}
), grouped AS (
    INSERT INTO job_groups (job_id, first, stop, run)
    SELECT j.id, n.first, n.stop, n.run
    FROM json_to_recordset(CAST(:given AS json)) AS g (id uuid, groups json)
    JOIN j ON j.id = g.id
    CROSS JOIN json_to_recordset(g.groups) AS n (first bigint, stop bigint, run smallint)
), placed AS (
    INSERT INTO job_order (job_id, first, images, places)
    SELECT j.id, c.first, c.images, c.places
    FROM json_to_recordset(CAST(:given AS json)) AS g (id uuid, chunks json)
    JOIN j ON j.id = g.id
    CROSS JOIN json_to_recordset(g.chunks) AS c (first bigint, images bigint, places int[])
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

# Of a removed job, its row or `used_keys` has the key. The LIMITs make it one probe for each.
BY_IDEMPOTENCY = text(f"""
SELECT k.key, coalesce(j.idempotency_digest, u.digest), coalesce(j.id, u.job_id),
       j.id IS NULL OR j.removed_at IS NOT NULL AS is_removed, {JOB_COLUMNS}
FROM unnest(CAST(:keys AS text[])) AS k (key)
LEFT JOIN LATERAL (
    SELECT * FROM jobs j WHERE j.tenant_id = :tenant_id AND j.idempotency_key = k.key LIMIT 1
) j ON true
LEFT JOIN LATERAL (
    SELECT u.digest, u.job_id FROM used_keys u
    WHERE u.tenant_id = :tenant_id AND u.idempotency_key = k.key
      AND u.ends_at > statement_timestamp() LIMIT 1
) u ON j.id IS NULL
WHERE j.id IS NOT NULL OR u.job_id IS NOT NULL
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
    retention_seconds: float | None = None
    """Time after the end for which the farm keeps a job that does not say. None: no end."""
    id: uuid.UUID = field(default_factory=uuid.uuid4)

    def given(self, place: int) -> dict[str, object]:
        """Return its values for INSERT_JOBS, for pydantic to serialize."""
        run_end, batch_key, bucket = self.spec.runs[0]
        order = self.spec.order
        if order is not None:
            _, batch_key, bucket = self.spec.runs[order.groups[0].run]
            run_end = order.groups[0].stop
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
            "keep_for": self.spec.keep_for,
            "retention_seconds": self.retention_seconds,
            "spec": self.spec.stored(),
            "stretch": order and order.stretch,
            "groups": [asdict(each) for each in order.groups] if order else [],
            "chunks": [
                {"first": first, "images": order.images, "places": places.tolist()}
                for first, places in order.chunks()
            ]
            if order
            else [],
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
        refusal = room and (
            too_long(job.spec.keep_for, room.max_keep_for)
            or room.take(priority, job.spec.total, seconds.get(job))
        )
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
        The job's row; or KeyReused, if that job had another body; or Conflict, if it was removed.
        A key without a job is left out.
    """
    if not keys:
        return {}
    values = {"tenant_id": tenant_id, "keys": list({each.key for each in keys})}
    stored: dict[str, tuple[bytes, uuid.UUID, JobRow | None]] = {
        key: (digest, job_id, None if is_removed else JobRow(*columns))
        for key, digest, job_id, is_removed, *columns in connection.execute(BY_IDEMPOTENCY, values)
    }
    return {each: _same_or_refused(each, *stored[each.key]) for each in keys if each.key in stored}


def _same_or_refused(
    sent: Idempotency, digest: bytes, job_id: uuid.UUID, row: JobRow | None
) -> JobRow | FarmError:
    name = "Idempotency-Key"
    if digest != sent.digest:
        return KeyReused(
            f"{name}: {sent.key!r} was used for job {job_id} with another body. "
            "Send the same body, or a new key.",
            param=name,
        )
    return row or Conflict(
        f"{name}: {sent.key!r} was used for job {job_id}, which is removed. "
        "Send a new key to render it again.",
        param=name,
    )
