"""Failed attempts by cause. See ADR 54."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0042"
down_revision = "0041"
branch_labels = None
depends_on = None
# pre: only adds, so the version before still works. post: removes or restricts, after its end.
stage = "pre"


def upgrade() -> None:
    op.add_column(
        "attempts",
        sa.Column("fault", sa.Text(), comment="its cause, 16 hexadecimal digits; null: none"),
    )
    op.create_table(
        "faults",
        sa.Column("fault", sa.Text(), primary_key=True),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False, comment="of its first attempt"),
        sa.Column("first_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("last_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("state", sa.Text(), nullable=False, server_default="new"),
        sa.Column("note", sa.Text(), nullable=False, server_default=""),
        sa.Column("changed_at", sa.DateTime(timezone=True), comment="of state and note"),
        sa.CheckConstraint("state IN ('new', 'seen', 'muted', 'resolved')", name="state"),
        comment="Causes of failed attempts.",
    )
    op.create_index("faults_last", "faults", ["last_at"])


def downgrade() -> None:
    op.drop_table("faults")
    op.drop_column("attempts", "fault")
