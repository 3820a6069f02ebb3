"""Pausing and cancelling write a job's row alone; its returned frames follow later."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None
stage = "pre"


def upgrade() -> None:
    op.add_column(
        "jobs",
        sa.Column(
            "behind_from",
            sa.BigInteger(),
            nullable=True,
            comment="returned frames from this ordinal on do not follow yet what the job was told",
        ),
    )
    op.create_index(
        "jobs_behind",
        "jobs",
        ["id"],
        unique=False,
        postgresql_where=sa.text("behind_from IS NOT NULL"),
    )


def downgrade() -> None:
    op.drop_index("jobs_behind", "jobs")
    op.drop_column("jobs", "behind_from")
