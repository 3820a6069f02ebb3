"""Deadlines of jobs. See ADR 46."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0035"
down_revision = "0034"
branch_labels = None
depends_on = None
# pre: only adds, so the version before still works. post: removes or restricts, after its end.
stage = "pre"


def upgrade() -> None:
    op.add_column(
        "jobs",
        sa.Column(
            "due_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="next time at which it may miss a deadline",
        ),
    )
    op.add_column(
        "jobs",
        sa.Column("missed", sa.Text(), nullable=True, comment="field whose deadline ended the job"),
    )
    op.create_index(
        "jobs_due", "jobs", ["tenant_id", "due_at"], postgresql_where=sa.text("due_at IS NOT NULL")
    )


def downgrade() -> None:
    op.drop_index("jobs_due", "jobs")
    for name in ("missed", "due_at"):
        op.drop_column("jobs", name)
