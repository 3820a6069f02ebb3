"""Pictures that filters reject and that are drawn again; and pictures that are used again."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None
stage = "pre"


def upgrade() -> None:
    op.add_column(
        "frames",
        sa.Column(
            "redraws",
            sa.SmallInteger(),
            server_default=sa.text("0"),
            nullable=False,
            comment="how often a filter rejected its picture",
        ),
    )
    op.add_column(
        "frames",
        sa.Column(
            "reused",
            sa.Boolean(),
            server_default=sa.text("false"),
            nullable=False,
            comment="its picture is that of another frame",
        ),
    )
    op.add_column(
        "jobs",
        sa.Column("reused", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
    )
    op.create_table(
        "prints",
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("ordinal", sa.BigInteger(), nullable=False),
        sa.Column(
            "print", sa.BigInteger(), nullable=False, comment="a perceptual hash, as 64 bits"
        ),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("prints_job_id_fkey"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "ordinal", name=op.f("prints_pkey")),
    )
    op.create_table(
        "renders",
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column(
            "digest", sa.LargeBinary(), nullable=False, comment="of all that decides its bytes"
        ),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("ordinal", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("renders_tenant_id_fkey")),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("renders_job_id_fkey"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("tenant_id", "digest", name=op.f("renders_pkey")),
    )
    op.create_index("renders_job", "renders", ["job_id"], unique=False)


def downgrade() -> None:
    op.drop_table("renders")
    op.drop_table("prints")
    op.drop_column("jobs", "reused")
    op.drop_column("frames", "reused")
    op.drop_column("frames", "redraws")
