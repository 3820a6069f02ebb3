"""Jobs: written once, steered by their owner, read a page at a time."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, text

from farm.errors import Conflict, NotFound
from farm.spec import FullSpec, Priority
from farm.states import FRAME_TRANSITIONS, JOB_TRANSITIONS, TERMINAL, FrameState, JobStatus
from farm.store.tally import Delta, tally

PROMPTS_A_CHUNK = 1000

# A tenant that comes back to a lane has no credit from the time it asked for nothing.
JOIN_LANE = text("""
INSERT INTO shares (pipeline, tenant_id, served)
SELECT :pipeline, :tenant_id, coalesce(min(s.served), 0)
FROM shares s
WHERE s.pipeline = :pipeline AND EXISTS (
    SELECT FROM jobs j
    WHERE j.open AND j.pipeline = s.pipeline AND j.tenant_id = s.tenant_id AND j.id <> :job_id)
ON CONFLICT (pipeline, tenant_id) DO UPDATE
SET served = greatest(shares.served, excluded.served)
WHERE NOT EXISTS (
    SELECT FROM jobs j
    WHERE j.open AND j.pipeline = shares.pipeline AND j.tenant_id = shares.tenant_id
      AND j.id <> :job_id)
""")

INSERT_JOB = text("""
INSERT INTO jobs (id, tenant_id, pipeline, priority, open, total, run_end, batch_key, bucket, runs,
                  max_attempts, spec, labels, idempotency_key, idempotency_digest)
VALUES (:id, :tenant_id, :pipeline, :priority, true, :total, :run_end, :batch_key, :bucket,
        CAST(:runs AS jsonb), :max_attempts, CAST(:spec AS json), CAST(:labels AS jsonb),
        :idempotency_key, :idempotency_digest)
ON CONFLICT (tenant_id, idempotency_key) DO NOTHING
RETURNING id
""")

INSERT_CHUNK = text(
    "INSERT INTO input_chunks (job_id, first, prompts) VALUES (:job_id, :first, :prompts)"
)

INSERT_EVENT = text("""
INSERT INTO events (job_id, tenant_id, kind, data)
SELECT id, tenant_id, :kind, CAST(:data AS jsonb) FROM jobs WHERE id = :job_id
""")

BY_IDEMPOTENCY = text("""
SELECT id, idempotency_digest FROM jobs
WHERE tenant_id = :tenant_id AND idempotency_key = :idempotency_key
""")


@dataclass(frozen=True)
class Idempotency:
    """What makes a repeated submission the same one."""

    key: str
    digest: bytes
    """sha256 of the request's body in canonical form."""


def insert_job(
    connection: Connection,
    job_id: uuid.UUID,
    tenant_id: uuid.UUID,
    spec: FullSpec,
    prompts: Sequence[str],
    idempotency: Idempotency | None,
) -> uuid.UUID:
    """Store a job with its prompts; returns its id, or that of the same job submitted before.

    Raises:
        Conflict: the idempotency key was used with another body.
    """
    run_end, batch_key, bucket = spec.runs[0]
    inserted = connection.execute(
        INSERT_JOB,
        {
            "id": job_id,
            "tenant_id": tenant_id,
            "pipeline": spec.pipeline,
            "priority": Priority.parse(spec.priority),
            "total": spec.total,
            "run_end": run_end,
            "batch_key": batch_key,
            "bucket": bucket,
            "runs": _json(spec.runs),
            "max_attempts": spec.max_attempts,
            "spec": spec.model_dump_json(),
            "labels": _json(spec.labels),
            "idempotency_key": idempotency.key if idempotency else None,
            "idempotency_digest": idempotency.digest if idempotency else None,
        },
    ).first()
    if inserted is None:
        return _same_job(connection, tenant_id, idempotency)
    for first in range(0, len(prompts), PROMPTS_A_CHUNK):
        chunk = list(prompts[first : first + PROMPTS_A_CHUNK])
        connection.execute(INSERT_CHUNK, {"job_id": job_id, "first": first, "prompts": chunk})
    _append(connection, job_id, "job.queued")
    # Last, since it locks the row that claims of this lane write.
    _join_lane(connection, spec.pipeline, tenant_id, job_id)
    return job_id


def _same_job(
    connection: Connection, tenant_id: uuid.UUID, idempotency: Idempotency | None
) -> uuid.UUID:
    assert idempotency is not None, "only an idempotency key can collide"
    row = connection.execute(
        BY_IDEMPOTENCY, {"tenant_id": tenant_id, "idempotency_key": idempotency.key}
    ).one()
    if row.idempotency_digest != idempotency.digest:
        raise Conflict(
            f"Idempotency-Key {idempotency.key!r} was used for job {row.id} with another body.",
            param="Idempotency-Key",
        )
    found: uuid.UUID = row.id
    return found


JOB_COLUMNS = """
j.id, j.tenant_id, j.pipeline, j.status, j.paused, j.open, j.priority, j.total, j.cursor,
j.running, j.succeeded, j.dead, j.cancelled, j.spec, j.labels,
j.created_at, j.started_at, j.finished_at, clock_timestamp() AS now
"""

ONE_JOB = text(f"SELECT {JOB_COLUMNS} FROM jobs j WHERE j.id = :id AND j.tenant_id = :tenant_id")  # noqa: S608 - constants only

LOCK_JOB = text(f"""
SELECT {JOB_COLUMNS} FROM jobs j WHERE j.id = :id AND j.tenant_id = :tenant_id FOR UPDATE
""")  # noqa: S608 - constants only

LIST_JOBS = text(f"""
SELECT {JOB_COLUMNS} FROM jobs j
WHERE j.tenant_id = :tenant_id
  AND (CAST(:after AS uuid) IS NULL OR (j.created_at, j.id) <
       (SELECT a.created_at, a.id FROM jobs a WHERE a.id = :after AND a.tenant_id = :tenant_id))
  AND (CAST(:status AS text) IS NULL OR j.status = :status)
  AND (CAST(:pipeline AS text) IS NULL OR j.pipeline = :pipeline)
  AND j.labels @> CAST(:labels AS jsonb)
ORDER BY j.created_at DESC, j.id DESC LIMIT :limit
""")  # noqa: S608 - constants only


def get_job(connection: Connection, tenant_id: uuid.UUID, job_id: uuid.UUID) -> Row[Any]:
    """Read one job.

    Raises:
        NotFound: there is none, or it is another tenant's.
    """
    row = connection.execute(ONE_JOB, {"id": job_id, "tenant_id": tenant_id}).first()
    if row is None:
        raise NotFound(f"There is no job {job_id}.")
    return row


def list_jobs(
    connection: Connection,
    tenant_id: uuid.UUID,
    *,
    limit: int,
    after: uuid.UUID | None = None,
    status: str | None = None,
    pipeline: str | None = None,
    labels: dict[str, str] | None = None,
) -> Sequence[Row[Any]]:
    """Read a page of a tenant's jobs, newest first, from the one after `after` on."""
    return connection.execute(
        LIST_JOBS,
        {
            "tenant_id": tenant_id,
            "limit": limit,
            "after": after,
            "status": status,
            "pipeline": pipeline,
            "labels": _json(labels or {}),
        },
    ).all()


OWN_JOBS = text("SELECT id FROM jobs WHERE tenant_id = :tenant_id AND id = ANY(:ids)")


def own_jobs(
    connection: Connection, tenant_id: uuid.UUID, job_ids: Sequence[uuid.UUID]
) -> set[uuid.UUID]:
    """Tell which of some jobs are a tenant's."""
    rows = connection.execute(OWN_JOBS, {"tenant_id": tenant_id, "ids": list(job_ids)})
    return set(rows.scalars())


LIST_FRAMES = text("""
SELECT f.ordinal, f.state, f.attempt, f.worker, f.sha256, f.bytes, f.slot, f.error,
       f.started_at, f.finished_at
FROM frames f
WHERE f.job_id = :job_id AND f.ordinal > :after
  AND (CAST(:state AS text) IS NULL OR f.state = :state)
ORDER BY f.ordinal LIMIT :limit
""")

FRAME_ATTEMPTS = text("""
SELECT ordinal, attempt, worker, reason, message, started_at, ended_at FROM attempts
WHERE job_id = :job_id AND ordinal = ANY(:ordinals) ORDER BY ordinal, attempt
""")

PROMPTS_AT = text("""
SELECT w.place, c.prompts[w.place - c.first + 1] AS prompt
FROM unnest(CAST(:places AS bigint[])) AS w (place) CROSS JOIN LATERAL (
    SELECT first, prompts FROM input_chunks c
    WHERE c.job_id = :job_id AND c.first <= w.place ORDER BY c.first DESC LIMIT 1
) c
""")


def list_frames(
    connection: Connection,
    job_id: uuid.UUID,
    *,
    limit: int,
    after: int = -1,
    state: str | None = None,
) -> Sequence[Row[Any]]:
    """Read a page of a job's frames that have a row, by ordinal."""
    return connection.execute(
        LIST_FRAMES, {"job_id": job_id, "after": after, "state": state, "limit": limit}
    ).all()


def frame_attempts(
    connection: Connection, job_id: uuid.UUID, ordinals: Sequence[int]
) -> Sequence[Row[Any]]:
    """Read the attempts that did not succeed, of some frames of a job."""
    return connection.execute(FRAME_ATTEMPTS, {"job_id": job_id, "ordinals": list(ordinals)}).all()


def prompts_at(connection: Connection, job_id: uuid.UUID, indexes: Sequence[int]) -> dict[int, str]:
    """Read some of a job's prompts, by index."""
    rows = connection.execute(PROMPTS_AT, {"job_id": job_id, "places": sorted(set(indexes))})
    return {row.place: row.prompt for row in rows}


SET_PAUSED = text("""
WITH held AS (UPDATE returns SET paused = :paused WHERE job_id = :id)
UPDATE jobs SET paused = :paused, open = cursor < total AND NOT :paused WHERE id = :id
""")

CANCEL_FRAMES = text("""
WITH held AS (
    SELECT d.ordinal FROM leases l, unnest(l.job_ids, l.ordinals) AS d (job_id, ordinal)
    WHERE l.pipeline = :pipeline AND d.job_id = :id
), gone AS (
    DELETE FROM returns WHERE job_id = :id RETURNING ordinal
), cancelled AS (
    UPDATE frames f SET state = 'cancelled', finished_at = clock_timestamp(),
                        error = 'The job was cancelled.'
    FROM frames old
    WHERE f.job_id = :id AND old.job_id = f.job_id AND old.ordinal = f.ordinal
      AND f.ordinal IN (SELECT ordinal FROM held UNION SELECT ordinal FROM gone)
      AND f.state = ANY(:from_states)
    RETURNING f.*, old.state AS before
)
INSERT INTO attempts (job_id, ordinal, attempt, worker, reason, message, started_at)
SELECT job_id, ordinal, attempt, worker, 'cancelled', 'The job was cancelled.', started_at
FROM cancelled WHERE before = 'running'
""")

CANCEL_JOB = text("""
UPDATE jobs SET status = 'cancelled', open = false, paused = false, running = 0,
                cancelled = total - succeeded - dead, finished_at = clock_timestamp()
WHERE id = :id
""")

RETRY_FRAMES = text("""
WITH again AS (
    UPDATE frames SET state = 'ready', spared = attempt
    WHERE job_id = :id AND state = ANY(:from_states) RETURNING ordinal
), returned AS (
    INSERT INTO returns (job_id, ordinal, pipeline, tenant_id, priority, batch_key, bucket,
                         not_before, job_created_at, paused)
    SELECT j.id, a.ordinal, j.pipeline, j.tenant_id, j.priority, r.batch_key, r.bucket,
           clock_timestamp(), j.created_at, j.paused
    FROM again a JOIN jobs j ON j.id = :id CROSS JOIN LATERAL (
        SELECT run ->> 1 AS batch_key, (run ->> 2)::smallint AS bucket
        FROM jsonb_array_elements(j.runs) WITH ORDINALITY AS t (run, place)
        WHERE (run ->> 0)::bigint > a.ordinal ORDER BY place LIMIT 1
    ) r RETURNING ordinal
)
SELECT count(*) FROM returned
""")

RETRY_JOB = text("""
UPDATE jobs SET status = 'running', finished_at = NULL WHERE id = :id AND status = ANY(:from_states)
""")


def pause_job(connection: Connection, tenant_id: uuid.UUID, job_id: uuid.UUID) -> None:
    """Hold a job back: what runs is finished, nothing more is claimed."""
    job = _lock(connection, tenant_id, job_id)
    _refuse_terminal(job, "paused")
    if not job.paused:
        connection.execute(SET_PAUSED, {"id": job_id, "paused": True})
        _append(connection, job_id, "job.paused")


def resume_job(connection: Connection, tenant_id: uuid.UUID, job_id: uuid.UUID) -> None:
    """Let a paused job be claimed again."""
    job = _lock(connection, tenant_id, job_id)
    _refuse_terminal(job, "resumed")
    if job.paused:
        connection.execute(SET_PAUSED, {"id": job_id, "paused": False})
        _append(connection, job_id, "job.resumed")
        _join_lane(connection, job.pipeline, tenant_id, job_id)


def cancel_job(connection: Connection, tenant_id: uuid.UUID, job_id: uuid.UUID) -> None:
    """Cancel a job for good: once committed, no frame of it becomes succeeded.

    The work is that of the frames in flight, whatever the job's size. Cancelling twice is once.
    """
    job = _lock(connection, tenant_id, job_id)
    if job.status == JobStatus.CANCELLED:
        return
    if job.status not in JOB_TRANSITIONS["cancel"]:
        _refuse_terminal(job, "cancelled")
    where = {"id": job_id, "pipeline": job.pipeline}
    connection.execute(CANCEL_FRAMES, {**where, "from_states": _from_states("cancel")})
    connection.execute(CANCEL_JOB, where)
    _append(connection, job_id, "job.cancelled")


def retry_job(connection: Connection, tenant_id: uuid.UUID, job_id: uuid.UUID) -> int:
    """Give a job's dead frames fresh attempts; returns how many.

    Raises:
        Conflict: the job was cancelled, or has no dead frames.
    """
    job = _lock(connection, tenant_id, job_id)
    if job.status == JobStatus.CANCELLED or job.dead == 0:
        raise Conflict(f"Job {job_id} is {job.status} and has {job.dead} dead frames to retry.")
    frames: int = connection.execute(
        RETRY_FRAMES, {"id": job_id, "from_states": _from_states("retry")}
    ).scalar_one()
    connection.execute(RETRY_JOB, {"id": job_id, "from_states": list(JOB_TRANSITIONS["retry"])})
    tally(connection, "frames.retried", {job_id: Delta(dead=-frames, data={"count": frames})})
    if job.status in JOB_TRANSITIONS["retry"]:
        _append(connection, job_id, "job.running")
    _join_lane(connection, job.pipeline, tenant_id, job_id)
    return frames


def _join_lane(
    connection: Connection, pipeline: str, tenant_id: uuid.UUID, job_id: uuid.UUID
) -> None:
    connection.execute(JOIN_LANE, {"pipeline": pipeline, "tenant_id": tenant_id, "job_id": job_id})


def _from_states(transition: str) -> list[FrameState]:
    return list(FRAME_TRANSITIONS[transition])


def _lock(connection: Connection, tenant_id: uuid.UUID, job_id: uuid.UUID) -> Row[Any]:
    row = connection.execute(LOCK_JOB, {"id": job_id, "tenant_id": tenant_id}).first()
    if row is None:
        raise NotFound(f"There is no job {job_id}.")
    return row


def _refuse_terminal(job: Row[Any], wish: str) -> None:
    if job.status in TERMINAL:
        raise Conflict(f"Job {job.id} is {job.status}: it cannot be {wish} any more.")


def _append(connection: Connection, job_id: uuid.UUID, kind: str) -> None:
    connection.execute(INSERT_EVENT, {"job_id": job_id, "kind": kind, "data": "{}"})


def _json(value: Any) -> str:
    return json.dumps(value)
