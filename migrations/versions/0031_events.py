"""Events for readers: transaction IDs, servers that wrote them, events without a job. See ADR 40."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0031"
down_revision = "0030"
branch_labels = None
depends_on = None
# pre: only adds, so the version before still works. post: removes or restricts, after its end.
stage = "pre"

BEGIN_EPOCH = """
INSERT INTO event_epochs (id, system, timeline, last_before)
SELECT substr(md5(random()::text), 1, 8), system_identifier || '/' || 'events'::regclass::oid,
       left(pg_walfile_name(pg_current_wal_lsn()), 8), coalesce((SELECT max(id) FROM events), 0)
FROM pg_control_system()
"""


def upgrade() -> None:
    # Two steps: the constant rewrites no row, and later rows get the second default.
    op.add_column(
        "events",
        sa.Column(
            "xid",
            sa.BigInteger(),
            nullable=False,
            server_default=sa.text("0"),
            comment="transaction that wrote it; 0: written before version 31 of the schema",
        ),
    )
    op.alter_column("events", "xid", server_default=sa.text("pg_current_xact_id()::text::bigint"))
    op.alter_column(
        "events", "job_id", nullable=True, comment="null: of an export, or of the tenant"
    )
    # Earlier events are not in it, so it is made in one scan, without a sort.
    op.create_index(
        "events_tenant",
        "events",
        ["tenant_id", "xid", "id"],
        postgresql_where=sa.text("xid > 0"),
    )
    op.create_table(
        "event_epochs",
        sa.Column("id", sa.Text(), primary_key=True),
        sa.Column(
            "system",
            sa.Text(),
            nullable=False,
            comment="identifiers of the server's data, and of the table",
        ),
        sa.Column("timeline", sa.Text(), nullable=False),
        sa.Column(
            "last_before", sa.BigInteger(), nullable=False, comment="last event of another system"
        ),
        sa.Column(
            "began_at",
            sa.DateTime(timezone=True),
            nullable=False,
            server_default=sa.func.clock_timestamp(),
        ),
        sa.UniqueConstraint("system", "timeline"),
        comment="Servers that wrote events. Each counts its transactions from the beginning.",
    )
    # Earlier events have no transaction, so readers of a tenant begin with this server's.
    op.execute(BEGIN_EPOCH)


def downgrade() -> None:
    op.drop_table("event_epochs")
    op.drop_index("events_tenant", table_name="events")
    op.execute("DELETE FROM events WHERE job_id IS NULL")
    op.alter_column("events", "job_id", nullable=False, comment=None)
    op.drop_column("events", "xid")
