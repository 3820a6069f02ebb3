"""Inputs: prompts by the million that jobs name instead of holding them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None
stage = "pre"


def upgrade() -> None:
    op.create_table(
        "inputs",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column(
            "sha256", sa.LargeBinary(), nullable=False, comment="of its lines as they were sent"
        ),
        sa.Column("lines", sa.BigInteger(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("shown", sa.ARRAY(sa.Text()), nullable=False, comment="its first prompts"),
        sa.Column("top_seed", sa.BigInteger(), nullable=True),
        sa.Column(
            "text_bytes", sa.Integer(), nullable=False, comment="of a line's prompts, at most"
        ),
        sa.Column("keys", sa.Boolean(), nullable=False),
        sa.Column("negatives", sa.Boolean(), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("inputs_tenant_id_fkey")),
        sa.PrimaryKeyConstraint("id", name=op.f("inputs_pkey")),
        sa.UniqueConstraint("tenant_id", "sha256", name=op.f("inputs_tenant_id_sha256_key")),
    )
    op.create_table(
        "input_parts",
        sa.Column("input_id", sa.Uuid(), nullable=False),
        sa.Column(
            "first", sa.BigInteger(), nullable=False, comment="index of the part's first line"
        ),
        sa.Column("content", sa.LargeBinary(), nullable=False, comment="lines of JSON, by zlib"),
        sa.ForeignKeyConstraint(
            ["input_id"],
            ["inputs.id"],
            name=op.f("input_parts_input_id_fkey"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("input_id", "first", name=op.f("input_parts_pkey")),
    )
    op.add_column(
        "jobs",
        sa.Column(
            "input_id",
            sa.Uuid(),
            sa.ForeignKey("inputs.id", name=op.f("jobs_input_id_fkey")),
            nullable=True,
        ),
    )


def downgrade() -> None:
    op.drop_column("jobs", "input_id")
    op.drop_table("input_parts")
    op.drop_table("inputs")
