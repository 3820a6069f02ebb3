"""The log of actions also has what changed by itself, and the lane that a row is about. See ADR 56."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0045"
down_revision = "0044"
branch_labels = None
depends_on = None
# pre: only adds, so the version before still works. post: removes or restricts, after its end.
stage = "pre"


def upgrade() -> None:
    op.add_column(
        "actions",
        sa.Column(
            "lane", sa.Text(), comment="lane that it is about; empty: every lane; null: none"
        ),
    )
    op.create_index(
        "actions_lane", "actions", ["lane", "at"], postgresql_where=sa.text("lane IS NOT NULL")
    )


def downgrade() -> None:
    op.drop_index("actions_lane", table_name="actions")
    op.drop_column("actions", "lane")
