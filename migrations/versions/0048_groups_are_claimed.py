"""From here on a job may have groups: see ADR 60. An older version would claim its frames in a wrong order.

So the triggers for claims of versions before step 29 go.
"""

from __future__ import annotations

from alembic import op

revision = "0048"
down_revision = "0047"
branch_labels = None
depends_on = None
# pre: only adds, so the version before still works. post: removes or restricts, after its end.
stage = "post"

JOB_CLAIMED = """
CREATE FUNCTION job_claimed_before() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM change_shares(
        ARRAY[OLD.pipeline], ARRAY[OLD.tenant_id], ARRAY[OLD.priority],
        ARRAY[0], ARRAY[0], ARRAY[NULL::timestamptz], ARRAY[
            CASE WHEN NEW.open THEN remaining_cost(NEW.runs, NEW.cursor) ELSE 0 END
            - CASE WHEN OLD.open THEN remaining_cost(OLD.runs, OLD.cursor) ELSE 0 END]);
    RETURN NULL;
END $$
"""
REQUEUED_CLAIMED = """
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
"""
TRIGGERS = (
    """
CREATE TRIGGER job_claimed_before AFTER UPDATE ON jobs FOR EACH ROW
WHEN ((OLD.open, OLD.cursor) IS DISTINCT FROM (NEW.open, NEW.cursor)
      AND current_setting('farm.claiming', true) = 'yes')
EXECUTE FUNCTION job_claimed_before()
""",
    """
CREATE TRIGGER requeued_claimed_before AFTER DELETE ON requeued_frames
REFERENCING OLD TABLE AS dropped FOR EACH STATEMENT
WHEN (current_setting('farm.claiming', true) = 'yes')
EXECUTE FUNCTION requeued_claimed_before()
""",
)


def upgrade() -> None:
    op.execute("DROP TRIGGER job_claimed_before ON jobs")
    op.execute("DROP TRIGGER requeued_claimed_before ON requeued_frames")
    op.execute("DROP FUNCTION job_claimed_before")
    op.execute("DROP FUNCTION requeued_claimed_before")


def downgrade() -> None:
    op.execute("""
DO $$ BEGIN
    IF EXISTS (SELECT FROM jobs WHERE stretch IS NOT NULL AND removed_at IS NULL) THEN
        RAISE EXCEPTION 'Jobs with groups are stored, which an older version would claim wrongly. '
                        'Remove them first.';
    END IF;
END $$
""")
    for statement in (JOB_CLAIMED, REQUEUED_CLAIMED, *TRIGGERS):
        op.execute(statement)
