"""How long a job's frames were on a device: what a quote for another is made from."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None
stage = "pre"


def upgrade() -> None:
    op.add_column(
        "jobs",
        sa.Column(
            "device_seconds",
            sa.Double(),
            server_default=sa.text("0"),
            nullable=False,
            comment="that its succeeded frames were denoised for",
        ),
    )


def downgrade() -> None:
    op.drop_column("jobs", "device_seconds")
