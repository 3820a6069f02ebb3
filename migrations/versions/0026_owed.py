"""Device cost that lanes owe to less urgent work: see ADR 36."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0026"
down_revision = "0025"
branch_labels = None
depends_on = None
# pre: only adds, so the version before still works. post: removes or restricts, after its end.
stage = "pre"


def upgrade() -> None:
    op.create_table(
        "lanes",
        sa.Column("pipeline", sa.Text(), primary_key=True),
        sa.Column(
            "owed",
            postgresql.ARRAY(sa.Double()),
            nullable=False,
            comment="device cost owed: to normal and bulk together; to bulk",
        ),
    )
    # Each index of `used` is written by every claim. Versions before `used` are slower without theirs.
    op.drop_index("shares_heads", table_name="shares")
    for name, place in (("shares_normal", 2), ("shares_bulk", 3)):
        op.create_index(
            name,
            "shares",
            ["pipeline", "used", "tenant_id"],
            postgresql_where=sa.text(f"waiting[{place}] + requeued[{place}] > 0"),
        )


def downgrade() -> None:
    op.drop_index("shares_bulk", table_name="shares")
    op.drop_index("shares_normal", table_name="shares")
    op.create_index("shares_heads", "shares", ["pipeline", "priority", "served", "tenant_id"])
    op.drop_table("lanes")
