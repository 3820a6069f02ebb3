"""Inputs and exports can be removed: by whoever made them, or when they have been kept long enough."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None
stage = "pre"


def upgrade() -> None:
    op.add_column("exports", sa.Column("removed_at", sa.DateTime(timezone=True), nullable=True))
    op.create_index(
        "exports_removed",
        "exports",
        ["removed_at"],
        unique=False,
        postgresql_where=sa.text("removed_at IS NOT NULL"),
    )
    op.create_index(
        "exports_finished",
        "exports",
        ["finished_at"],
        unique=False,
        postgresql_where=sa.text("finished_at IS NOT NULL AND removed_at IS NULL"),
    )
    op.create_index(
        "jobs_input",
        "jobs",
        ["input_id"],
        unique=False,
        postgresql_where=sa.text("input_id IS NOT NULL"),
    )
    op.create_index("inputs_newest", "inputs", ["tenant_id", "created_at", "id"], unique=False)
    op.create_index("inputs_oldest", "inputs", ["created_at"], unique=False)


def downgrade() -> None:
    op.drop_index("inputs_oldest", "inputs")
    op.drop_index("inputs_newest", "inputs")
    op.drop_index("jobs_input", "jobs")
    op.drop_index("exports_finished", "exports")
    op.drop_index("exports_removed", "exports")
    op.drop_column("exports", "removed_at")
