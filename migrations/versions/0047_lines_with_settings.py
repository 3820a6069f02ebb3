"""Lines of an input may have settings, and such a job's frames are claimed in groups: see ADR 60.

The view `scaling` counts seconds by the cost of the frames that wait.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0047"
down_revision = "0046"
branch_labels = None
depends_on = None
# pre: only adds, so the version before still works. post: removes or restricts, after its end.
stage = "pre"

# The cost of a job's frames from position `_cursor` on. The ends in the runs of a job with groups are
# those of its keys, not of its groups, so only their sum is used.
JOB_COST = """
CREATE FUNCTION job_cost(_id uuid, _runs jsonb, _cursor bigint, _stretch bigint) RETURNS numeric
LANGUAGE sql STABLE AS $$
    SELECT CASE WHEN _stretch IS NULL OR _cursor = 0 THEN remaining_cost(_runs, _cursor)
    ELSE (
        SELECT coalesce(sum((g.stop - greatest(g.first, _cursor))::numeric
                            * frame_cost(_runs -> g.run ->> 1)), 0)
        FROM job_groups g WHERE g.job_id = _id AND g.stop > _cursor
    ) END
$$
"""

JOBS_INSERTED = """
CREATE OR REPLACE FUNCTION jobs_inserted() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM change_shares(
        array_agg(j.pipeline), array_agg(j.tenant_id), array_agg(j.priority),
        array_agg(j.total - j.cursor), array_agg(0::bigint), array_agg(NULL::timestamptz),
        array_agg({cost}))
    FROM added j WHERE j.open;
    RETURN NULL;
END $$
"""

# A resumed job's requeued frames may be due too. They are paused until the janitor has updated them.
JOB_CHANGED = """
CREATE OR REPLACE FUNCTION job_changed() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    now_waiting bigint := CASE WHEN TG_OP = 'UPDATE' AND NEW.open
                               THEN NEW.total - NEW.cursor ELSE 0 END;
    was_waiting bigint := CASE WHEN OLD.open THEN OLD.total - OLD.cursor ELSE 0 END;
BEGIN
    PERFORM change_shares(
        ARRAY[OLD.pipeline], ARRAY[OLD.tenant_id], ARRAY[OLD.priority],
        ARRAY[now_waiting - was_waiting], ARRAY[0], ARRAY[
            CASE WHEN TG_OP = 'UPDATE' AND OLD.paused AND NOT NEW.paused
                 THEN '-infinity'::timestamptz END], ARRAY[
            CASE WHEN TG_OP = 'UPDATE' AND NEW.open THEN {new} ELSE 0 END
            - CASE WHEN OLD.open THEN {old} ELSE 0 END]);
    RETURN NULL;
END $$
"""


def _cost(row: str) -> str:
    return f"job_cost({row}.id, {row}.runs, {row}.cursor, {row}.stretch)"


def _cost_before(row: str) -> str:
    return f"remaining_cost({row}.runs, {row}.cursor)"


# docs/internals/scaling.md describes the columns. A lane has a share as soon as it had a job. Frames of
# a tenant cost as much as the mean of all its frames that wait on the lane. The fields in braces are
# added by this step.
SCALING = """
CREATE OR REPLACE VIEW scaling AS
WITH held AS (
    SELECT pipeline, held_from FROM lanes
    WHERE held_from IS NOT NULL AND coalesce(held_until > clock_timestamp(), true)
), waiting AS (
    SELECT s.pipeline, s.tenant_id, (
               SELECT coalesce(sum(n), 0)::bigint
               FROM unnest(s.waiting[1:coalesce(h.held_from, 3)]) n
           ) + CASE
               WHEN r.frames = 0 OR r.frames > 1000 THEN r.frames
               ELSE (SELECT count(*) FROM requeued_frames r
                     WHERE r.pipeline = s.pipeline AND r.tenant_id = s.tenant_id AND NOT r.paused
                       AND r.priority < coalesce(h.held_from, 3)
                       AND r.not_before < clock_timestamp() + interval '1 minute')
               END AS frames{cost}
    FROM shares s LEFT JOIN held h ON h.pipeline = s.pipeline CROSS JOIN LATERAL (
        SELECT coalesce(sum(n), 0)::bigint AS frames
        FROM unnest(s.requeued[1:coalesce(h.held_from, 3)]) n
    ) r WHERE s.waiting <> '{{0,0,0}}' OR s.requeued <> '{{0,0,0}}'
), running AS (
    SELECT f.tenant_id, count(*) AS frames
    FROM leases l CROSS JOIN LATERAL unnest(coalesce(l.tenant_ids, ARRAY(
        SELECT j.tenant_id FROM unnest(l.job_ids) AS u (id) JOIN jobs j ON j.id = u.id
    ))) AS f (tenant_id) GROUP BY f.tenant_id
), room AS (  -- of a tenant with a limit, what is left of it for each lane
    SELECT w.*, t.max_running_frames - coalesce(r.frames, 0)
           - (sum(w.frames) OVER (PARTITION BY w.tenant_id ORDER BY w.pipeline) - w.frames) AS room
    FROM waiting w JOIN tenants t ON t.id = w.tenant_id
    LEFT JOIN running r ON r.tenant_id = w.tenant_id
), lanes AS (
    SELECT a.pipeline, sum(a.frames)::bigint AS frames{sum}
    FROM (
        SELECT r.pipeline{costs}, CASE WHEN r.room IS NULL THEN r.frames
                                   ELSE greatest(least(r.frames, r.room), 0) END AS frames
        FROM room r
    ) a GROUP BY a.pipeline
)
SELECT lane.pipeline, w.workers, busy.workers AS busy, coalesce(lanes.frames, 0) AS waiting,
       {seconds} AS seconds
FROM (SELECT DISTINCT pipeline FROM shares) lane
CROSS JOIN LATERAL (
    SELECT count(*) FILTER (WHERE NOT gone) AS workers,
           sum(denoise_seconds) / nullif(sum(succeeded), 0)::double precision AS seconds_per_frame,
           sum(cost_seconds) / nullif(sum(cost), 0) AS seconds_per_cost
    FROM workers WHERE workers.pipeline = lane.pipeline
) w
CROSS JOIN LATERAL (
    SELECT count(DISTINCT worker_id) AS workers FROM leases WHERE leases.pipeline = lane.pipeline
) busy
LEFT JOIN lanes ON lanes.pipeline = lane.pipeline
"""
BY_FRAMES = "coalesce(lanes.frames, 0) * coalesce(w.seconds_per_frame, 5.0)"
SCALING_BEFORE = SCALING.format(cost="", sum="", costs="", seconds=BY_FRAMES)
SCALING_BY_COST = SCALING.format(
    cost=""",
           (s.waiting_cost / greatest(1, (
               SELECT sum(n) FROM unnest(s.waiting || s.requeued) n)))::float AS each_costs""",
    sum=", sum(a.frames * a.each_costs) AS cost",
    costs=", r.each_costs",
    seconds=f"coalesce(coalesce(lanes.cost, 0) * w.seconds_per_cost, {BY_FRAMES})",
)


def upgrade() -> None:
    op.add_column(
        "jobs",
        sa.Column(
            "stretch",
            sa.BigInteger(),
            comment="frames of a stretch, within which groups are formed; null: no groups",
        ),
    )
    op.add_column(
        "frames",
        sa.Column(
            "run", sa.SmallInteger(), comment="index into its job's runs, if that has groups"
        ),
    )
    op.create_table(
        "job_groups",
        sa.Column(
            "job_id", sa.Uuid(), sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True
        ),
        sa.Column("first", sa.BigInteger(), primary_key=True, comment="its first position"),
        sa.Column("stop", sa.BigInteger(), nullable=False, comment="position after its last"),
        sa.Column("run", sa.SmallInteger(), nullable=False, comment="index into the job's runs"),
        comment="Positions of a job whose frames share a batch_key.",
    )
    op.create_table(
        "job_order",
        sa.Column(
            "job_id", sa.Uuid(), sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True
        ),
        sa.Column("first", sa.BigInteger(), primary_key=True, comment="its first position"),
        sa.Column("images", sa.BigInteger(), nullable=False, comment="images_per_prompt"),
        sa.Column(
            "places",
            postgresql.ARRAY(sa.Integer()),
            nullable=False,
            comment="ordinal / images of each `images` positions",
        ),
        comment="The ordinals of a job with groups, in the order in which they are claimed.",
    )
    op.add_column(
        "inputs",
        sa.Column(
            "settings",
            postgresql.JSONB(),
            comment="settings of its lines, each with its first line; null: no line has any",
        ),
    )
    op.add_column(
        "inputs",
        sa.Column(
            "fields",
            postgresql.ARRAY(sa.Text()),
            comment="parameters in its lines; null: none has any",
        ),
    )
    op.add_column(
        "input_parts",
        sa.Column(
            "settings",
            sa.LargeBinary(),
            comment="uint16 of each line: index into the input's settings; null: all have the first",
        ),
    )
    op.create_table(
        "input_images",
        sa.Column(
            "input_id", sa.Uuid(), sa.ForeignKey("inputs.id", ondelete="CASCADE"), primary_key=True
        ),
        sa.Column("sha256", sa.LargeBinary(), primary_key=True),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("line", sa.BigInteger(), nullable=False, comment="first line that names it"),
        comment="Control images that lines of inputs name.",
    )
    op.execute(SCALING_BY_COST)
    op.execute(JOB_COST)
    op.execute(JOBS_INSERTED.format(cost=_cost("j")))
    op.execute(JOB_CHANGED.format(new=_cost("NEW"), old=_cost("OLD")))


def downgrade() -> None:
    op.execute(SCALING_BEFORE)
    op.execute(JOBS_INSERTED.format(cost=_cost_before("j")))
    op.execute(JOB_CHANGED.format(new=_cost_before("NEW"), old=_cost_before("OLD")))
    op.execute("DROP FUNCTION job_cost")
    op.drop_table("input_images")
    op.drop_column("input_parts", "settings")
    op.drop_column("inputs", "fields")
    op.drop_column("inputs", "settings")
    op.drop_table("job_order")
    op.drop_table("job_groups")
    op.drop_column("frames", "run")
    op.drop_column("jobs", "stretch")
