"""Waiting work of each tenant, in its row of `shares`: see ADR 33."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None
# pre: only adds, so the version before still works. post: removes or restricts, after its end.
stage = "pre"

# Writes changes of what waits into the tenants' shares. Each change is one place of the arrays. All
# rows are locked first, in the order in which submissions and claims lock them.
CHANGE_SHARES = """
CREATE FUNCTION change_shares(
    _pipelines text[], _tenant_ids uuid[], _priorities smallint[],
    _waiting bigint[], _requeued bigint[], _retry_at timestamptz[]
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
                         s.requeued[3] + c.requeued_2]
    FROM (
        SELECT pipeline, tenant_id, min(priority) FILTER (WHERE waiting > 0) AS priority,
               min(retry_at) AS retry_at,
               coalesce(sum(waiting) FILTER (WHERE priority = 0), 0)::bigint AS waiting_0,
               coalesce(sum(waiting) FILTER (WHERE priority = 1), 0)::bigint AS waiting_1,
               coalesce(sum(waiting) FILTER (WHERE priority = 2), 0)::bigint AS waiting_2,
               coalesce(sum(requeued) FILTER (WHERE priority = 0), 0)::bigint AS requeued_0,
               coalesce(sum(requeued) FILTER (WHERE priority = 1), 0)::bigint AS requeued_1,
               coalesce(sum(requeued) FILTER (WHERE priority = 2), 0)::bigint AS requeued_2
        FROM unnest(_pipelines, _tenant_ids, _priorities, _waiting, _requeued, _retry_at)
             AS c (pipeline, tenant_id, priority, waiting, requeued, retry_at)
        GROUP BY pipeline, tenant_id
    ) c
    WHERE s.pipeline = c.pipeline AND s.tenant_id = c.tenant_id
      AND s.pipeline = ANY(_pipelines) AND s.tenant_id = ANY(_tenant_ids);
END $$
"""

JOBS_INSERTED = """
CREATE FUNCTION jobs_inserted() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM change_shares(
        array_agg(j.pipeline), array_agg(j.tenant_id), array_agg(j.priority),
        array_agg(j.total - j.cursor), array_agg(0::bigint), array_agg(NULL::timestamptz))
    FROM added j WHERE j.open;
    RETURN NULL;
END $$
"""

# A resumed job's requeued frames may be due too. They are paused until the janitor has updated them.
JOB_CHANGED = """
CREATE FUNCTION job_changed() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    now_waiting bigint := CASE WHEN TG_OP = 'UPDATE' AND NEW.open
                               THEN NEW.total - NEW.cursor ELSE 0 END;
    was_waiting bigint := CASE WHEN OLD.open THEN OLD.total - OLD.cursor ELSE 0 END;
BEGIN
    PERFORM change_shares(
        ARRAY[OLD.pipeline], ARRAY[OLD.tenant_id], ARRAY[OLD.priority],
        ARRAY[now_waiting - was_waiting], ARRAY[0], ARRAY[
            CASE WHEN TG_OP = 'UPDATE' AND OLD.paused AND NOT NEW.paused
                 THEN '-infinity'::timestamptz END]);
    RETURN NULL;
END $$
"""

REQUEUED_INSERTED = """
CREATE FUNCTION requeued_inserted() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM change_shares(
        array_agg(r.pipeline), array_agg(r.tenant_id), array_agg(r.priority),
        array_agg(0::bigint), array_agg(r.frames), array_agg(r.due_at))
    FROM (
        SELECT pipeline, tenant_id, priority, count(*) AS frames, min(not_before) AS due_at
        FROM added WHERE NOT paused GROUP BY 1, 2, 3
    ) r;
    RETURN NULL;
END $$
"""

REQUEUED_UPDATED = """
CREATE FUNCTION requeued_updated() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM change_shares(
        array_agg(r.pipeline), array_agg(r.tenant_id), array_agg(r.priority),
        array_agg(0::bigint), array_agg(r.frames), array_agg(r.due_at))
    FROM (
        SELECT pipeline, tenant_id, priority, sum(n)::bigint AS frames, min(due_at) AS due_at
        FROM (
            SELECT pipeline, tenant_id, priority, 1 AS n, not_before AS due_at
            FROM added WHERE NOT paused
            UNION ALL
            SELECT pipeline, tenant_id, priority, -1, NULL FROM dropped WHERE NOT paused
        ) c GROUP BY 1, 2, 3
    ) r;
    RETURN NULL;
END $$
"""

REQUEUED_DELETED = """
CREATE FUNCTION requeued_deleted() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM change_shares(
        array_agg(r.pipeline), array_agg(r.tenant_id), array_agg(r.priority),
        array_agg(0::bigint), array_agg(-r.frames), array_agg(NULL::timestamptz))
    FROM (
        SELECT pipeline, tenant_id, priority, count(*) AS frames
        FROM dropped WHERE NOT paused GROUP BY 1, 2, 3
    ) r;
    RETURN NULL;
END $$
"""

# A claim counts what it takes itself, in one update of each share: see claim.sql.
NOT_BY_A_CLAIM = "coalesce(current_setting('farm.claiming', true), '') = ''"

TRIGGERS = (
    """
CREATE TRIGGER jobs_inserted AFTER INSERT ON jobs
REFERENCING NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION jobs_inserted()
""",
    f"""
CREATE TRIGGER job_changed AFTER UPDATE ON jobs FOR EACH ROW
WHEN (((OLD.open, OLD.cursor, OLD.total) IS DISTINCT FROM (NEW.open, NEW.cursor, NEW.total)
       OR OLD.paused AND NOT NEW.paused AND NEW.status IN ('queued', 'running'))
      AND {NOT_BY_A_CLAIM})
EXECUTE FUNCTION job_changed()
""",
    """
CREATE TRIGGER job_deleted AFTER DELETE ON jobs FOR EACH ROW
WHEN (OLD.open) EXECUTE FUNCTION job_changed()
""",
    """
CREATE TRIGGER requeued_inserted AFTER INSERT ON requeued_frames
REFERENCING NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION requeued_inserted()
""",
    """
CREATE TRIGGER requeued_updated AFTER UPDATE ON requeued_frames
REFERENCING OLD TABLE AS dropped NEW TABLE AS added
FOR EACH STATEMENT EXECUTE FUNCTION requeued_updated()
""",
    f"""
CREATE TRIGGER requeued_deleted AFTER DELETE ON requeued_frames
REFERENCING OLD TABLE AS dropped FOR EACH STATEMENT
WHEN ({NOT_BY_A_CLAIM}) EXECUTE FUNCTION requeued_deleted()
""",
)

# The triggers' locks keep everybody else from writing jobs and requeued frames until the commit.
COUNT = """
UPDATE shares SET
    priority = CASE WHEN w.waiting[1] > 0 THEN 0 WHEN w.waiting[2] > 0 THEN 1
                    WHEN w.waiting[3] > 0 THEN 2 END,
    retry_at = CASE WHEN r.requeued <> '{0,0,0}' THEN '-infinity'::timestamptz END,
    waiting = w.waiting,
    requeued = r.requeued
FROM shares s
CROSS JOIN LATERAL (
    SELECT array_agg(coalesce(n.frames, 0) ORDER BY p.priority) AS waiting
    FROM generate_series(0, 2) AS p (priority) CROSS JOIN LATERAL (
        SELECT sum(total - cursor)::bigint AS frames FROM jobs
        WHERE open AND pipeline = s.pipeline AND tenant_id = s.tenant_id AND priority = p.priority
    ) n
) w
CROSS JOIN LATERAL (
    SELECT array_agg(n.frames ORDER BY p.priority) AS requeued
    FROM generate_series(0, 2) AS p (priority) CROSS JOIN LATERAL (
        SELECT count(*) AS frames FROM requeued_frames
        WHERE NOT paused AND pipeline = s.pipeline AND tenant_id = s.tenant_id
          AND priority = p.priority
    ) n
) r
WHERE shares.pipeline = s.pipeline AND shares.tenant_id = s.tenant_id
"""

FUNCTIONS = {
    "requeued_deleted()": REQUEUED_DELETED,
    "requeued_updated()": REQUEUED_UPDATED,
    "requeued_inserted()": REQUEUED_INSERTED,
    "job_changed()": JOB_CHANGED,
    "jobs_inserted()": JOBS_INSERTED,
    "change_shares(text[], uuid[], smallint[], bigint[], bigint[], timestamptz[])": CHANGE_SHARES,
}

# Without them the version before is slower for the minutes of an upgrade, if many frames wait again.
OLD_INDEXES = {
    "requeued_frames_claim": ("tenant_id", "NOT paused"),
    "requeued_frames_fill": ("batch_key", "NOT paused AND NOT isolated"),
}


# Submissions lock these tables before shares. So nobody waits for this step while it waits for them.
LOCK = "LOCK TABLE jobs, requeued_frames IN SHARE ROW EXCLUSIVE MODE"


def upgrade() -> None:
    op.execute(LOCK)
    # A share that an older version inserts has these values: the next claim looks at it.
    op.add_column(
        "shares",
        sa.Column(
            "priority",
            sa.SmallInteger(),
            server_default="0",
            comment="no claimable frame is more urgent; null: there is none",
        ),
    )
    op.add_column(
        "shares",
        sa.Column(
            "retry_at",
            sa.DateTime(timezone=True),
            server_default="-infinity",
            comment="no other requeued frame is due before; null: there is none",
        ),
    )
    for name, comment in {
        "waiting": "frames of open jobs that were never claimed, by priority",
        "requeued": "requeued frames that are not paused, by priority",
    }.items():
        op.add_column(
            "shares",
            sa.Column(
                name,
                postgresql.ARRAY(sa.BigInteger()),
                nullable=False,
                server_default="{0,0,0}",
                comment=comment,
            ),
        )
    for function in reversed(FUNCTIONS.values()):
        op.execute(function)
    for trigger in TRIGGERS:
        op.execute(trigger)
    op.execute(COUNT)
    op.create_index("shares_heads", "shares", ["pipeline", "priority", "served", "tenant_id"])
    op.create_index(
        "shares_retries",
        "shares",
        ["pipeline", "retry_at"],
        postgresql_where=sa.text("retry_at IS NOT NULL"),
    )
    place = ["priority", "not_before", "job_id", "ordinal"]
    op.create_index(
        "requeued_frames_due",
        "requeued_frames",
        ["pipeline", "tenant_id", *place],
        postgresql_where=sa.text("NOT paused"),
    )
    op.create_index(
        "requeued_frames_alike",
        "requeued_frames",
        ["pipeline", "batch_key", *place],
        postgresql_where=sa.text("NOT paused AND NOT isolated"),
    )
    op.create_index(
        "requeued_frames_of_job", "requeued_frames", ["job_id", "isolated", "not_before", "ordinal"]
    )
    op.create_index(
        "jobs_oldest",
        "jobs",
        ["pipeline", "priority", "created_at"],
        postgresql_where=sa.text("open"),
    )
    for name in OLD_INDEXES:
        op.drop_index(name, table_name="requeued_frames")


def downgrade() -> None:
    for name, (column, where) in OLD_INDEXES.items():
        op.create_index(
            name,
            "requeued_frames",
            ["pipeline", column, "priority", "job_created_at", "job_id", "ordinal"],
            postgresql_where=sa.text(where),
        )
    op.drop_index("jobs_oldest", table_name="jobs")
    for name in ("of_job", "alike", "due"):
        op.drop_index(f"requeued_frames_{name}", table_name="requeued_frames")
    for name in ("retries", "heads"):
        op.drop_index(f"shares_{name}", table_name="shares")
    for name in ("requeued_inserted", "requeued_updated", "requeued_deleted"):
        op.execute(f"DROP TRIGGER {name} ON requeued_frames")
    for name in ("jobs_inserted", "job_changed", "job_deleted"):
        op.execute(f"DROP TRIGGER {name} ON jobs")
    for function in FUNCTIONS:
        op.execute(f"DROP FUNCTION {function}")
    for name in ("requeued", "waiting", "retry_at", "priority"):
        op.drop_column("shares", name)
