"""Keys that see every tenant without steering, and more about each action. See ADR 48."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0037"
down_revision = "0036"
branch_labels = None
depends_on = None
# pre: only adds, so the version before still works. post: removes or restricts, after its end.
stage = "pre"

KEPT = sa.text("removed_at IS NULL")


def upgrade() -> None:
    # Those that take long come first, so that keys are locked for a moment only.
    op.create_index("jobs_all_newest", "jobs", ["created_at", "id"], postgresql_where=KEPT)
    op.create_index(
        "jobs_all_status", "jobs", ["status", "created_at", "id"], postgresql_where=KEPT
    )
    op.create_index("exports_all_newest", "exports", ["created_at", "id"], postgresql_where=KEPT)
    for name, default, comment in (
        ("role", "operator", "role of the key"),
        ("via", "api", "api, page or shell"),
    ):
        op.add_column(
            "actions",
            sa.Column(name, sa.Text(), nullable=False, server_default=default, comment=comment),
        )
    op.add_column("actions", sa.Column("owner", sa.Text(), comment="tenant that owns the target"))
    op.create_index("actions_at", "actions", ["at"])
    for name in ("who", "verb", "target", "owner"):
        op.create_index(f"actions_{name}", "actions", [name, "id"])
    op.add_column(
        "keys",
        sa.Column(
            "everywhere",
            sa.Boolean(),
            nullable=False,
            server_default=sa.text("false"),
            comment="a viewer that sees every tenant",
        ),
    )


def downgrade() -> None:
    op.drop_index("exports_all_newest", "exports")
    for name in ("jobs_all_status", "jobs_all_newest"):
        op.drop_index(name, "jobs")
    for name in ("owner", "target", "verb", "who", "at"):
        op.drop_index(f"actions_{name}", "actions")
    for name in ("owner", "via", "role"):
        op.drop_column("actions", name)
    op.drop_column("keys", "everywhere")
