"""Indexes by which limits count what a tenant has: see ADR 35."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0025"
down_revision = "0024"
branch_labels = None
depends_on = None
# pre: only adds, so the version before still works. post: removes or restricts, after its end.
stage = "pre"


# First jobs, then shares: submissions lock them in this order too.
def upgrade() -> None:
    op.create_index(
        "jobs_aside",
        "jobs",
        ["tenant_id"],
        postgresql_where=sa.text("paused OR behind_from IS NOT NULL"),
    )
    op.create_index("shares_of_tenant", "shares", ["tenant_id"])


def downgrade() -> None:
    op.drop_index("shares_of_tenant", table_name="shares")
    op.drop_index("jobs_aside", table_name="jobs")
