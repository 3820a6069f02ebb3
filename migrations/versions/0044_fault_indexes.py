"""Indexes of failed attempts by cause. Readers go on while they are built."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0044"
down_revision = "0043"
branch_labels = None
depends_on = None
# pre: only adds, so the version before still works. post: removes or restricts, after its end.
stage = "pre"

OF_A_FAULT = sa.text("fault IS NOT NULL")


def upgrade() -> None:
    op.create_index("attempts_ended", "attempts", ["ended_at"], postgresql_where=OF_A_FAULT)
    op.create_index(
        "attempts_fault",
        "attempts",
        ["fault", "job_id", "ordinal", "attempt"],
        postgresql_where=OF_A_FAULT,
    )


def downgrade() -> None:
    op.drop_index("attempts_fault", table_name="attempts")
    op.drop_index("attempts_ended", table_name="attempts")
