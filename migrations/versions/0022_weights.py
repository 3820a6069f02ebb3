"""Weights of tenants: see ADR 34."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0022"
down_revision = "0021"
branch_labels = None
depends_on = None
# pre: only adds, so the version before still works. post: removes or restricts, after its end.
stage = "pre"


# Not in one step with `shares`: submissions lock both tables, in the other order.
def upgrade() -> None:
    op.add_column(
        "tenants",
        sa.Column(
            "weight",
            sa.Double(),
            sa.CheckConstraint("weight BETWEEN 0.01 AND 100", name=op.f("tenants_weight_check")),
            nullable=False,
            server_default="1",
            comment="share of a lane, compared with those of other tenants",
        ),
    )


def downgrade() -> None:
    op.drop_column("tenants", "weight")
