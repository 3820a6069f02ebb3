"""The initial schema. Steps 1 to 17 belonged to development versions before the first release."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0018"
down_revision = None
branch_labels = None
depends_on = None
stage = "pre"


def upgrade() -> None:
    op.create_table(
        "actions",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column(
            "at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.Column("key_id", sa.Uuid(), nullable=False),
        sa.Column("who", sa.Text(), nullable=False, comment="name of the key"),
        sa.Column("tenant", sa.Text(), nullable=False, comment="tenant of the key"),
        sa.Column("address", sa.Text(), nullable=False, comment="network address of the client"),
        sa.Column("verb", sa.Text(), nullable=False),
        sa.Column("target", sa.Text(), nullable=False),
        sa.Column("why", sa.Text(), nullable=False),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("actions_pkey")),
    )
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
        "export_news",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column(
            "job_id", sa.Uuid(), nullable=False, comment="job of which some frames have ended"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("export_news_pkey")),
    )
    op.create_table(
        "leases",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("worker_id", sa.Uuid(), nullable=False),
        sa.Column(
            "pid",
            sa.Integer(),
            nullable=False,
            comment="process ID of the child that renders the batch",
        ),
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
        sa.Column(
            "spooled",
            sa.Boolean(),
            server_default=sa.text("false"),
            nullable=False,
            comment="true: its batch is rendered and waits for the storage",
        ),
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
        sa.Column("removed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("emptied_at", sa.DateTime(timezone=True), nullable=True),
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
        sa.Column("problem", sa.Text(), nullable=True, comment="reason why it cannot render"),
        sa.Column(
            "failing",
            sa.ARRAY(sa.Text()),
            server_default="{}",
            nullable=False,
            comment="different frames that failed since the last success",
        ),
        sa.Column("trips", sa.SmallInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("tripped_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column(
            "avoids",
            sa.Uuid(),
            nullable=True,
            comment="tenant to leave out while tripped, if only its frames failed",
        ),
        sa.Column(
            "load_seconds",
            sa.Double(),
            nullable=True,
            comment="time in which its child loaded the pipeline",
        ),
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
        sa.Column("requeued", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("dead", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("dropped", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("expired", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("batches", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("denoise_seconds", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("encode_seconds", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("put_seconds", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("commit_seconds", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column(
            "work_seconds",
            sa.Double(),
            server_default=sa.text("0"),
            nullable=False,
            comment="wall-clock time while there was something to render",
        ),
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
        "control_images",
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column(
            "sha256",
            sa.LargeBinary(),
            nullable=False,
            comment="sha256 of the PNG in S3; in hex it is the image's id",
        ),
        sa.Column("width", sa.Integer(), nullable=False),
        sa.Column("height", sa.Integer(), nullable=False),
        sa.Column("bytes", sa.Integer(), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.Column(
            "state",
            sa.Text(),
            server_default="stored",
            nullable=False,
            comment="stored, arriving or removing; the object may be missing unless it is stored",
        ),
        sa.ForeignKeyConstraint(
            ["tenant_id"], ["tenants.id"], name=op.f("control_images_tenant_id_fkey")
        ),
        sa.PrimaryKeyConstraint("tenant_id", "sha256", name=op.f("control_images_pkey")),
    )
    op.create_index(
        "control_images_removing",
        "control_images",
        ["tenant_id"],
        unique=False,
        postgresql_where=sa.text("state = 'removing'"),
    )
    op.create_table(
        "destinations",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("bucket", sa.Text(), nullable=False),
        sa.Column(
            "prefix",
            sa.Text(),
            nullable=False,
            comment="start of the objects' keys: empty, or ends with a slash",
        ),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.ForeignKeyConstraint(
            ["tenant_id"], ["tenants.id"], name=op.f("destinations_tenant_id_fkey")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("destinations_pkey")),
        sa.UniqueConstraint(
            "tenant_id", "bucket", "prefix", name=op.f("destinations_tenant_id_bucket_prefix_key")
        ),
    )
    op.create_table(
        "exports",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("job_ids", sa.ARRAY(sa.Uuid()), nullable=False),
        sa.Column("shard_frames", sa.Integer(), nullable=False),
        sa.Column("bucket", sa.Text(), nullable=False),
        sa.Column("prefix", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), server_default="running", nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("shards", sa.Integer(), nullable=False),
        sa.Column("shards_done", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("images", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("missing", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("bytes", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("removed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("claimed_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "kind IN ('webdataset', 'parquet', 'imagefolder')", name=op.f("exports_kind_check")
        ),
        sa.CheckConstraint(
            "state IN ('running', 'succeeded', 'failed')", name=op.f("exports_state_check")
        ),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("exports_tenant_id_fkey")),
        sa.PrimaryKeyConstraint("id", name=op.f("exports_pkey")),
    )
    op.create_index(
        "exports_finished",
        "exports",
        ["finished_at"],
        unique=False,
        postgresql_where=sa.text("finished_at IS NOT NULL AND removed_at IS NULL"),
    )
    op.create_index("exports_newest", "exports", ["tenant_id", "created_at", "id"], unique=False)
    op.create_index(
        "exports_removed",
        "exports",
        ["removed_at"],
        unique=False,
        postgresql_where=sa.text("removed_at IS NOT NULL"),
    )
    op.create_index(
        "exports_running",
        "exports",
        ["created_at"],
        unique=False,
        postgresql_where=sa.text("state = 'running'"),
    )
    op.create_table(
        "inputs",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column(
            "sha256",
            sa.LargeBinary(),
            nullable=False,
            comment="sha256 of its lines as they were sent",
        ),
        sa.Column("lines", sa.BigInteger(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("shown", sa.ARRAY(sa.Text()), nullable=False, comment="its first prompts"),
        sa.Column("top_seed", sa.BigInteger(), nullable=True),
        sa.Column(
            "text_bytes",
            sa.Integer(),
            nullable=False,
            comment="most bytes of one line's prompts",
        ),
        sa.Column("keys", sa.Boolean(), nullable=False),
        sa.Column("negatives", sa.Boolean(), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.Column(
            "syntax_flaw",
            sa.Text(),
            nullable=True,
            comment="error in its prompts as weighted prompts; null: not checked yet",
        ),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("inputs_tenant_id_fkey")),
        sa.PrimaryKeyConstraint("id", name=op.f("inputs_pkey")),
        sa.UniqueConstraint("tenant_id", "sha256", name=op.f("inputs_tenant_id_sha256_key")),
    )
    op.create_index("inputs_newest", "inputs", ["tenant_id", "created_at", "id"], unique=False)
    op.create_index("inputs_oldest", "inputs", ["created_at"], unique=False)
    op.create_table(
        "keys",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), server_default="", nullable=False),
        sa.Column(
            "prefix",
            sa.Text(),
            nullable=False,
            comment="first characters of the key, to recognize it",
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
            "served",
            sa.BigInteger(),
            nullable=False,
            comment="number of frames claimed, for fair share",
        ),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("shares_tenant_id_fkey")),
        sa.PrimaryKeyConstraint("pipeline", "tenant_id", name=op.f("shares_pkey")),
    )
    op.create_table(
        "export_shards",
        sa.Column("export_id", sa.Uuid(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column(
            "job_id",
            sa.Uuid(),
            nullable=True,
            comment="null: the dataset files, which are the last shard",
        ),
        sa.Column("first", sa.BigInteger(), nullable=False, comment="ordinal of its first frame"),
        sa.Column("stop", sa.BigInteger(), nullable=False),
        sa.Column(
            "base",
            sa.BigInteger(),
            nullable=False,
            comment="base + ordinal is the number of an image",
        ),
        sa.Column("attempt", sa.SmallInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("failures", sa.SmallInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("worker", sa.Text(), nullable=True),
        sa.Column(
            "due_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.Column("done_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("rows", sa.Integer(), nullable=True),
        sa.Column("missing", sa.Integer(), nullable=True),
        sa.Column("files", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column(
            "whole",
            sa.Boolean(),
            nullable=True,
            comment="true: may be written; null: not checked yet",
        ),
        sa.ForeignKeyConstraint(
            ["export_id"],
            ["exports.id"],
            name=op.f("export_shards_export_id_fkey"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("export_id", "number", name=op.f("export_shards_pkey")),
    )
    op.create_index(
        "export_shards_due",
        "export_shards",
        ["export_id", "number"],
        unique=False,
        postgresql_where=sa.text("done_at IS NULL"),
    )
    op.create_index(
        "export_shards_new",
        "export_shards",
        ["export_id"],
        unique=False,
        postgresql_where=sa.text("whole IS NULL"),
    )
    op.create_index(
        "export_shards_ready",
        "export_shards",
        ["due_at"],
        unique=False,
        postgresql_where=sa.text("whole AND done_at IS NULL"),
    )
    op.create_index(
        "export_shards_waiting",
        "export_shards",
        ["job_id"],
        unique=False,
        postgresql_where=sa.text("whole IS NOT TRUE"),
    )
    op.create_table(
        "input_parts",
        sa.Column("input_id", sa.Uuid(), nullable=False),
        sa.Column(
            "first", sa.BigInteger(), nullable=False, comment="index of the part's first line"
        ),
        sa.Column(
            "content",
            sa.LargeBinary(),
            nullable=False,
            comment="lines of JSON, compressed with zlib",
        ),
        sa.ForeignKeyConstraint(
            ["input_id"], ["inputs.id"], name=op.f("input_parts_input_id_fkey"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("input_id", "first", name=op.f("input_parts_pkey")),
    )
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
            "open",
            sa.Boolean(),
            nullable=False,
            comment="true: frames from the cursor on may be claimed",
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
        sa.Column(
            "device_seconds",
            sa.Double(),
            server_default=sa.text("0"),
            nullable=False,
            comment="device time of its succeeded frames",
        ),
        sa.Column("reused", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column(
            "bytes",
            sa.BigInteger(),
            server_default=sa.text("0"),
            nullable=False,
            comment="of its images",
        ),
        sa.Column(
            "failures",
            postgresql.JSONB(astext_type=sa.Text()),
            server_default="{}",
            nullable=False,
            comment="numbers of unsuccessful attempts, by reason",
        ),
        sa.Column("pace_since", sa.DateTime(timezone=True), nullable=True),
        sa.Column(
            "pace_since_frames", sa.BigInteger(), server_default=sa.text("0"), nullable=False
        ),
        sa.Column("pace_next", sa.DateTime(timezone=True), nullable=True),
        sa.Column("pace_next_frames", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("max_attempts", sa.SmallInteger(), nullable=False),
        sa.Column(
            "spec",
            sa.JSON(),
            nullable=False,
            comment="FullSpec; JSON, since a grid's order matters",
        ),
        sa.Column("labels", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("input_id", sa.Uuid(), nullable=True),
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
        sa.Column("removed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column(
            "behind_from",
            sa.BigInteger(),
            nullable=True,
            comment="ordinal from which requeued frames are not updated yet",
        ),
        sa.CheckConstraint(
            "status IN ('queued', 'running', 'succeeded', 'partial', 'failed', 'cancelled')",
            name=op.f("jobs_status_check"),
        ),
        sa.CheckConstraint("cursor BETWEEN 0 AND total", name=op.f("jobs_cursor_check")),
        sa.CheckConstraint(
            "running >= 0 AND succeeded >= 0 AND dead >= 0 AND cancelled >= 0 AND running + succeeded + dead + cancelled <= total",
            name=op.f("jobs_conservation_check"),
        ),
        sa.ForeignKeyConstraint(["input_id"], ["inputs.id"], name=op.f("jobs_input_id_fkey")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("jobs_tenant_id_fkey")),
        sa.PrimaryKeyConstraint("id", name=op.f("jobs_pkey")),
        sa.UniqueConstraint(
            "tenant_id", "idempotency_key", name=op.f("jobs_tenant_id_idempotency_key_key")
        ),
        postgresql_with={"fillfactor": "50"},
    )
    op.create_index(
        "jobs_behind",
        "jobs",
        ["id"],
        unique=False,
        postgresql_where=sa.text("behind_from IS NOT NULL"),
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
    op.create_index(
        "jobs_finished",
        "jobs",
        ["finished_at"],
        unique=False,
        postgresql_where=sa.text("finished_at IS NOT NULL AND removed_at IS NULL"),
    )
    op.create_index(
        "jobs_input",
        "jobs",
        ["input_id"],
        unique=False,
        postgresql_where=sa.text("input_id IS NOT NULL"),
    )
    op.create_index("jobs_labels", "jobs", ["labels"], unique=False, postgresql_using="gin")
    op.create_index("jobs_newest", "jobs", ["tenant_id", "created_at", "id"], unique=False)
    op.create_index(
        "jobs_removed",
        "jobs",
        ["removed_at"],
        unique=False,
        postgresql_where=sa.text("removed_at IS NOT NULL"),
    )
    op.create_index(
        "jobs_status", "jobs", ["tenant_id", "status", "created_at", "id"], unique=False
    )
    op.create_table(
        "sessions",
        sa.Column(
            "digest",
            sa.LargeBinary(),
            nullable=False,
            comment="sha256 of the secret in the browser",
        ),
        sa.Column("key_id", sa.Uuid(), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.Column("ends_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["key_id"], ["keys.id"], name=op.f("sessions_key_id_fkey"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("digest", name=op.f("sessions_pkey")),
    )
    op.create_index("sessions_end", "sessions", ["ends_at"], unique=False)
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
            "attempt",
            sa.SmallInteger(),
            nullable=False,
            comment="number of the latest attempt, counted at the claim",
        ),
        sa.Column(
            "uncharged",
            sa.SmallInteger(),
            server_default=sa.text("0"),
            nullable=False,
            comment="attempts that do not count towards max_attempts",
        ),
        sa.Column(
            "rerolls",
            sa.SmallInteger(),
            server_default=sa.text("0"),
            nullable=False,
            comment="number of images that a filter rejected",
        ),
        sa.Column(
            "reused",
            sa.Boolean(),
            server_default=sa.text("false"),
            nullable=False,
            comment="true: its artifact is a copy of another frame's",
        ),
        sa.Column(
            "worker", sa.Text(), nullable=False, comment="name of the worker of the latest attempt"
        ),
        sa.Column(
            "bucket",
            sa.SmallInteger(),
            nullable=True,
            comment="bucket of the latest attempt",
        ),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column(
            "isolated",
            sa.Boolean(),
            server_default=sa.text("false"),
            nullable=False,
            comment="true: an attempt failed, so it gets no neighbours",
        ),
        sa.Column("slot", sa.SmallInteger(), nullable=True, comment="place in the batch, from 0"),
        sa.Column("sha256", sa.LargeBinary(), nullable=True),
        sa.Column("bytes", sa.Integer(), nullable=True),
        sa.Column(
            "error", sa.Text(), nullable=True, comment="reason why the latest attempt failed"
        ),
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
        "job_prompts",
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column(
            "first", sa.BigInteger(), nullable=False, comment="index of the chunk's first prompt"
        ),
        sa.Column("prompts", sa.ARRAY(sa.Text()), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("job_prompts_job_id_fkey"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "first", name=op.f("job_prompts_pkey")),
    )
    op.create_table(
        "perceptual_hashes",
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("ordinal", sa.BigInteger(), nullable=False),
        sa.Column("hash", sa.BigInteger(), nullable=False, comment="perceptual hash of 64 bits"),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("perceptual_hashes_job_id_fkey"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "ordinal", name=op.f("perceptual_hashes_pkey")),
    )
    op.create_index(
        "perceptual_hashes_band_1",
        "perceptual_hashes",
        ["job_id", sa.literal_column('"substring"(int8send(hash), 1, 2)')],
        unique=False,
    )
    op.create_index(
        "perceptual_hashes_band_3",
        "perceptual_hashes",
        ["job_id", sa.literal_column('"substring"(int8send(hash), 3, 2)')],
        unique=False,
    )
    op.create_index(
        "perceptual_hashes_band_5",
        "perceptual_hashes",
        ["job_id", sa.literal_column('"substring"(int8send(hash), 5, 2)')],
        unique=False,
    )
    op.create_index(
        "perceptual_hashes_band_7",
        "perceptual_hashes",
        ["job_id", sa.literal_column('"substring"(int8send(hash), 7, 2)')],
        unique=False,
    )
    op.create_table(
        "requeued_frames",
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
            "isolated",
            sa.Boolean(),
            nullable=False,
            comment="true: its attempt failed, so it gets no neighbours",
        ),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("requeued_frames_job_id_fkey"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "ordinal", name=op.f("requeued_frames_pkey")),
    )
    op.create_index(
        "requeued_frames_claim",
        "requeued_frames",
        ["pipeline", "tenant_id", "priority", "job_created_at", "job_id", "ordinal"],
        unique=False,
        postgresql_where=sa.text("NOT paused"),
    )
    op.create_index(
        "requeued_frames_fill",
        "requeued_frames",
        ["pipeline", "batch_key", "priority", "job_created_at", "job_id", "ordinal"],
        unique=False,
        postgresql_where=sa.text("NOT paused AND NOT isolated"),
    )
    op.create_table(
        "reusable_renders",
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column(
            "digest",
            sa.LargeBinary(),
            nullable=False,
            comment="hash of everything that decides its bytes",
        ),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("ordinal", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("reusable_renders_job_id_fkey"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["tenant_id"], ["tenants.id"], name=op.f("reusable_renders_tenant_id_fkey")
        ),
        sa.PrimaryKeyConstraint("tenant_id", "digest", name=op.f("reusable_renders_pkey")),
    )
    op.create_index("reusable_renders_job", "reusable_renders", ["job_id"], unique=False)


def downgrade() -> None:
    op.drop_index("reusable_renders_job", table_name="reusable_renders")
    op.drop_table("reusable_renders")
    op.drop_index(
        "requeued_frames_fill",
        table_name="requeued_frames",
        postgresql_where=sa.text("NOT paused AND NOT isolated"),
    )
    op.drop_index(
        "requeued_frames_claim",
        table_name="requeued_frames",
        postgresql_where=sa.text("NOT paused"),
    )
    op.drop_table("requeued_frames")
    op.drop_index("perceptual_hashes_band_7", table_name="perceptual_hashes")
    op.drop_index("perceptual_hashes_band_5", table_name="perceptual_hashes")
    op.drop_index("perceptual_hashes_band_3", table_name="perceptual_hashes")
    op.drop_index("perceptual_hashes_band_1", table_name="perceptual_hashes")
    op.drop_table("perceptual_hashes")
    op.drop_table("job_prompts")
    op.drop_table("frames")
    op.drop_table("attempts")
    op.drop_index("sessions_end", table_name="sessions")
    op.drop_table("sessions")
    op.drop_index("jobs_status", table_name="jobs")
    op.drop_index(
        "jobs_removed", table_name="jobs", postgresql_where=sa.text("removed_at IS NOT NULL")
    )
    op.drop_index("jobs_newest", table_name="jobs")
    op.drop_index("jobs_labels", table_name="jobs", postgresql_using="gin")
    op.drop_index("jobs_input", table_name="jobs", postgresql_where=sa.text("input_id IS NOT NULL"))
    op.drop_index(
        "jobs_finished",
        table_name="jobs",
        postgresql_where=sa.text("finished_at IS NOT NULL AND removed_at IS NULL"),
    )
    op.drop_index("jobs_fill", table_name="jobs", postgresql_where=sa.text("open"))
    op.drop_index("jobs_claim", table_name="jobs", postgresql_where=sa.text("open"))
    op.drop_index(
        "jobs_behind", table_name="jobs", postgresql_where=sa.text("behind_from IS NOT NULL")
    )
    op.drop_table("jobs")
    op.drop_table("input_parts")
    op.drop_index(
        "export_shards_waiting",
        table_name="export_shards",
        postgresql_where=sa.text("whole IS NOT TRUE"),
    )
    op.drop_index(
        "export_shards_ready",
        table_name="export_shards",
        postgresql_where=sa.text("whole AND done_at IS NULL"),
    )
    op.drop_index(
        "export_shards_new", table_name="export_shards", postgresql_where=sa.text("whole IS NULL")
    )
    op.drop_index(
        "export_shards_due", table_name="export_shards", postgresql_where=sa.text("done_at IS NULL")
    )
    op.drop_table("export_shards")
    op.drop_table("shares")
    op.drop_table("keys")
    op.drop_index("inputs_oldest", table_name="inputs")
    op.drop_index("inputs_newest", table_name="inputs")
    op.drop_table("inputs")
    op.drop_index(
        "exports_running", table_name="exports", postgresql_where=sa.text("state = 'running'")
    )
    op.drop_index(
        "exports_removed", table_name="exports", postgresql_where=sa.text("removed_at IS NOT NULL")
    )
    op.drop_index("exports_newest", table_name="exports")
    op.drop_index(
        "exports_finished",
        table_name="exports",
        postgresql_where=sa.text("finished_at IS NOT NULL AND removed_at IS NULL"),
    )
    op.drop_table("exports")
    op.drop_table("destinations")
    op.drop_index(
        "control_images_removing",
        table_name="control_images",
        postgresql_where=sa.text("state = 'removing'"),
    )
    op.drop_table("control_images")
    op.drop_index("workers_pipeline", table_name="workers")
    op.drop_index("workers_alive", table_name="workers", postgresql_where=sa.text("NOT gone"))
    op.drop_table("workers")
    op.drop_table("tenants")
    op.drop_index("leases_worker", table_name="leases")
    op.drop_index("leases_expiry", table_name="leases")
    op.drop_table("leases")
    op.drop_table("export_news")
    op.drop_index(
        "events_pictures",
        table_name="events",
        postgresql_where=sa.text("kind = 'frames.succeeded'"),
    )
    op.drop_index("events_job", table_name="events")
    op.drop_index("events_at", table_name="events")
    op.drop_table("events")
    op.drop_table("actions")
