"""The initial schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None
stage = "pre"


def upgrade() -> None:
    op.create_table(
        "events",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column(
            "at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("data", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("events_pkey")),
    )
    op.create_index("events_at", "events", ["at"], unique=False)
    op.create_index("events_job", "events", ["job_id", "id"], unique=False)
    op.create_index(
        "events_pictures",
        "events",
        ["tenant_id", "id"],
        unique=False,
        postgresql_where=sa.text("kind = 'frames.succeeded'"),
    )
    op.create_table(
        "leases",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("worker_id", sa.Uuid(), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False, comment="the child that renders the batch"),
        sa.Column("pipeline", sa.Text(), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("job_ids", sa.ARRAY(sa.Uuid()), nullable=False),
        sa.Column("ordinals", sa.ARRAY(sa.BigInteger()), nullable=False),
        sa.Column("attempts", sa.ARRAY(sa.SmallInteger()), nullable=False),
        sa.Column("step", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("steps", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column(
            "stepped_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("leases_pkey")),
    )
    op.create_index("leases_expiry", "leases", ["expires_at"], unique=False)
    op.create_index("leases_worker", "leases", ["worker_id"], unique=False)
    op.create_table(
        "tenants",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("tenants_pkey")),
        sa.UniqueConstraint("name", name=op.f("tenants_name_key")),
    )
    op.create_table(
        "workers",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("pipeline", sa.Text(), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("draining", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("gone", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("device", sa.Text(), nullable=True),
        sa.Column("problem", sa.Text(), nullable=True, comment="why it cannot render"),
        sa.Column(
            "started_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.Column(
            "seen_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.Column("succeeded", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("returned", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("dead", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("dropped", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("expired", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("batches", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("denoise_seconds", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("encode_seconds", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("put_seconds", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("commit_seconds", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.CheckConstraint(
            "state IN ('loading', 'idle', 'rendering', 'failed')", name=op.f("workers_state_check")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("workers_pkey")),
    )
    op.create_index(
        "workers_alive",
        "workers",
        ["pipeline", "name"],
        unique=False,
        postgresql_where=sa.text("NOT gone"),
    )
    op.create_index("workers_pipeline", "workers", ["pipeline"], unique=False)
    op.create_table(
        "jobs",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("pipeline", sa.Text(), nullable=False),
        sa.Column(
            "priority", sa.SmallInteger(), nullable=False, comment="0 interactive, 1 normal, 2 bulk"
        ),
        sa.Column("status", sa.Text(), server_default="queued", nullable=False),
        sa.Column("paused", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column(
            "open", sa.Boolean(), nullable=False, comment="frames from the cursor on may be claimed"
        ),
        sa.Column("total", sa.BigInteger(), nullable=False),
        sa.Column("cursor", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column(
            "run",
            sa.Integer(),
            server_default=sa.text("0"),
            nullable=False,
            comment="index into runs",
        ),
        sa.Column(
            "run_end", sa.BigInteger(), nullable=False, comment="ordinal where batch_key ends"
        ),
        sa.Column("batch_key", sa.Text(), nullable=False, comment="of the frame at the cursor"),
        sa.Column(
            "bucket", sa.SmallInteger(), nullable=False, comment="of the frame at the cursor"
        ),
        sa.Column(
            "runs",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=False,
            comment="[[end ordinal, batch_key, bucket], …]",
        ),
        sa.Column("running", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("succeeded", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("dead", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("cancelled", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("max_attempts", sa.SmallInteger(), nullable=False),
        sa.Column(
            "spec",
            sa.JSON(),
            nullable=False,
            comment="FullSpec; JSON, since a grid's order matters",
        ),
        sa.Column("labels", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("idempotency_key", sa.Text(), nullable=True),
        sa.Column("idempotency_digest", sa.LargeBinary(), nullable=True),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "status IN ('queued', 'running', 'succeeded', 'partial', 'failed', 'cancelled')",
            name=op.f("jobs_status_check"),
        ),
        sa.CheckConstraint("cursor BETWEEN 0 AND total", name=op.f("jobs_cursor_check")),
        sa.CheckConstraint(
            "running >= 0 AND succeeded >= 0 AND dead >= 0 AND cancelled >= 0 AND running + succeeded + dead + cancelled <= total",
            name=op.f("jobs_conservation_check"),
        ),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("jobs_tenant_id_fkey")),
        sa.PrimaryKeyConstraint("id", name=op.f("jobs_pkey")),
        sa.UniqueConstraint(
            "tenant_id", "idempotency_key", name=op.f("jobs_tenant_id_idempotency_key_key")
        ),
        postgresql_with={"fillfactor": "50"},
    )
    op.create_index(
        "jobs_claim",
        "jobs",
        ["pipeline", "tenant_id", "priority", "created_at", "id"],
        unique=False,
        postgresql_where=sa.text("open"),
    )
    op.create_index(
        "jobs_fill",
        "jobs",
        ["pipeline", "batch_key", "priority", "created_at", "id"],
        unique=False,
        postgresql_where=sa.text("open"),
    )
    op.create_index("jobs_labels", "jobs", ["labels"], unique=False, postgresql_using="gin")
    op.create_index("jobs_newest", "jobs", ["tenant_id", "created_at", "id"], unique=False)
    op.create_index(
        "jobs_status", "jobs", ["tenant_id", "status", "created_at", "id"], unique=False
    )
    op.create_table(
        "keys",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), server_default="", nullable=False),
        sa.Column(
            "prefix", sa.Text(), nullable=False, comment="its first characters, to know it by"
        ),
        sa.Column("digest", sa.LargeBinary(), nullable=False, comment="sha256 of the key"),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "role IN ('client', 'operator', 'viewer')", name=op.f("keys_role_check")
        ),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("keys_tenant_id_fkey")),
        sa.PrimaryKeyConstraint("id", name=op.f("keys_pkey")),
        sa.UniqueConstraint("digest", name=op.f("keys_digest_key")),
    )
    op.create_table(
        "shares",
        sa.Column("pipeline", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column(
            "served", sa.BigInteger(), nullable=False, comment="frames claimed: fair share's clock"
        ),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("shares_tenant_id_fkey")),
        sa.PrimaryKeyConstraint("pipeline", "tenant_id", name=op.f("shares_pkey")),
    )
    op.create_table(
        "attempts",
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("ordinal", sa.BigInteger(), nullable=False),
        sa.Column("attempt", sa.SmallInteger(), nullable=False),
        sa.Column("worker", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("traceback", sa.Text(), nullable=True),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column(
            "ended_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("attempts_job_id_fkey"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "ordinal", "attempt", name=op.f("attempts_pkey")),
    )
    op.create_table(
        "frames",
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("ordinal", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column(
            "attempt", sa.SmallInteger(), nullable=False, comment="counted when it is claimed"
        ),
        sa.Column(
            "spared",
            sa.SmallInteger(),
            server_default=sa.text("0"),
            nullable=False,
            comment="attempts that do not count towards max_attempts",
        ),
        sa.Column("worker", sa.Text(), nullable=False, comment="who claimed the latest attempt"),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("slot", sa.SmallInteger(), nullable=True, comment="place in the batch, from 0"),
        sa.Column("sha256", sa.LargeBinary(), nullable=True),
        sa.Column("bytes", sa.Integer(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True, comment="why the latest attempt failed"),
        sa.CheckConstraint(
            "(state = 'succeeded') = (sha256 IS NOT NULL AND bytes IS NOT NULL)",
            name=op.f("frames_artifact_check"),
        ),
        sa.CheckConstraint(
            "state IN ('running', 'ready', 'succeeded', 'dead', 'cancelled')",
            name=op.f("frames_state_check"),
        ),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("frames_job_id_fkey"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "ordinal", name=op.f("frames_pkey")),
        postgresql_with={"fillfactor": "75"},
    )
    op.create_table(
        "input_chunks",
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column(
            "first", sa.BigInteger(), nullable=False, comment="index of the chunk's first prompt"
        ),
        sa.Column("prompts", sa.ARRAY(sa.Text()), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("input_chunks_job_id_fkey"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "first", name=op.f("input_chunks_pkey")),
    )
    op.create_table(
        "returns",
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("ordinal", sa.BigInteger(), nullable=False),
        sa.Column("pipeline", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("priority", sa.SmallInteger(), nullable=False),
        sa.Column("batch_key", sa.Text(), nullable=False),
        sa.Column("bucket", sa.SmallInteger(), nullable=False),
        sa.Column("not_before", sa.DateTime(timezone=True), nullable=False),
        sa.Column("job_created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("paused", sa.Boolean(), nullable=False),
        sa.Column(
            "alone", sa.Boolean(), nullable=False, comment="its attempt failed: no neighbours again"
        ),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("returns_job_id_fkey"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "ordinal", name=op.f("returns_pkey")),
    )
    op.create_index(
        "returns_claim",
        "returns",
        ["pipeline", "tenant_id", "priority", "job_created_at", "job_id", "ordinal"],
        unique=False,
        postgresql_where=sa.text("NOT paused"),
    )
    op.create_index(
        "returns_fill",
        "returns",
        ["pipeline", "batch_key", "priority", "job_created_at", "job_id", "ordinal"],
        unique=False,
        postgresql_where=sa.text("NOT paused AND NOT alone"),
    )


def downgrade() -> None:
    op.drop_index(
        "returns_fill", table_name="returns", postgresql_where=sa.text("NOT paused AND NOT alone")
    )
    op.drop_index("returns_claim", table_name="returns", postgresql_where=sa.text("NOT paused"))
    op.drop_table("returns")
    op.drop_table("input_chunks")
    op.drop_table("frames")
    op.drop_table("attempts")
    op.drop_table("shares")
    op.drop_table("keys")
    op.drop_index("jobs_status", table_name="jobs")
    op.drop_index("jobs_newest", table_name="jobs")
    op.drop_index("jobs_labels", table_name="jobs", postgresql_using="gin")
    op.drop_index("jobs_fill", table_name="jobs", postgresql_where=sa.text("open"))
    op.drop_index("jobs_claim", table_name="jobs", postgresql_where=sa.text("open"))
    op.drop_table("jobs")
    op.drop_index("workers_pipeline", table_name="workers")
    op.drop_index("workers_alive", table_name="workers", postgresql_where=sa.text("NOT gone"))
    op.drop_table("workers")
    op.drop_table("tenants")
    op.drop_index("leases_worker", table_name="leases")
    op.drop_index("leases_expiry", table_name="leases")
    op.drop_table("leases")
    op.drop_index(
        "events_pictures",
        table_name="events",
        postgresql_where=sa.text("kind = 'frames.succeeded'"),
    )
    op.drop_index("events_job", table_name="events")
    op.drop_index("events_at", table_name="events")
    op.drop_table("events")
