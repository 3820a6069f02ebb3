"""Image files without metadata. See ADR 47."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0036"
down_revision = "0035"
branch_labels = None
depends_on = None
# pre: only adds, so the version before still works. post: removes or restricts, after its end.
stage = "pre"


def upgrade() -> None:
    op.add_column(
        "keys",
        sa.Column(
            "metadata", sa.Text(), nullable=True, comment="of jobs that do not say; null: full"
        ),
    )
    op.create_table(
        "frame_provenances",
        sa.Column(
            "job_id", sa.Uuid(), sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True
        ),
        sa.Column("ordinal", sa.BigInteger(), primary_key=True),
        sa.Column("attempt", sa.SmallInteger(), nullable=False),
        sa.Column("provenance", sa.Text(), nullable=False),
        comment="Of frames whose image files hold no metadata.",
    )


def downgrade() -> None:
    op.drop_table("frame_provenances")
    op.drop_column("keys", "metadata")
