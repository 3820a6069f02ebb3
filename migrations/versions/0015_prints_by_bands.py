"""Near-duplicates are found by index, band by band."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None
stage = "pre"


def upgrade() -> None:
    for first in (1, 3, 5, 7):
        op.create_index(
            f"prints_band_{first}",
            "prints",
            ["job_id", sa.literal_column(f'"substring"(int8send(print), {first}, 2)')],
            unique=False,
        )


def downgrade() -> None:
    for first in (1, 3, 5, 7):
        op.drop_index(f"prints_band_{first}", "prints")
