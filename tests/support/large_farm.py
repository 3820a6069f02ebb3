"""A farm with much history: many jobs, a job of a million frames, many failed attempts."""

from __future__ import annotations

import uuid

from sqlalchemy import text

from farm.context import Farm
from tests.support.store import sql

MILLION = """
UPDATE jobs SET cursor = 900002, succeeded = 899000, dead = 1000, running = 1, started_at = now()
WHERE id = :id;
INSERT INTO frames (job_id, ordinal, state, attempt, worker, started_at)
SELECT :id, ordinal, state, 1, 'w', now()
FROM (VALUES (900000, 'running'), (900001, 'ready')) AS f (ordinal, state);
INSERT INTO leases (id, worker_id, pid, pipeline, expires_at, job_ids, ordinals, attempts)
VALUES (gen_random_uuid(), gen_random_uuid(), 1, 'demo', now(), ARRAY[CAST(:id AS uuid)],
        ARRAY[900000::bigint], ARRAY[1::smallint]);
INSERT INTO requeued_frames (job_id, ordinal, pipeline, tenant_id, priority, batch_key, bucket,
                             not_before, job_created_at, paused, isolated)
SELECT id, 900001, 'demo', tenant_id, 1, 'key', 8, now(), created_at, false, false
FROM jobs WHERE id = :id;
INSERT INTO attempts (job_id, ordinal, attempt, worker, reason, message, started_at)
VALUES (:id, 900001, 1, 'w', 'worker_lost', '', now());
INSERT INTO frames (job_id, ordinal, state, attempt, worker, started_at, finished_at, sha256, bytes,
                    slot, bucket)
SELECT :id, n, CASE WHEN bad THEN 'dead' ELSE 'succeeded' END, 2, 'w', now(), now(),
       CASE WHEN NOT bad THEN '\\x00'::bytea END, CASE WHEN NOT bad THEN 1 END, 0, 8
FROM generate_series(0, 899999) n CROSS JOIN LATERAL (SELECT n % 900 = 7 AS bad) b;
INSERT INTO attempts (job_id, ordinal, attempt, worker, reason, message, started_at)
SELECT :id, n, CASE WHEN n % 900 = 7 THEN 2 ELSE 1 END, 'w', 'render_error', repeat('m', 200), now()
FROM generate_series(0, 899999) n WHERE n % 45 = 7;
INSERT INTO events (job_id, tenant_id, kind, data)
SELECT j.id, j.tenant_id, 'frames.succeeded', '{}' FROM jobs j, generate_series(1, 100000)
WHERE j.id = :id
"""

JOBS = """
INSERT INTO jobs (id, tenant_id, pipeline, priority, status, open, total, cursor, run_end,
                  cancelled, batch_key, bucket, runs, max_attempts, spec, labels, created_at,
                  started_at, finished_at)
SELECT gen_random_uuid(), tenant_id, pipeline, n % 3,
       (ARRAY['succeeded', 'partial', 'failed', 'cancelled'])[1 + n % 4], false, total, total,
       run_end, total, batch_key, bucket, runs, max_attempts, spec,
       jsonb_build_object('n', n::text), now() - n * interval '1 s', now(), now()
FROM (SELECT * FROM jobs LIMIT 1) j, generate_series(1, :number) n
"""
ATTEMPTS = """
INSERT INTO attempts (job_id, ordinal, attempt, worker, reason, message, started_at, ended_at,
                      fault)
SELECT (SELECT id FROM jobs ORDER BY created_at LIMIT 1), n, 1, 'worker ' || n % 30,
       'render_error', 'It broke.', now(), now() - n * interval '4 s', lpad(to_hex(n % 3), 16, '0')
FROM generate_series(0, CAST(:number AS int) - 1) n
"""


def copy_job(farm: Farm, number: int) -> None:
    """Copy the farm's only job as ended ones, a second apart."""
    sql(farm, JOBS, number=number)


def fail_attempts(farm: Farm, number: int) -> None:
    """Add failed attempts of three causes to the oldest job, four seconds apart."""
    sql(farm, ATTEMPTS, number=number)


def let_a_million_frames_end(farm: Farm, job_id: uuid.UUID) -> None:
    """Let 900,000 frames of a job of a million end: 1,000 are dead, 20,000 attempts failed."""
    for statement in MILLION.strip().split(";\n"):
        sql(farm, statement, id=job_id)


def vacuum(farm: Farm) -> None:
    """Let Postgres look at all tables."""
    with farm.store.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT").execute(text("VACUUM ANALYZE"))
