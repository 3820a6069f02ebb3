"""Samples of each lane, a minute apart, for charts. See ADR 53."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import ARRAY

revision = "0041"
down_revision = "0040"
branch_labels = None
depends_on = None
# pre: only adds, so the version before still works. post: removes or restricts, after its end.
stage = "pre"

GAUGES = ("workers", "able", "rendering", "loading", "failed", "draining")
COUNTS = ("succeeded", "requeued", "dead", "dropped", "expired", "batches")
SECONDS = ("denoise_seconds", "encode_seconds", "put_seconds", "commit_seconds", "work_seconds")


def upgrade() -> None:
    op.create_table(
        "samples",
        sa.Column("step", sa.SmallInteger(), primary_key=True, comment="60, 600 or 3600 seconds"),
        sa.Column("pipeline", sa.Text(), primary_key=True),
        sa.Column("at", sa.DateTime(timezone=True), primary_key=True, comment="end of the step"),
        sa.Column(
            "read_at",
            sa.DateTime(timezone=True),
            nullable=False,
            comment="time at which the sums were read",
        ),
        sa.Column(
            "waiting",
            ARRAY(sa.BigInteger()),
            nullable=False,
            comment="frames that wait, by priority",
        ),
        *(sa.Column(name, sa.REAL(), nullable=False) for name in GAUGES),
        *(sa.Column(name, sa.BigInteger(), nullable=False) for name in COUNTS),
        *(sa.Column(name, sa.Double(), nullable=False) for name in SECONDS),
        sa.Column(
            "wait_buckets",
            ARRAY(sa.BigInteger()),
            nullable=False,
            comment="histograms of waits, by priority",
        ),
        comment="Means of what is now, and sums since the beginning, for charts.",
    )
    op.create_index("samples_at", "samples", ["step", "at"])


def downgrade() -> None:
    op.drop_table("samples")
