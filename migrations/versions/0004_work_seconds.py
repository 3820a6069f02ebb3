"""How long a worker had something to render: beside denoise_seconds it tells how busy its device is."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None
stage = "pre"


def upgrade() -> None:
    op.add_column(
        "workers",
        sa.Column(
            "work_seconds",
            sa.Double(),
            server_default=sa.text("0"),
            nullable=False,
            comment="on the wall, while there was something to render",
        ),
    )


def downgrade() -> None:
    op.drop_column("workers", "work_seconds")
