"""Device cost that lanes owe to less urgent work: see ADR 36."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0026"
down_revision = "0025"
branch_labels = None
depends_on = None
# pre: only adds, so the version before still works. post: removes or restricts, after its end.
stage = "pre"


def upgrade() -> None:
    op.create_table(
        "lanes",
        sa.Column("pipeline", sa.Text(), primary_key=True),
        sa.Column(
            "owed",
            postgresql.ARRAY(sa.Double()),
            nullable=False,
            comment="device cost owed to less urgent work: by interactive, and by normal batches",
        ),
    )


def downgrade() -> None:
    op.drop_table("lanes")
