"""Time for which a job is kept after its end, and idempotency keys of removed jobs. See ADR 58."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0046"
down_revision = "0045"
branch_labels = None
depends_on = None
# pre: only adds, so the version before still works. post: removes or restricts, after its end.
stage = "pre"

ENDED = "finished_at IS NOT NULL AND removed_at IS NULL"
OF_TENANTS = {
    "keep_for": "seconds for which a job that does not say is kept; null: the farm's retention",
    "max_keep_for": "seconds for which a job is kept at most; null: no limit",
}


def upgrade() -> None:
    op.add_column(
        "jobs",
        sa.Column(
            "keep_for",
            sa.Integer(),
            comment="seconds from its end to its removal; null: the farm's retention",
        ),
    )
    for name, comment in OF_TENANTS.items():
        op.add_column("tenants", sa.Column(name, sa.Integer(), comment=comment))
    op.create_index(
        "jobs_kept",
        "jobs",
        [sa.text("((finished_at AT TIME ZONE 'UTC') + make_interval(secs => keep_for))")],
        postgresql_where=sa.text(f"keep_for IS NOT NULL AND {ENDED}"),
    )
    op.create_index(
        "jobs_kept_as_others",
        "jobs",
        ["finished_at"],
        postgresql_where=sa.text(f"keep_for IS NULL AND {ENDED}"),
    )
    op.create_table(
        "used_keys",
        sa.Column("tenant_id", sa.Uuid(), primary_key=True),
        sa.Column("idempotency_key", sa.Text(), primary_key=True),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("ends_at", sa.DateTime(timezone=True), nullable=False),
        comment="Idempotency keys of removed jobs.",
    )
    op.create_index("used_keys_end", "used_keys", ["ends_at"])


def downgrade() -> None:
    op.drop_table("used_keys")
    for name in ("jobs_kept_as_others", "jobs_kept"):
        op.drop_index(name, table_name="jobs")
    for name in OF_TENANTS:
        op.drop_column("tenants", name)
    op.drop_column("jobs", "keep_for")
