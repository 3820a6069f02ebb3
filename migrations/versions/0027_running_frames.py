"""Limits of running frames: see ADR 37. The view `scaling` counts what they let run."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0027"
down_revision = "0026"
branch_labels = None
depends_on = None
# pre: only adds, so the version before still works. post: removes or restricts, after its end.
stage = "pre"

# docs/internals/scaling.md describes the columns. A lane has a share as soon as it had a job.
SCALING = """
CREATE OR REPLACE VIEW scaling AS
WITH waiting AS (
    SELECT s.pipeline, s.tenant_id,
           s.waiting[1] + s.waiting[2] + s.waiting[3] + CASE
               WHEN r.frames = 0 OR r.frames > 1000 THEN r.frames
               ELSE (SELECT count(*) FROM requeued_frames r
                     WHERE r.pipeline = s.pipeline AND r.tenant_id = s.tenant_id AND NOT r.paused
                       AND r.not_before < clock_timestamp() + interval '1 minute') END AS frames
    FROM shares s CROSS JOIN LATERAL (
        SELECT s.requeued[1] + s.requeued[2] + s.requeued[3] AS frames
    ) r WHERE s.waiting <> '{0,0,0}' OR s.requeued <> '{0,0,0}'
), running AS (
    SELECT f.tenant_id, count(*) AS frames
    FROM leases l CROSS JOIN LATERAL unnest(coalesce(l.tenant_ids, ARRAY(
        SELECT j.tenant_id FROM unnest(l.job_ids) AS u (id) JOIN jobs j ON j.id = u.id
    ))) AS f (tenant_id) GROUP BY f.tenant_id
), room AS (  -- of a tenant with a limit, what is left of it for each lane
    SELECT w.pipeline, w.tenant_id, w.frames,
           t.max_running_frames - coalesce(r.frames, 0)
           - (sum(w.frames) OVER (PARTITION BY w.tenant_id ORDER BY w.pipeline) - w.frames) AS room
    FROM waiting w JOIN tenants t ON t.id = w.tenant_id
    LEFT JOIN running r ON r.tenant_id = w.tenant_id
), lanes AS (
    SELECT r.pipeline, sum(CASE WHEN r.room IS NULL THEN r.frames
                                ELSE greatest(least(r.frames, r.room), 0) END)::bigint AS frames
    FROM room r GROUP BY r.pipeline
)
SELECT lane.pipeline, w.workers, busy.workers AS busy, coalesce(lanes.frames, 0) AS waiting,
       coalesce(lanes.frames, 0) * coalesce(w.seconds_per_frame, 5.0) AS seconds
FROM (SELECT DISTINCT pipeline FROM shares) lane
CROSS JOIN LATERAL (
    SELECT count(*) FILTER (WHERE NOT gone) AS workers,
           sum(denoise_seconds) / nullif(sum(succeeded), 0)::double precision AS seconds_per_frame
    FROM workers WHERE workers.pipeline = lane.pipeline
) w
CROSS JOIN LATERAL (
    SELECT count(DISTINCT worker_id) AS workers FROM leases WHERE leases.pipeline = lane.pipeline
) busy
LEFT JOIN lanes ON lanes.pipeline = lane.pipeline
"""

BEFORE = """
CREATE OR REPLACE VIEW scaling AS
SELECT lane.pipeline, w.workers, busy.workers AS busy, waiting.frames AS waiting,
       waiting.frames * coalesce(w.seconds_per_frame, 5.0) AS seconds
FROM (SELECT DISTINCT pipeline FROM shares) lane
CROSS JOIN LATERAL (
    SELECT count(*) FILTER (WHERE NOT gone) AS workers,
           sum(denoise_seconds) / nullif(sum(succeeded), 0)::double precision AS seconds_per_frame
    FROM workers WHERE workers.pipeline = lane.pipeline
) w
CROSS JOIN LATERAL (
    SELECT count(DISTINCT worker_id) AS workers FROM leases WHERE leases.pipeline = lane.pipeline
) busy
CROSS JOIN LATERAL (
    SELECT coalesce((SELECT sum(frames) FROM (
                SELECT total - cursor AS frames FROM jobs
                WHERE jobs.pipeline = lane.pipeline AND open
                ORDER BY tenant_id, priority, created_at, id  -- of the index jobs_claim
                LIMIT 10000
            ) opened), 0)::bigint
         + (SELECT count(*) FROM (
                SELECT FROM requeued_frames r
                WHERE r.pipeline = lane.pipeline AND NOT r.paused
                  AND r.not_before < clock_timestamp() + interval '1 minute'
                LIMIT 10000
            ) due) AS frames
) waiting
"""


def upgrade() -> None:
    op.add_column(
        "tenants",
        sa.Column(
            "max_running_frames", sa.BigInteger(), comment="frames of leases; null: no limit"
        ),
    )
    op.create_index(
        "tenants_running_limits",
        "tenants",
        ["max_running_frames"],
        postgresql_where=sa.text("max_running_frames IS NOT NULL"),
    )
    op.add_column(
        "leases",
        sa.Column(
            "tenant_ids",
            postgresql.ARRAY(sa.Uuid()),
            comment="null: claimed by a version before this column",
        ),
    )
    op.execute(SCALING)


def downgrade() -> None:
    op.execute(BEFORE)
    op.drop_column("leases", "tenant_ids")
    op.drop_index("tenants_running_limits", table_name="tenants")
    op.drop_column("tenants", "max_running_frames")
