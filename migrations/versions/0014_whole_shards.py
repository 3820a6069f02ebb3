"""Shards of exports are whole when an event says so, and tenants take turns."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None
stage = "pre"


def upgrade() -> None:
    op.create_table(
        "export_news",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column(
            "job_id",
            sa.Uuid(),
            nullable=False,
            comment="some of its frames have ended",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("export_news_pkey")),
    )
    op.add_column("exports", sa.Column("claimed_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column(
        "export_shards",
        sa.Column(
            "whole",
            sa.Boolean(),
            nullable=True,
            comment="whether it may be written; null: not looked at yet",
        ),
    )
    op.create_index(
        "export_shards_new",
        "export_shards",
        ["export_id"],
        unique=False,
        postgresql_where=sa.text("whole IS NULL"),
    )
    op.create_index(
        "export_shards_waiting",
        "export_shards",
        ["job_id"],
        unique=False,
        postgresql_where=sa.text("whole IS NOT TRUE"),
    )
    op.create_index(
        "export_shards_ready",
        "export_shards",
        ["due_at"],
        unique=False,
        postgresql_where=sa.text("whole AND done_at IS NULL"),
    )


def downgrade() -> None:
    op.drop_index("export_shards_ready", "export_shards")
    op.drop_index("export_shards_waiting", "export_shards")
    op.drop_index("export_shards_new", "export_shards")
    op.drop_column("export_shards", "whole")
    op.drop_column("exports", "claimed_at")
    op.drop_table("export_news")
