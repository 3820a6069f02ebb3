"""Lanes that an operator holds. The view `scaling` counts only what may be claimed: see ADR 51."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0039"
down_revision = "0038"
branch_labels = None
depends_on = None
# pre: only adds, so the version before still works. post: removes or restricts, after its end.
stage = "pre"

# docs/internals/scaling.md describes the columns. A lane has a share as soon as it had a job.
SCALING = """
CREATE OR REPLACE VIEW scaling AS
WITH {held}waiting AS (
    SELECT s.pipeline, s.tenant_id, {waiting} + CASE
               WHEN r.frames = 0 OR r.frames > 1000 THEN r.frames
               ELSE (SELECT count(*) FROM requeued_frames r
                     WHERE r.pipeline = s.pipeline AND r.tenant_id = s.tenant_id AND NOT r.paused
                       {served}AND r.not_before < clock_timestamp() + interval '1 minute')
               END AS frames
    FROM shares s {join}CROSS JOIN LATERAL (
        SELECT {requeued} AS frames
    ) r WHERE s.waiting <> '{{0,0,0}}' OR s.requeued <> '{{0,0,0}}'
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


def _total(counts: str) -> str:
    return f"{counts}[1] + {counts}[2] + {counts}[3]"


def _served(counts: str) -> str:
    served = f"unnest({counts}[1:coalesce(h.held_from, 3)])"
    return f"(SELECT coalesce(sum(n), 0)::bigint FROM {served} n)"  # noqa: S608 - constants only


WITH_HOLDS = SCALING.format(
    held="""held AS (
    SELECT pipeline, held_from FROM lanes
    WHERE held_from IS NOT NULL AND coalesce(held_until > clock_timestamp(), true)
), """,
    waiting=_served("s.waiting"),
    served="AND r.priority < coalesce(h.held_from, 3) ",
    join="LEFT JOIN held h ON h.pipeline = s.pipeline ",
    requeued=_served("s.requeued"),
)
BEFORE = SCALING.format(
    held="", waiting=_total("s.waiting"), served="", join="", requeued=_total("s.requeued")
)


def upgrade() -> None:
    for name, kind, comment in (
        ("held_from", sa.SmallInteger(), "priorities from this one on are held; null: none"),
        ("held_why", sa.Text(), "reason of the hold, which every tenant may read"),
        ("held_by", sa.Text(), "name of the operator's key"),
        ("held_at", sa.DateTime(timezone=True), None),
        ("held_until", sa.DateTime(timezone=True), "null: until it is released"),
    ):
        op.add_column("lanes", sa.Column(name, kind, comment=comment))
    op.execute(WITH_HOLDS)


def downgrade() -> None:
    op.execute(BEFORE)
    for name in ("held_until", "held_at", "held_by", "held_why", "held_from"):
        op.drop_column("lanes", name)
