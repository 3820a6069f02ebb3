"""Sessions of the page: a browser holds no key any more."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None
stage = "pre"


def upgrade() -> None:
    op.create_table(
        "sessions",
        sa.Column(
            "digest",
            sa.LargeBinary(),
            nullable=False,
            comment="sha256 of what the browser keeps",
        ),
        sa.Column("key_id", sa.Uuid(), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.Column("ends_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["key_id"], ["keys.id"], name=op.f("sessions_key_id_fkey"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("digest", name=op.f("sessions_pkey")),
    )
    op.create_index("sessions_end", "sessions", ["ends_at"], unique=False)


def downgrade() -> None:
    op.drop_table("sessions")
