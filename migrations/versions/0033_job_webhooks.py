"""Webhooks that jobs name. See ADR 43."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import ARRAY

revision = "0033"
down_revision = "0032"
branch_labels = None
depends_on = None
# pre: only adds, so the version before still works. post: removes or restricts, after its end.
stage = "pre"


def upgrade() -> None:
    # First what takes long: it holds up couriers alone. Everybody reads tenants.
    op.create_index(
        "webhook_deliveries_job",
        "webhook_deliveries",
        ["job_id", "id"],
        postgresql_where=sa.text("job_id IS NOT NULL"),
    )
    op.add_column(
        "webhooks",
        sa.Column(
            "origin",
            sa.Text(),
            nullable=True,
            comment="server whose addresses jobs name; null: a tenant created the endpoint",
        ),
    )
    op.create_index(
        "webhooks_origin",
        "webhooks",
        ["tenant_id", "origin"],
        postgresql_where=sa.text("origin IS NOT NULL AND removed_at IS NULL"),
    )
    op.create_index(
        "webhooks_disabled", "webhooks", ["id"], postgresql_where=sa.text("state = 'disabled'")
    )
    op.add_column(
        "webhook_deliveries",
        sa.Column(
            "url", sa.Text(), nullable=True, comment="the job's address; null: the endpoint's"
        ),
    )
    op.create_table(
        "job_webhooks",
        sa.Column(
            "job_id", sa.Uuid(), sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True
        ),
        sa.Column("webhook_id", sa.Uuid(), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("kinds", ARRAY(sa.Text()), nullable=False),
        comment="Addresses that jobs name, to be told of them.",
    )
    op.add_column("tenants", sa.Column("webhook_secret", sa.LargeBinary(), nullable=True))
    op.add_column("tenants", sa.Column("webhook_secret_before", sa.LargeBinary(), nullable=True))
    op.add_column(
        "tenants", sa.Column("webhook_before_until", sa.DateTime(timezone=True), nullable=True)
    )


def downgrade() -> None:
    op.drop_table("job_webhooks")
    op.drop_index("webhook_deliveries_job", "webhook_deliveries")
    op.drop_column("webhook_deliveries", "url")
    op.drop_index("webhooks_disabled", "webhooks")
    op.drop_index("webhooks_origin", "webhooks")
    op.drop_column("webhooks", "origin")
    for name in ("webhook_before_until", "webhook_secret_before", "webhook_secret"):
        op.drop_column("tenants", name)
