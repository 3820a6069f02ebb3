"""Calls without an idempotency key that have no answer yet. See ADR 44."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0034"
down_revision = "0033"
branch_labels = None
depends_on = None
# pre: only adds, so the version before still works. post: removes or restricts, after its end.
stage = "pre"


def upgrade() -> None:
    op.create_table(
        "unanswered_calls",
        sa.Column("key", sa.Text(), primary_key=True, comment="idempotency key of its job"),
        sa.Column(
            "digest",
            sa.LargeBinary(),
            nullable=False,
            comment="sha256 of the API key and the content",
        ),
        sa.Column("repeats", sa.SmallInteger(), nullable=False, comment="times it was sent before"),
        sa.Column("given_up", sa.Boolean(), nullable=False, server_default=sa.text("false")),
        sa.Column(
            "at",
            sa.DateTime(timezone=True),
            nullable=False,
            server_default=sa.text("clock_timestamp()"),
        ),
        comment="Calls without an idempotency key that have no answer yet.",
    )
    op.create_index("unanswered_calls_digest", "unanswered_calls", ["digest"])
    op.create_index("unanswered_calls_at", "unanswered_calls", ["at"])


def downgrade() -> None:
    op.drop_table("unanswered_calls")
