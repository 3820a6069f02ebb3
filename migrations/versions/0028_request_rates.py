"""Limits of requests a second: see ADR 35."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0028"
down_revision = "0027"
branch_labels = None
depends_on = None
# pre: only adds, so the version before still works. post: removes or restricts, after its end.
stage = "pre"


def upgrade() -> None:
    op.add_column(
        "tenants",
        sa.Column("requests_a_second", sa.Double(), comment="calls of the API; null: no limit"),
    )
    op.add_column(
        "tenants",
        sa.Column(
            "requests_burst",
            sa.BigInteger(),
            comment="calls that may arrive at once; null: those of ten seconds",
        ),
    )


def downgrade() -> None:
    op.drop_column("tenants", "requests_burst")
    op.drop_column("tenants", "requests_a_second")
