"""Webhooks: endpoints, events that wait for their messages, and deliveries. See ADR 42."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

revision = "0032"
down_revision = "0031"
branch_labels = None
depends_on = None
# pre: only adds, so the version before still works. post: removes or restricts, after its end.
stage = "pre"

# In the transaction of the event, so that no event is missed. Tenants without an endpoint cost one
# probe.
NOTE = """
CREATE FUNCTION note_webhook_events() RETURNS trigger LANGUAGE plpgsql
SET enable_seqscan = off SET plan_cache_mode = force_generic_plan AS $$
BEGIN
    INSERT INTO webhook_events (event_id)
    SELECT a.id FROM added a
    CROSS JOIN LATERAL (
        SELECT FROM webhooks w
        WHERE w.tenant_id = a.tenant_id AND w.state <> 'disabled' AND w.removed_at IS NULL LIMIT 1
    ) w
    WHERE a.kind <> ALL (ARRAY[  -- there are no messages about these
        'frames.claimed', 'frames.released', 'frames.retried', 'job.queued', 'job.paused',
        'job.resumed', 'job.removed', 'export.queued', 'export.removed', 'limits.changed']);
    RETURN NULL;
END $$
"""
TRIGGER = """
CREATE TRIGGER note_webhook_events AFTER INSERT ON events
REFERENCING NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION note_webhook_events()
"""


def moment(name: str, *, now: bool = False) -> sa.Column[datetime]:
    return sa.Column(
        name,
        sa.DateTime(timezone=True),
        nullable=not now,
        server_default=sa.func.clock_timestamp() if now else None,
    )


def upgrade() -> None:
    op.create_table(
        "webhooks",
        sa.Column("id", sa.Uuid(), primary_key=True),
        sa.Column("tenant_id", sa.Uuid(), sa.ForeignKey("tenants.id"), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("kinds", ARRAY(sa.Text()), nullable=False),
        sa.Column("labels", JSONB(), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False, server_default="enabled"),
        sa.Column("disabled_because", sa.Text()),
        sa.Column("secret", sa.LargeBinary(), nullable=False),
        sa.Column("secret_before", sa.LargeBinary()),
        moment("before_until"),
        moment("created_at", now=True),
        sa.Column(
            "failures",
            sa.Integer(),
            nullable=False,
            server_default=sa.text("0"),
            comment="attempts that failed since the last success",
        ),
        moment("failing_since"),
        moment("last_success_at"),
        sa.Column(
            "parked_until",
            sa.DateTime(timezone=True),
            comment="its deliveries wait until then; null: it is not parked",
        ),
        moment("served_at"),
        moment("removed_at"),
        sa.CheckConstraint(
            "state IN ('enabled', 'paused', 'disabled')", name="webhooks_state_check"
        ),
        comment="Endpoints of tenants that are told of events.",
    )
    op.create_index("webhooks_tenant", "webhooks", ["tenant_id"])
    op.create_table(
        "webhook_events",
        sa.Column("event_id", sa.BigInteger(), primary_key=True, autoincrement=False),
        comment="Events whose messages are not made yet.",
    )
    op.create_table(
        "webhook_deliveries",
        sa.Column("id", sa.BigInteger(), sa.Identity(), primary_key=True),
        sa.Column(
            "webhook_id",
            sa.Uuid(),
            sa.ForeignKey("webhooks.id", ondelete="CASCADE"),
            nullable=False,
        ),
        sa.Column("message_id", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("job_id", sa.Uuid()),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False, server_default="pending"),
        sa.Column("tries", sa.SmallInteger(), nullable=False, server_default=sa.text("0")),
        moment("next_at", now=True),
        sa.Column(
            "leased_until",
            sa.DateTime(timezone=True),
            comment="an attempt may be in progress until then",
        ),
        moment("created_at", now=True),
        sa.UniqueConstraint("webhook_id", "message_id"),
        sa.CheckConstraint(
            "state IN ('pending', 'retrying', 'succeeded', 'dead', 'dropped')",
            name="webhook_deliveries_state_check",
        ),
        comment="Messages, one row for each endpoint that gets it.",
    )
    op.create_index(
        "webhook_deliveries_due",
        "webhook_deliveries",
        ["webhook_id", "next_at"],
        postgresql_where=sa.text("state IN ('pending', 'retrying')"),
    )
    op.create_index(
        "webhook_deliveries_leased",
        "webhook_deliveries",
        ["webhook_id"],
        postgresql_where=sa.text("leased_until IS NOT NULL"),
    )
    op.create_index("webhook_deliveries_log", "webhook_deliveries", ["webhook_id", "id"])
    op.create_index("webhook_deliveries_age", "webhook_deliveries", ["created_at"])
    op.create_table(
        "webhook_attempts",
        sa.Column(
            "delivery_id",
            sa.BigInteger(),
            sa.ForeignKey("webhook_deliveries.id", ondelete="CASCADE"),
            primary_key=True,
        ),
        sa.Column("number", sa.SmallInteger(), primary_key=True),
        moment("at", now=True),
        sa.Column("milliseconds", sa.Integer(), nullable=False),
        sa.Column("status", sa.SmallInteger()),
        sa.Column("error", sa.Text()),
        sa.Column("answer", sa.Text(), nullable=False),
        comment="Attempts to deliver a message, with the receiver's answers.",
    )
    op.execute(NOTE)
    op.execute(TRIGGER)


def downgrade() -> None:
    op.execute("DROP TRIGGER note_webhook_events ON events")
    op.execute("DROP FUNCTION note_webhook_events()")
    for table in ("webhook_attempts", "webhook_deliveries", "webhook_events", "webhooks"):
        op.drop_table(table)
