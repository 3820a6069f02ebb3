"""Histograms of durations, and pictures kept on disk, on the workers' rows."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None
# pre: only adds, so the version before still works. post: removes or restricts, after its end.
stage = "pre"

HISTOGRAMS = {
    "denoise_buckets": "number of batches by seconds of denoising; see histograms.py",
    "wait_buckets": "number of jobs by priority and by seconds until their first claim",
}


def upgrade() -> None:
    for name, text in HISTOGRAMS.items():
        array = postgresql.ARRAY(sa.BigInteger())
        op.add_column(
            "workers", sa.Column(name, array, nullable=False, server_default="{}", comment=text)
        )
    op.add_column(
        "workers",
        sa.Column("spool_bytes", sa.BigInteger(), comment="pictures on its disk, not stored yet"),
    )
    op.add_column(
        "workers", sa.Column("spool_limit_bytes", sa.BigInteger(), comment="maximum of spool_bytes")
    )


def downgrade() -> None:
    for name in ("spool_limit_bytes", "spool_bytes", *HISTOGRAMS):
        op.drop_column("workers", name)
