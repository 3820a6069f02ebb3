"""What healing needs: workers that rest, frames in a smaller bucket, jobs that are removed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None
stage = "pre"


def upgrade() -> None:
    op.add_column(
        "workers",
        sa.Column(
            "failing",
            sa.ARRAY(sa.Text()),
            server_default="{}",
            nullable=False,
            comment="different frames that failed since one last succeeded",
        ),
    )
    op.add_column(
        "workers",
        sa.Column("rests", sa.SmallInteger(), server_default=sa.text("0"), nullable=False),
    )
    op.add_column("workers", sa.Column("resting_until", sa.DateTime(timezone=True), nullable=True))
    op.add_column(
        "workers",
        sa.Column(
            "load_seconds",
            sa.Double(),
            nullable=True,
            comment="what its child took to load the pipeline",
        ),
    )
    op.add_column(
        "frames",
        sa.Column(
            "bucket",
            sa.SmallInteger(),
            nullable=True,
            comment="what its latest attempt was claimed in",
        ),
    )
    op.add_column(
        "frames",
        sa.Column(
            "alone",
            sa.Boolean(),
            server_default=sa.text("false"),
            nullable=False,
            comment="an attempt at it failed: no neighbours again",
        ),
    )
    op.add_column(
        "leases",
        sa.Column(
            "kept",
            sa.Boolean(),
            server_default=sa.text("false"),
            nullable=False,
            comment="its batch is rendered, and waits for the storage",
        ),
    )
    op.add_column("jobs", sa.Column("removed_at", sa.DateTime(timezone=True), nullable=True))
    op.create_index(
        "jobs_finished",
        "jobs",
        ["finished_at"],
        unique=False,
        postgresql_where=sa.text("finished_at IS NOT NULL AND removed_at IS NULL"),
    )
    op.create_index(
        "jobs_removed",
        "jobs",
        ["removed_at"],
        unique=False,
        postgresql_where=sa.text("removed_at IS NOT NULL"),
    )


def downgrade() -> None:
    op.drop_index("jobs_removed", table_name="jobs")
    op.drop_index("jobs_finished", table_name="jobs")
    op.drop_column("jobs", "removed_at")
    op.drop_column("leases", "kept")
    op.drop_column("frames", "alone")
    op.drop_column("frames", "bucket")
    op.drop_column("workers", "load_seconds")
    op.drop_column("workers", "resting_until")
    op.drop_column("workers", "rests")
    op.drop_column("workers", "failing")
