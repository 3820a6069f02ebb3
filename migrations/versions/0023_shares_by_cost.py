"""Shares of a lane count device cost: see ADR 34."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0023"
down_revision = "0022"
branch_labels = None
depends_on = None
# pre: only adds, so the version before still works. post: removes or restricts, after its end.
stage = "pre"

# The share with which a tenant joins a lane. It reads indexes only, and locks nothing.
ENTRY = """
    NEW.{column} := greatest(NEW.{column}, coalesce((
        SELECT min(s.{column}) FROM (VALUES (0), (1), (2)) AS p (priority) CROSS JOIN LATERAL (
            SELECT s.{column} FROM shares s
            WHERE s.pipeline = NEW.pipeline AND s.priority = p.priority
              AND s.waiting <> '{{0,0,0}}' AND s.tenant_id <> NEW.tenant_id
            ORDER BY s.{column} LIMIT 1
        ) s
    ), greatest((
        SELECT max(s.{column}) FROM (VALUES (0), (1), (2)) AS p (priority) CROSS JOIN LATERAL (
            SELECT s.{column} FROM shares s
            WHERE s.pipeline = NEW.pipeline AND s.priority = p.priority
            ORDER BY s.{column} DESC LIMIT 1
        ) s
    ), (
        SELECT s.{column} FROM shares s WHERE s.pipeline = NEW.pipeline AND s.priority IS NULL
        ORDER BY s.priority DESC, s.{column} DESC LIMIT 1
    )), 0));
"""

# A tenant that joins a lane starts at the smallest share of the tenants that wait there, or at the
# largest share if nobody waits. So absence earns no credit, and work done while nobody else waited
# costs nothing later. `served` is for versions that know no `used`.
SHARE_JOINS = f"""
CREATE FUNCTION share_joins() RETURNS trigger LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off
SET enable_sort = off AS $$
BEGIN
{ENTRY.format(column="used")}
{ENTRY.format(column="served")}
    RETURN NEW;
END $$
"""

TRIGGER = """
CREATE TRIGGER share_joins BEFORE UPDATE OF waiting, requeued ON shares FOR EACH ROW
WHEN (OLD.waiting = '{0,0,0}' AND OLD.requeued = '{0,0,0}'
      AND (NEW.waiting <> '{0,0,0}' OR NEW.requeued <> '{0,0,0}'))
EXECUTE FUNCTION share_joins()
"""


def upgrade() -> None:
    # All start at 0: numbers of frames are no measure of what was used.
    op.add_column(
        "shares",
        sa.Column(
            "used",
            sa.Double(),
            nullable=False,
            server_default="0",
            comment="bucket x steps x pixels of claimed batches, divided by the tenant's weight",
        ),
    )
    op.alter_column(
        "shares",
        "served",
        server_default="0",
        comment="number of frames claimed, by which versions before `used` share lanes",
        existing_comment="number of frames claimed, for fair share",
    )
    op.create_index("shares_by_use", "shares", ["pipeline", "priority", "used", "tenant_id"])
    op.execute(SHARE_JOINS)
    op.execute(TRIGGER)


def downgrade() -> None:
    op.execute("DROP TRIGGER share_joins ON shares")
    op.execute("DROP FUNCTION share_joins()")
    op.drop_index("shares_by_use", table_name="shares")
    op.alter_column(
        "shares",
        "served",
        server_default=None,
        comment="number of frames claimed, for fair share",
        existing_comment="number of frames claimed, by which versions before `used` share lanes",
    )
    op.drop_column("shares", "used")
