"""Usage by day, tenant, pipeline and labels, which outlives the jobs. See ADR 55."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0043"
down_revision = "0042"
branch_labels = None
depends_on = None
# pre: only adds, so the version before still works. post: removes or restricts, after its end.
stage = "pre"


def _figures() -> list[sa.Column[object]]:
    return [
        sa.Column("frames", sa.BigInteger(), nullable=False),
        sa.Column("device_seconds", sa.Double(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("failed", sa.BigInteger(), nullable=False, comment="attempts"),
    ]


def upgrade() -> None:
    op.create_table(
        "usage",
        sa.Column("tenant_id", sa.Uuid(), primary_key=True),
        sa.Column("day", sa.Date(), primary_key=True, comment="UTC"),
        sa.Column("pipeline", sa.Text(), primary_key=True),
        sa.Column("digest", sa.Text(), primary_key=True, comment="md5 of the labels"),
        sa.Column("labels", JSONB(), nullable=False),
        *_figures(),
        comment="What jobs used. It outlives them.",
    )
    op.create_index("usage_day", "usage", ["day"])
    op.create_table(
        "accounted",
        sa.Column("job_id", sa.Uuid(), primary_key=True),
        *_figures(),
        comment="What of a job is in `usage` already.",
    )
    op.create_table(
        "usage_mark",
        sa.Column("number", sa.SmallInteger(), primary_key=True, autoincrement=False),
        sa.Column(
            "finished_at",
            sa.DateTime(timezone=True),
            comment="jobs that ended before are in `usage`; null: none is",
        ),
        sa.Column("noted_at", sa.DateTime(timezone=True), comment="time of the last note"),
        comment="One row: how far `usage` is.",
    )


def downgrade() -> None:
    for name in ("usage_mark", "accounted", "usage"):
        op.drop_table(name)
