"""What a watcher asks of a job, counted as it goes: its pace, its failures, what it takes up."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None
stage = "pre"


def upgrade() -> None:
    op.add_column(
        "jobs",
        sa.Column(
            "bytes",
            sa.BigInteger(),
            server_default=sa.text("0"),
            nullable=False,
            comment="of its pictures",
        ),
    )
    op.add_column(
        "jobs",
        sa.Column(
            "failures",
            postgresql.JSONB(astext_type=sa.Text()),
            server_default="{}",
            nullable=False,
            comment="attempts that did not succeed, by reason",
        ),
    )
    for name in ("pace_since", "pace_next"):
        op.add_column("jobs", sa.Column(name, sa.DateTime(timezone=True), nullable=True))
        op.add_column(
            "jobs",
            sa.Column(
                f"{name}_frames", sa.BigInteger(), server_default=sa.text("0"), nullable=False
            ),
        )


def downgrade() -> None:
    for name in ("pace_since", "pace_next"):
        op.drop_column("jobs", f"{name}_frames")
        op.drop_column("jobs", name)
    op.drop_column("jobs", "failures")
    op.drop_column("jobs", "bytes")
