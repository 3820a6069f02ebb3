"""Control images."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None
stage = "pre"


def upgrade() -> None:
    op.create_table(
        "images",
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column(
            "sha256", sa.LargeBinary(), nullable=False, comment="of the PNG in S3; in hex its id"
        ),
        sa.Column("width", sa.Integer(), nullable=False),
        sa.Column("height", sa.Integer(), nullable=False),
        sa.Column("bytes", sa.Integer(), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("images_tenant_id_fkey")),
        sa.PrimaryKeyConstraint("tenant_id", "sha256", name=op.f("images_pkey")),
    )


def downgrade() -> None:
    op.drop_table("images")
