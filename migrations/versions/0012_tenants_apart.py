"""Tenants apart: where each may export to, what operators did, and tenants that are removed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None
stage = "pre"


def upgrade() -> None:
    op.create_table(
        "actions",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column(
            "at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.Column("key_id", sa.Uuid(), nullable=False),
        sa.Column("who", sa.Text(), nullable=False, comment="the key's name"),
        sa.Column("tenant", sa.Text(), nullable=False, comment="the key's"),
        sa.Column("address", sa.Text(), nullable=False, comment="of the client"),
        sa.Column("verb", sa.Text(), nullable=False),
        sa.Column("target", sa.Text(), nullable=False),
        sa.Column("why", sa.Text(), nullable=False),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("actions_pkey")),
    )
    op.create_table(
        "destinations",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("bucket", sa.Text(), nullable=False),
        sa.Column(
            "prefix",
            sa.Text(),
            nullable=False,
            comment="of the keys: empty, or ends with a slash",
        ),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.ForeignKeyConstraint(
            ["tenant_id"], ["tenants.id"], name=op.f("destinations_tenant_id_fkey")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("destinations_pkey")),
        sa.UniqueConstraint(
            "tenant_id", "bucket", "prefix", name=op.f("destinations_tenant_id_bucket_prefix_key")
        ),
    )
    op.add_column("tenants", sa.Column("removed_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("tenants", sa.Column("emptied_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column(
        "images",
        sa.Column(
            "state",
            sa.Text(),
            server_default="kept",
            nullable=False,
            comment="kept; arriving or removing: its object may not be there",
        ),
    )
    op.create_index(
        "images_removing",
        "images",
        ["tenant_id"],
        unique=False,
        postgresql_where=sa.text("state = 'removing'"),
    )


def downgrade() -> None:
    op.drop_index("images_removing", "images")
    op.drop_column("images", "state")
    op.drop_column("tenants", "emptied_at")
    op.drop_column("tenants", "removed_at")
    op.drop_table("destinations")
    op.drop_table("actions")
