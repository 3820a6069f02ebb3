"""A worker on which the frames of one tenant alone failed rests for this tenant alone."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None
stage = "pre"


def upgrade() -> None:
    op.add_column(
        "workers",
        sa.Column(
            "avoids",
            sa.Uuid(),
            nullable=True,
            comment="the tenant whose frames alone failed: it rests for this one",
        ),
    )


def downgrade() -> None:
    op.drop_column("workers", "avoids")
