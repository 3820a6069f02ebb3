"""Versions and devices of workers, and the view that a scaler reads."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None
# pre: only adds, so the version before still works. post: removes or restricts, after its end.
stage = "pre"

# docs/internals/scaling.md describes the columns. A lane has a share as soon as it had a job.
SCALING = """
CREATE VIEW scaling AS
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
    op.add_column("workers", sa.Column("version", sa.Text(), comment="its version of the farm"))
    op.add_column(
        "workers",
        sa.Column("device_id", sa.Text(), comment="UUID of its CUDA device; null without one"),
    )
    op.add_column(
        "workers", sa.Column("device_bytes", sa.BigInteger(), comment="memory of that device")
    )
    op.execute(SCALING)


def downgrade() -> None:
    op.execute("DROP VIEW scaling")
    for name in ("device_bytes", "device_id", "version"):
        op.drop_column("workers", name)
