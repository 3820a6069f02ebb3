"""Lists of jobs that a key has saved."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0038"
down_revision = "0037"
branch_labels = None
depends_on = None
# pre: only adds, so the version before still works. post: removes or restricts, after its end.
stage = "pre"


def upgrade() -> None:
    op.create_table(
        "saved_views",
        sa.Column(
            "key_id", sa.Uuid(), sa.ForeignKey("keys.id", ondelete="CASCADE"), primary_key=True
        ),
        sa.Column("name", sa.Text(), primary_key=True),
        sa.Column("address", sa.Text(), nullable=False, comment="of the page `/`, with its query"),
        comment="Lists of jobs that a key has saved.",
    )


def downgrade() -> None:
    op.drop_table("saved_views")
