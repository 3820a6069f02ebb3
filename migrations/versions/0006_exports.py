"""Exports: datasets in the making, with a row for each shard."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None
stage = "pre"


def upgrade() -> None:
    zero = sa.text("0")
    now = sa.text("clock_timestamp()")
    op.create_table(
        "exports",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("job_ids", sa.ARRAY(sa.Uuid()), nullable=False),
        sa.Column("shard_frames", sa.Integer(), nullable=False),
        sa.Column("bucket", sa.Text(), nullable=False),
        sa.Column("prefix", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), server_default="running", nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("shards", sa.Integer(), nullable=False),
        sa.Column("shards_done", sa.Integer(), server_default=zero, nullable=False),
        sa.Column("pictures", sa.BigInteger(), server_default=zero, nullable=False),
        sa.Column("missing", sa.BigInteger(), server_default=zero, nullable=False),
        sa.Column("bytes", sa.BigInteger(), server_default=zero, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=now, nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "kind IN ('webdataset', 'parquet', 'imagefolder')", name=op.f("exports_kind_check")
        ),
        sa.CheckConstraint(
            "state IN ('running', 'succeeded', 'failed')", name=op.f("exports_state_check")
        ),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("exports_tenant_id_fkey")),
        sa.PrimaryKeyConstraint("id", name=op.f("exports_pkey")),
    )
    op.create_index("exports_newest", "exports", ["tenant_id", "created_at", "id"], unique=False)
    op.create_index(
        "exports_running",
        "exports",
        ["created_at"],
        unique=False,
        postgresql_where=sa.text("state = 'running'"),
    )
    op.create_table(
        "export_shards",
        sa.Column("export_id", sa.Uuid(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=True, comment="null: the cover, which comes last"),
        sa.Column("first", sa.BigInteger(), nullable=False, comment="ordinal of its first frame"),
        sa.Column("stop", sa.BigInteger(), nullable=False),
        sa.Column(
            "base",
            sa.BigInteger(),
            nullable=False,
            comment="added to an ordinal it names a picture",
        ),
        sa.Column("attempt", sa.SmallInteger(), server_default=zero, nullable=False),
        sa.Column("failures", sa.SmallInteger(), server_default=zero, nullable=False),
        sa.Column("worker", sa.Text(), nullable=True),
        sa.Column("due_at", sa.DateTime(timezone=True), server_default=now, nullable=False),
        sa.Column("done_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("rows", sa.Integer(), nullable=True),
        sa.Column("missing", sa.Integer(), nullable=True),
        sa.Column("files", postgresql.JSONB(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(
            ["export_id"],
            ["exports.id"],
            name=op.f("export_shards_export_id_fkey"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("export_id", "number", name=op.f("export_shards_pkey")),
    )
    op.create_index(
        "export_shards_due",
        "export_shards",
        ["export_id", "number"],
        unique=False,
        postgresql_where=sa.text("done_at IS NULL"),
    )


def downgrade() -> None:
    op.drop_table("export_shards")
    op.drop_table("exports")
