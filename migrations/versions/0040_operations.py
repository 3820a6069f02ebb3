"""Operations on many jobs, and changes of a job's priority. See ADR 52."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0040"
down_revision = "0039"
branch_labels = None
depends_on = None
# pre: only adds, so the version before still works. post: removes or restricts, after its end.
stage = "pre"

# What waits of an open job is counted by priority, so it moves with it. See `change_shares`.
JOB_REPRIORITIZED = """
CREATE FUNCTION job_reprioritized() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM change_shares(
        ARRAY[NEW.pipeline, NEW.pipeline], ARRAY[NEW.tenant_id, NEW.tenant_id],
        ARRAY[OLD.priority, NEW.priority],
        ARRAY[NEW.cursor - NEW.total, NEW.total - NEW.cursor], ARRAY[0, 0],
        ARRAY[NULL, NULL]::timestamptz[], ARRAY[0, 0]::numeric[]);
    RETURN NULL;
END $$
"""
TRIGGER = """
CREATE TRIGGER job_reprioritized AFTER UPDATE OF priority ON jobs FOR EACH ROW
WHEN (OLD.priority <> NEW.priority AND NEW.open)
EXECUTE FUNCTION job_reprioritized()
"""


def upgrade() -> None:
    op.create_index(
        "jobs_dead",
        "jobs",
        ["created_at", "id"],
        postgresql_where=sa.text("dead > 0 AND removed_at IS NULL"),
    )
    op.execute(JOB_REPRIORITIZED)
    op.execute(TRIGGER)
    op.create_table(
        "operations",
        sa.Column("id", sa.Uuid(), primary_key=True),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            nullable=False,
            server_default=sa.text("clock_timestamp()"),
        ),
        sa.Column("verb", sa.Text(), nullable=False),
        sa.Column("args", JSONB(), nullable=False, comment="arguments of the verb"),
        sa.Column("tenant_id", sa.Uuid(), comment="owner of the jobs; null: all tenants"),
        sa.Column("filter", JSONB(), nullable=False, comment="JobFilter, with the time `until`"),
        sa.Column("key_id", sa.Uuid(), nullable=False),
        sa.Column("who", sa.Text(), nullable=False, comment="name of the key"),
        sa.Column("role", sa.Text(), nullable=False, comment="role of the key"),
        sa.Column("home", sa.Text(), nullable=False, comment="tenant of the key"),
        sa.Column("via", sa.Text(), nullable=False, comment="api, page or shell"),
        sa.Column("address", sa.Text(), nullable=False, comment="network address of the client"),
        sa.Column("why", sa.Text(), nullable=False),
        sa.Column("expected", sa.BigInteger(), nullable=False, comment="jobs that matched first"),
        sa.Column("done", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("skipped", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("failed", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("problem", sa.Text(), comment="first failure"),
        sa.Column("state", sa.Text(), nullable=False, server_default="running"),
        sa.Column("at_time", sa.DateTime(timezone=True), comment="created_at of the last job"),
        sa.Column("at_id", sa.Uuid(), comment="ID of the last job that it handled"),
        sa.Column("stepped_at", sa.DateTime(timezone=True)),
        sa.Column("ended_at", sa.DateTime(timezone=True)),
        sa.CheckConstraint("state IN ('running', 'stopped', 'ended')", name="state"),
    )
    op.create_index("operations_newest", "operations", ["created_at", "id"])
    op.create_index("operations_of_tenant", "operations", ["tenant_id", "created_at", "id"])
    op.create_index(
        "operations_running",
        "operations",
        ["stepped_at"],
        postgresql_where=sa.text("state = 'running'"),
    )
    op.add_column(
        "actions", sa.Column("operation_id", sa.Uuid(), comment="operation that it is part of")
    )
    op.create_index(
        "actions_operation",
        "actions",
        ["operation_id", "id"],
        postgresql_where=sa.text("operation_id IS NOT NULL"),
    )


def downgrade() -> None:
    op.drop_index("actions_operation", table_name="actions")
    op.drop_column("actions", "operation_id")
    op.drop_table("operations")
    op.execute("DROP TRIGGER job_reprioritized ON jobs")
    op.execute("DROP FUNCTION job_reprioritized()")
    op.drop_index("jobs_dead", table_name="jobs")
