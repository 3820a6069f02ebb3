"""Budgets: device seconds that a tenant used, and the cost of its frames that wait: see ADR 38.

And a hint with which claims count running frames less often: see ADR 37.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0029"
down_revision = "0028"
branch_labels = None
depends_on = None
# pre: only adds, so the version before still works. post: removes or restricts, after its end.
stage = "pre"

# Denoising steps x pixels. A key of an older version has none: then it is taken to have 20 steps at
# its size, or at 512x512 if it has no size.
FRAME_COST = """
CREATE FUNCTION frame_cost(_batch_key text) RETURNS bigint LANGUAGE sql IMMUTABLE AS $$
    SELECT coalesce(substring(_batch_key FROM '[.]([0-9]+)')::bigint,
                    20 * substring(_batch_key FROM '~([0-9]+)x')::bigint
                       * substring(_batch_key FROM '~[0-9]+x([0-9]+)')::bigint,
                    20 * 512 * 512)
$$
"""

# The cost of a job's frames from `_cursor` on. `_runs` is jobs.runs.
REMAINING_COST = """
CREATE FUNCTION remaining_cost(_runs jsonb, _cursor bigint) RETURNS numeric
LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE WHEN jsonb_array_length(_runs) = 1
    THEN greatest((_runs -> 0 ->> 0)::numeric - _cursor, 0) * frame_cost(_runs -> 0 ->> 1)
    ELSE (
        SELECT coalesce(sum((r.stop - greatest(r.start, _cursor))::numeric * frame_cost(r.key)), 0)
        FROM (
            SELECT (u.run ->> 0)::bigint AS stop, u.run ->> 1 AS key,
                   lag((u.run ->> 0)::bigint, 1, 0::bigint) OVER (ORDER BY u.n) AS start
            FROM jsonb_array_elements(_runs) WITH ORDINALITY AS u (run, n)
        ) r WHERE r.stop > _cursor
    ) END
$$
"""

# As the function of migration 21, and counts the cost too. That one stays for a downgrade.
CHANGE_SHARES = """
CREATE FUNCTION change_shares(
    _pipelines text[], _tenant_ids uuid[], _priorities smallint[],
    _waiting bigint[], _requeued bigint[], _retry_at timestamptz[], _costs numeric[]
) RETURNS void LANGUAGE plpgsql
SET enable_seqscan = off SET plan_cache_mode = force_generic_plan AS $$
BEGIN
    PERFORM FROM (
        SELECT DISTINCT c.pipeline, c.tenant_id
        FROM unnest(_pipelines, _tenant_ids) AS c (pipeline, tenant_id) ORDER BY 1, 2
    ) c CROSS JOIN LATERAL (
        SELECT FROM shares s WHERE s.pipeline = c.pipeline AND s.tenant_id = c.tenant_id
        LIMIT 1 FOR UPDATE
    ) s;

    UPDATE shares s
    SET priority = least(s.priority, c.priority),
        retry_at = least(s.retry_at, c.retry_at),
        waiting = ARRAY[s.waiting[1] + c.waiting_0, s.waiting[2] + c.waiting_1,
                        s.waiting[3] + c.waiting_2],
        requeued = ARRAY[s.requeued[1] + c.requeued_0, s.requeued[2] + c.requeued_1,
                         s.requeued[3] + c.requeued_2],
        waiting_cost = s.waiting_cost + c.cost
    FROM (
        SELECT pipeline, tenant_id, min(priority) FILTER (WHERE waiting > 0) AS priority,
               min(retry_at) AS retry_at,
               coalesce(sum(waiting) FILTER (WHERE priority = 0), 0)::bigint AS waiting_0,
               coalesce(sum(waiting) FILTER (WHERE priority = 1), 0)::bigint AS waiting_1,
               coalesce(sum(waiting) FILTER (WHERE priority = 2), 0)::bigint AS waiting_2,
               coalesce(sum(requeued) FILTER (WHERE priority = 0), 0)::bigint AS requeued_0,
               coalesce(sum(requeued) FILTER (WHERE priority = 1), 0)::bigint AS requeued_1,
               coalesce(sum(requeued) FILTER (WHERE priority = 2), 0)::bigint AS requeued_2,
               coalesce(sum(cost), 0) AS cost
        FROM unnest(_pipelines, _tenant_ids, _priorities, _waiting, _requeued, _retry_at, _costs)
             AS c (pipeline, tenant_id, priority, waiting, requeued, retry_at, cost)
        GROUP BY pipeline, tenant_id
    ) c
    WHERE s.pipeline = c.pipeline AND s.tenant_id = c.tenant_id
      AND s.pipeline = ANY(_pipelines) AND s.tenant_id = ANY(_tenant_ids);
END $$
"""

# Only triggers call the next five. `{cost}` is added to what they did before.
JOBS_INSERTED = """
CREATE OR REPLACE FUNCTION jobs_inserted() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM change_shares(
        array_agg(j.pipeline), array_agg(j.tenant_id), array_agg(j.priority),
        array_agg(j.total - j.cursor), array_agg(0::bigint), array_agg(NULL::timestamptz){cost})
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
                 THEN '-infinity'::timestamptz END]{cost});
    RETURN NULL;
END $$
"""

REQUEUED_INSERTED = """
CREATE OR REPLACE FUNCTION requeued_inserted() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM change_shares(
        array_agg(r.pipeline), array_agg(r.tenant_id), array_agg(r.priority),
        array_agg(0::bigint), array_agg(r.frames), array_agg(r.due_at){cost})
    FROM (
        SELECT pipeline, tenant_id, priority, count(*) AS frames, min(not_before) AS due_at{sum}
        FROM added WHERE NOT paused GROUP BY 1, 2, 3
    ) r;
    RETURN NULL;
END $$
"""

REQUEUED_UPDATED = """
CREATE OR REPLACE FUNCTION requeued_updated() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM change_shares(
        array_agg(r.pipeline), array_agg(r.tenant_id), array_agg(r.priority),
        array_agg(0::bigint), array_agg(r.frames), array_agg(r.due_at){cost})
    FROM (
        SELECT pipeline, tenant_id, priority, sum(n)::bigint AS frames, min(due_at) AS due_at{sum}
        FROM (
            SELECT pipeline, tenant_id, priority, 1 AS n, not_before AS due_at, batch_key
            FROM added WHERE NOT paused
            UNION ALL
            SELECT pipeline, tenant_id, priority, -1, NULL, batch_key FROM dropped WHERE NOT paused
        ) c GROUP BY 1, 2, 3
    ) r;
    RETURN NULL;
END $$
"""

REQUEUED_DELETED = """
CREATE OR REPLACE FUNCTION requeued_deleted() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM change_shares(
        array_agg(r.pipeline), array_agg(r.tenant_id), array_agg(r.priority),
        array_agg(0::bigint), array_agg(-r.frames), array_agg(NULL::timestamptz){cost})
    FROM (
        SELECT pipeline, tenant_id, priority, count(*) AS frames{sum}
        FROM dropped WHERE NOT paused GROUP BY 1, 2, 3
    ) r;
    RETURN NULL;
END $$
"""

JOB_COST = """ARRAY[
            CASE WHEN TG_OP = 'UPDATE' AND NEW.open
                 THEN remaining_cost(NEW.runs, NEW.cursor) ELSE 0 END
            - CASE WHEN OLD.open THEN remaining_cost(OLD.runs, OLD.cursor) ELSE 0 END]"""

# For each function: the cost that is passed on, and the sum from which it comes.
COSTS = {
    JOBS_INSERTED: (",\n        array_agg(remaining_cost(j.runs, j.cursor))", ""),
    JOB_CHANGED: (", " + JOB_COST, ""),
    REQUEUED_INSERTED: (", array_agg(r.cost)", ", sum(frame_cost(batch_key)) AS cost"),
    REQUEUED_UPDATED: (", array_agg(r.cost)", ", sum(n * frame_cost(batch_key)) AS cost"),
    REQUEUED_DELETED: (", array_agg(-r.cost)", ", sum(frame_cost(batch_key)) AS cost"),
}

# A claim of this version counts what it takes itself. One of the version before counts frames, and
# no cost: these triggers do it, during an upgrade or after a rollback.
BY_THE_VERSION_BEFORE = "current_setting('farm.claiming', true) = 'yes'"

OLD_CLAIMS = (
    f"""
CREATE FUNCTION job_claimed_before() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM change_shares(
        ARRAY[OLD.pipeline], ARRAY[OLD.tenant_id], ARRAY[OLD.priority],
        ARRAY[0], ARRAY[0], ARRAY[NULL::timestamptz], {JOB_COST});
    RETURN NULL;
END $$
""",
    """
CREATE FUNCTION requeued_claimed_before() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM change_shares(
        array_agg(r.pipeline), array_agg(r.tenant_id), array_agg(r.priority),
        array_agg(0::bigint), array_agg(0::bigint), array_agg(NULL::timestamptz),
        array_agg(-r.cost))
    FROM (
        SELECT pipeline, tenant_id, priority, sum(frame_cost(batch_key)) AS cost
        FROM dropped WHERE NOT paused GROUP BY 1, 2, 3
    ) r;
    RETURN NULL;
END $$
""",
    f"""
CREATE TRIGGER job_claimed_before AFTER UPDATE ON jobs FOR EACH ROW
WHEN ((OLD.open, OLD.cursor) IS DISTINCT FROM (NEW.open, NEW.cursor) AND {BY_THE_VERSION_BEFORE})
EXECUTE FUNCTION job_claimed_before()
""",
    f"""
CREATE TRIGGER requeued_claimed_before AFTER DELETE ON requeued_frames
REFERENCING OLD TABLE AS dropped FOR EACH STATEMENT
WHEN ({BY_THE_VERSION_BEFORE}) EXECUTE FUNCTION requeued_claimed_before()
""",
)

# A completion of this version notes the device time itself. For one of the version before, or a change
# by hand, a trigger does it.
OLD_USE = (
    """
CREATE FUNCTION device_used() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO device_use AS u (tenant_id, day, pipeline, writer, seconds)
    VALUES (NEW.tenant_id, (clock_timestamp() AT TIME ZONE 'UTC')::date, NEW.pipeline,
            pg_backend_pid(), NEW.device_seconds - OLD.device_seconds)
    ON CONFLICT (tenant_id, day, pipeline, writer)
    DO UPDATE SET seconds = u.seconds + excluded.seconds;
    RETURN NULL;
END $$
""",
    """
CREATE TRIGGER device_used AFTER UPDATE ON jobs FOR EACH ROW
WHEN (OLD.device_seconds <> NEW.device_seconds
      AND coalesce(current_setting('farm.notes_use', true), '') = '')
EXECUTE FUNCTION device_used()
""",
)

# The locks keep everybody else from writing jobs and requeued frames until the commit.
LOCK = "LOCK TABLE jobs, requeued_frames IN SHARE ROW EXCLUSIVE MODE"
COUNT = """
UPDATE shares SET
    waiting_cost = w.cost + r.cost
FROM shares s
CROSS JOIN LATERAL (
    SELECT coalesce(sum(remaining_cost(runs, cursor)), 0) AS cost FROM jobs
    WHERE open AND pipeline = s.pipeline AND tenant_id = s.tenant_id
) w
CROSS JOIN LATERAL (
    SELECT coalesce(sum(frame_cost(batch_key)), 0) AS cost FROM requeued_frames
    WHERE NOT paused AND pipeline = s.pipeline AND tenant_id = s.tenant_id
) r
WHERE shares.pipeline = s.pipeline AND shares.tenant_id = s.tenant_id
  AND (s.waiting <> '{0,0,0}' OR s.requeued <> '{0,0,0}')
"""


def upgrade() -> None:
    op.execute(LOCK)
    op.add_column(
        "tenants",
        sa.Column(
            "device_seconds_a_month",
            sa.Double(),
            comment="device time in a calendar month, UTC; null: no limit",
        ),
    )
    op.add_column(
        "shares",
        sa.Column(
            "waiting_cost",
            sa.Numeric(),
            nullable=False,
            server_default="0",
            comment="steps x pixels of the frames in `waiting` and `requeued`",
        ),
    )
    op.add_column(
        "leases",
        sa.Column(
            "frame_cost",
            sa.BigInteger(),
            comment="steps x pixels of each frame; null: claimed by a version before this column",
        ),
    )
    for name, comment in {
        "cost": "steps x pixels of all rendered frames",
        "cost_seconds": "time in which `cost` was denoised",
    }.items():
        op.add_column(
            "workers",
            sa.Column(
                name, sa.Double(), nullable=False, server_default=sa.text("0"), comment=comment
            ),
        )
    op.add_column(
        "lanes",
        sa.Column(
            "some_full",
            sa.Boolean(),
            nullable=False,
            server_default=sa.text("false"),
            comment="a claim should count first which tenants may have no more running frames",
        ),
    )
    op.create_table(
        "device_use",
        sa.Column("tenant_id", sa.Uuid(), primary_key=True),
        sa.Column("day", sa.Date(), primary_key=True, comment="UTC"),
        sa.Column("pipeline", sa.Text(), primary_key=True),
        sa.Column(
            "writer",
            sa.Integer(),
            primary_key=True,
            autoincrement=False,
            comment="process ID of the session in Postgres; 0: sum of earlier ones",
        ),
        sa.Column("seconds", sa.Double(), nullable=False),
        comment="Device time of succeeded frames. It outlives their jobs.",
    )
    op.create_index(
        "device_use_parts",
        "device_use",
        ["tenant_id"],
        postgresql_where=sa.text("writer <> 0"),
    )
    for function in (FRAME_COST, REMAINING_COST, CHANGE_SHARES):
        op.execute(function)
    for function, (cost, sum_) in COSTS.items():
        op.execute(function.format(cost=cost, sum=sum_))
    for statement in OLD_CLAIMS + OLD_USE:
        op.execute(statement)
    op.execute(COUNT)


def downgrade() -> None:
    op.execute("DROP TRIGGER device_used ON jobs")
    op.execute("DROP FUNCTION device_used()")
    op.execute("DROP TRIGGER requeued_claimed_before ON requeued_frames")
    op.execute("DROP TRIGGER job_claimed_before ON jobs")
    op.execute("DROP FUNCTION requeued_claimed_before()")
    op.execute("DROP FUNCTION job_claimed_before()")
    for function in COSTS:
        op.execute(function.format(cost="", sum=""))
    op.execute(
        "DROP FUNCTION change_shares("
        "text[], uuid[], smallint[], bigint[], bigint[], timestamptz[], numeric[])"
    )
    op.execute("DROP FUNCTION remaining_cost(jsonb, bigint)")
    op.execute("DROP FUNCTION frame_cost(text)")
    op.drop_table("device_use")
    for table, column in (
        ("lanes", "some_full"),
        ("workers", "cost_seconds"),
        ("workers", "cost"),
        ("leases", "frame_cost"),
        ("shares", "waiting_cost"),
        ("tenants", "device_seconds_a_month"),
    ):
        op.drop_column(table, column)
