"""Limits of tenants: see ADR 35."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0024"
down_revision = "0023"
branch_labels = None
depends_on = None
# pre: only adds, so the version before still works. post: removes or restricts, after its end.
stage = "pre"

LIMITS: dict[str, tuple[sa.types.TypeEngine[Any], str]] = {
    "priorities": (postgresql.ARRAY(sa.SmallInteger()), "those that it may use; null: all"),
    "max_open_jobs": (sa.BigInteger(), "jobs that have not ended; null: no limit"),
    "max_waiting_frames": (sa.BigInteger(), "frames that wait; null: no limit"),
    "max_input_bytes": (sa.BigInteger(), "all inputs together; null: no limit"),
}


def upgrade() -> None:
    for name, (kind, comment) in LIMITS.items():
        op.add_column("tenants", sa.Column(name, kind, comment=comment))


def downgrade() -> None:
    for name in reversed(LIMITS):
        op.drop_column("tenants", name)
