"""Whether an input's prompts can be read as weighted ones is looked at once."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None
stage = "pre"


def upgrade() -> None:
    op.add_column(
        "inputs",
        sa.Column(
            "syntax_flaw",
            sa.Text(),
            nullable=True,
            comment="of its prompts as weighted ones; null: not looked at yet",
        ),
    )


def downgrade() -> None:
    op.drop_column("inputs", "syntax_flaw")
