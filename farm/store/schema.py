"""The tables. Postgres is the only source of truth about jobs and frames.

A job's row contains its spec and a cursor. Frames below the cursor have been claimed and have a
row. Frames from the cursor on are waiting and have none. The cursor is a position: an ordinal,
unless the job has groups (farm/domain/groups.py). Frames requeued for another attempt are in the
small table `requeued_frames`. So the wide table `frames` needs no index on its state, and its
updates stay HOT (heap-only: no index entry is written).
"""

from __future__ import annotations

from sqlalchemy import (
    ARRAY,
    JSON,
    REAL,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Date,
    DateTime,
    Double,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Numeric,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

from farm.domain.states import FrameState, JobStatus

metadata = MetaData(
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "fk": "%(table_name)s_%(column_0_name)s_fkey",
        "ix": "%(table_name)s_%(column_0_N_name)s",
        "uq": "%(table_name)s_%(column_0_N_name)s_key",
        "ck": "%(table_name)s_%(constraint_name)s_check",
    }
)


def _one_of(column: str, values: list[str]) -> str:
    return f"{column} IN ({', '.join(repr(str(value)) for value in values)})"


def _moment(name: str, *, now: bool = False, null: bool = True) -> Column[object]:
    default = func.clock_timestamp() if now else None
    return Column(name, DateTime(timezone=True), nullable=null and not now, server_default=default)


ROW_STATES = [state for state in FrameState if state is not FrameState.WAITING]

tenants = Table(
    "tenants",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("name", Text, nullable=False, unique=True),  # the id, once the tenant is removed
    _moment("created_at", now=True),
    _moment("removed_at"),
    _moment("emptied_at"),
    Column(
        "weight",
        Double,
        CheckConstraint("weight BETWEEN 0.01 AND 100", name="weight"),
        nullable=False,
        server_default="1",
        comment="share of a lane, compared with those of other tenants",
    ),
    Column("priorities", ARRAY(SmallInteger), comment="those that it may use; null: all"),
    Column("max_open_jobs", BigInteger, comment="jobs that have not ended; null: no limit"),
    Column("max_waiting_frames", BigInteger, comment="frames that wait; null: no limit"),
    Column("max_input_bytes", BigInteger, comment="all inputs together; null: no limit"),
    Column("max_running_frames", BigInteger, comment="frames of leases; null: no limit"),
    Column("requests_a_second", Double, comment="calls of the API; null: no limit"),
    Column(
        "requests_burst",
        BigInteger,
        comment="calls that may arrive at once; null: those of ten seconds",
    ),
    Column(
        "device_seconds_a_month",
        Double,
        comment="device time in a calendar month, UTC; null: no limit",
    ),
    Column(
        "keep_for",
        Integer,
        comment="seconds for which a job that does not say is kept; null: the farm's retention",
    ),
    Column(
        "max_keep_for", Integer, comment="seconds for which a job is kept at most; null: no limit"
    ),
    Column("webhook_secret", LargeBinary),
    Column("webhook_secret_before", LargeBinary),
    _moment("webhook_before_until"),
    Index(
        "tenants_running_limits",
        "max_running_frames",
        postgresql_where=text("max_running_frames IS NOT NULL"),
    ),
)

keys = Table(
    "keys",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("tenant_id", ForeignKey("tenants.id"), nullable=False),
    Column("role", Text, nullable=False),
    Column("name", Text, nullable=False, server_default=""),
    Column("prefix", Text, nullable=False, comment="first characters of the key, to recognize it"),
    Column("digest", LargeBinary, nullable=False, unique=True, comment="sha256 of the key"),
    _moment("created_at", now=True),
    _moment("revoked_at"),
    Column("metadata", Text, comment="of jobs that do not say; null: full"),
    Column(
        "everywhere",
        Boolean,
        nullable=False,
        server_default=text("false"),
        comment="a viewer that sees every tenant",
    ),
    CheckConstraint(_one_of("role", ["client", "operator", "viewer"]), name="role"),
)

actions = Table(
    "actions",
    metadata,
    Column("id", BigInteger, Identity(), primary_key=True),
    _moment("at", now=True),
    Column("key_id", Uuid, nullable=False),
    Column("who", Text, nullable=False, comment="name of the key"),
    Column("tenant", Text, nullable=False, comment="tenant of the key"),
    Column("address", Text, nullable=False, comment="network address of the client"),
    Column("verb", Text, nullable=False),
    Column("target", Text, nullable=False),
    Column("why", Text, nullable=False),
    Column("outcome", Text, nullable=False),
    Column("role", Text, nullable=False, server_default="operator", comment="role of the key"),
    Column("via", Text, nullable=False, server_default="api", comment="api, page or shell"),
    Column("owner", Text, comment="tenant that owns the target"),
    Column("operation_id", Uuid, comment="operation that it is part of"),
    Column("lane", Text, comment="lane that it is about; empty: every lane; null: none"),
    Index("actions_at", "at"),
    Index("actions_lane", "lane", "at", postgresql_where=text("lane IS NOT NULL")),
    Index(
        "actions_operation",
        "operation_id",
        "id",
        postgresql_where=text("operation_id IS NOT NULL"),
    ),
    *(Index(f"actions_{name}", name, "id") for name in ("who", "verb", "target", "owner")),
)

operations = Table(
    "operations",
    metadata,
    Column("id", Uuid, primary_key=True),
    _moment("created_at", now=True),
    Column("verb", Text, nullable=False),
    Column("args", JSONB, nullable=False, comment="arguments of the verb"),
    Column("tenant_id", Uuid, comment="owner of the jobs; null: all tenants"),
    Column("filter", JSONB, nullable=False, comment="JobFilter, with the time `until`"),
    Column("key_id", Uuid, nullable=False),
    Column("who", Text, nullable=False, comment="name of the key"),
    Column("role", Text, nullable=False, comment="role of the key"),
    Column("home", Text, nullable=False, comment="tenant of the key"),
    Column("via", Text, nullable=False, comment="api, page or shell"),
    Column("address", Text, nullable=False, comment="network address of the client"),
    Column("why", Text, nullable=False),
    Column("expected", BigInteger, nullable=False, comment="jobs that matched first"),
    Column("done", BigInteger, nullable=False, server_default="0"),
    Column("skipped", BigInteger, nullable=False, server_default="0"),
    Column("failed", BigInteger, nullable=False, server_default="0"),
    Column("problem", Text, comment="first failure"),
    Column("state", Text, nullable=False, server_default="running"),
    Column("at_time", DateTime(timezone=True), comment="created_at of the last job"),
    Column("at_id", Uuid, comment="ID of the last job that it handled"),
    _moment("stepped_at"),
    _moment("ended_at"),
    CheckConstraint(_one_of("state", ["running", "stopped", "ended"]), name="state"),
    Index("operations_newest", "created_at", "id"),
    Index("operations_of_tenant", "tenant_id", "created_at", "id"),
    Index("operations_running", "stepped_at", postgresql_where=text("state = 'running'")),
)

destinations = Table(
    "destinations",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("tenant_id", ForeignKey("tenants.id"), nullable=False),
    Column("bucket", Text, nullable=False),
    Column(
        "prefix",
        Text,
        nullable=False,
        comment="start of the objects' keys: empty, or ends with a slash",
    ),
    _moment("created_at", now=True),
    UniqueConstraint("tenant_id", "bucket", "prefix"),
)

sessions = Table(
    "sessions",
    metadata,
    Column("digest", LargeBinary, primary_key=True, comment="sha256 of the secret in the browser"),
    Column("key_id", ForeignKey("keys.id", ondelete="CASCADE"), nullable=False),
    _moment("created_at", now=True),
    _moment("ends_at", null=False),
    Index("sessions_end", "ends_at"),
)

saved_views = Table(
    "saved_views",
    metadata,
    Column("key_id", ForeignKey("keys.id", ondelete="CASCADE"), primary_key=True),
    Column("name", Text, primary_key=True),
    Column("address", Text, nullable=False, comment="of the page `/`, with its query"),
    comment="Lists of jobs that a key has saved.",
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("tenant_id", ForeignKey("tenants.id"), nullable=False),
    Column("pipeline", Text, nullable=False),
    Column("priority", SmallInteger, nullable=False, comment="0 interactive, 1 normal, 2 bulk"),
    Column("status", Text, nullable=False, server_default=JobStatus.QUEUED),
    Column("paused", Boolean, nullable=False, server_default=text("false")),
    Column(
        "open", Boolean, nullable=False, comment="true: frames from the cursor on may be claimed"
    ),
    Column("total", BigInteger, nullable=False),
    Column("cursor", BigInteger, nullable=False, server_default=text("0")),
    Column("run", Integer, nullable=False, server_default=text("0"), comment="index into runs"),
    Column("run_end", BigInteger, nullable=False, comment="ordinal where batch_key ends"),
    Column("batch_key", Text, nullable=False, comment="of the frame at the cursor"),
    Column("bucket", SmallInteger, nullable=False, comment="of the frame at the cursor"),
    Column("runs", JSONB, nullable=False, comment="[[end ordinal, batch_key, bucket], …]"),
    Column("running", BigInteger, nullable=False, server_default=text("0")),
    Column("succeeded", BigInteger, nullable=False, server_default=text("0")),
    Column("dead", BigInteger, nullable=False, server_default=text("0")),
    Column("cancelled", BigInteger, nullable=False, server_default=text("0")),
    Column(
        "device_seconds",
        Double,
        nullable=False,
        server_default=text("0"),
        comment="device time of its succeeded frames",
    ),
    Column("reused", BigInteger, nullable=False, server_default=text("0")),
    Column("bytes", BigInteger, nullable=False, server_default=text("0"), comment="of its images"),
    Column(
        "failures",
        JSONB,
        nullable=False,
        server_default="{}",
        comment="numbers of unsuccessful attempts, by reason",
    ),
    _moment("pace_since"),
    Column("pace_since_frames", BigInteger, nullable=False, server_default=text("0")),
    _moment("pace_next"),
    Column("pace_next_frames", BigInteger, nullable=False, server_default=text("0")),
    Column("max_attempts", SmallInteger, nullable=False),
    Column("spec", JSON, nullable=False, comment="FullSpec; JSON, since a grid's order matters"),
    Column("labels", JSONB, nullable=False),
    Column("input_id", ForeignKey("inputs.id")),
    Column("idempotency_key", Text),
    Column("idempotency_digest", LargeBinary),
    _moment("created_at", now=True),
    _moment("started_at"),
    _moment("finished_at"),
    _moment("removed_at"),
    Column(
        "behind_from",
        BigInteger,
        comment="ordinal from which requeued frames are not updated yet",
    ),
    Column("due_at", DateTime(timezone=True), comment="next time at which it may miss a deadline"),
    Column("missed", Text, comment="field whose deadline ended the job"),
    Column(
        "stretch",
        BigInteger,
        comment="frames of a stretch, within which groups are formed; null: no groups",
    ),
    Column(
        "keep_for",
        Integer,
        comment="seconds from its end to its removal; null: the farm's retention",
    ),
    UniqueConstraint("tenant_id", "idempotency_key"),
    CheckConstraint(_one_of("status", list(JobStatus)), name="status"),
    CheckConstraint("cursor BETWEEN 0 AND total", name="cursor"),
    CheckConstraint(
        "running >= 0 AND succeeded >= 0 AND dead >= 0 AND cancelled >= 0"
        " AND running + succeeded + dead + cancelled <= total",
        name="conservation",
    ),
    Index(
        "jobs_claim",
        "pipeline",
        "tenant_id",
        "priority",
        "created_at",
        "id",
        postgresql_where=text("open"),
    ),
    Index(
        "jobs_fill",
        "pipeline",
        "batch_key",
        "priority",
        "created_at",
        "id",
        postgresql_where=text("open"),
    ),
    Index("jobs_oldest", "pipeline", "priority", "created_at", postgresql_where=text("open")),
    Index("jobs_newest", "tenant_id", "created_at", "id"),
    Index("jobs_status", "tenant_id", "status", "created_at", "id"),
    Index("jobs_all_newest", "created_at", "id", postgresql_where=text("removed_at IS NULL")),
    Index(
        "jobs_all_status",
        "status",
        "created_at",
        "id",
        postgresql_where=text("removed_at IS NULL"),
    ),
    Index(
        "jobs_dead",
        "created_at",
        "id",
        postgresql_where=text("dead > 0 AND removed_at IS NULL"),
    ),
    Index("jobs_labels", "labels", postgresql_using="gin"),
    Index(
        "jobs_finished",
        "finished_at",
        postgresql_where=text("finished_at IS NOT NULL AND removed_at IS NULL"),
    ),
    # Of those that are kept for long none is read while others are due.
    Index(
        "jobs_kept",
        text("((finished_at AT TIME ZONE 'UTC') + make_interval(secs => keep_for))"),
        postgresql_where=text(
            "keep_for IS NOT NULL AND finished_at IS NOT NULL AND removed_at IS NULL"
        ),
    ),
    Index(
        "jobs_kept_as_others",
        "finished_at",
        postgresql_where=text(
            "keep_for IS NULL AND finished_at IS NOT NULL AND removed_at IS NULL"
        ),
    ),
    Index("jobs_removed", "removed_at", postgresql_where=text("removed_at IS NOT NULL")),
    Index("jobs_behind", "id", postgresql_where=text("behind_from IS NOT NULL")),
    Index("jobs_aside", "tenant_id", postgresql_where=text("paused OR behind_from IS NOT NULL")),
    Index("jobs_input", "input_id", postgresql_where=text("input_id IS NOT NULL")),
    Index("jobs_due", "tenant_id", "due_at", postgresql_where=text("due_at IS NOT NULL")),
    # Counters change with every batch.
    postgresql_with={"fillfactor": "50"},
)

used_keys = Table(
    "used_keys",
    metadata,
    # No foreign key: it would lock the tenant after its jobs.
    Column("tenant_id", Uuid, primary_key=True),
    Column("idempotency_key", Text, primary_key=True),
    Column("digest", LargeBinary, nullable=False),
    Column("job_id", Uuid, nullable=False),
    _moment("ends_at", null=False),
    Index("used_keys_end", "ends_at"),
    comment="Idempotency keys of removed jobs.",
)

inputs = Table(
    "inputs",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("tenant_id", ForeignKey("tenants.id"), nullable=False),
    Column("sha256", LargeBinary, nullable=False, comment="sha256 of its lines as they were sent"),
    Column("lines", BigInteger, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("shown", ARRAY(Text), nullable=False, comment="its first prompts"),
    Column("top_seed", BigInteger),
    Column("text_bytes", Integer, nullable=False, comment="most bytes of one line's prompts"),
    Column("keys", Boolean, nullable=False),
    Column("negatives", Boolean, nullable=False),
    _moment("created_at", now=True),
    Column(
        "syntax_flaw",
        Text,
        comment="error in its prompts as weighted prompts; null: not checked yet",
    ),
    Column(
        "settings",
        JSONB,
        comment="settings of its lines, each with its first line; null: no line has any",
    ),
    Column("fields", ARRAY(Text), comment="parameters in its lines; null: none has any"),
    UniqueConstraint("tenant_id", "sha256"),
    Index("inputs_newest", "tenant_id", "created_at", "id"),
    Index("inputs_oldest", "created_at"),
)

input_parts = Table(
    "input_parts",
    metadata,
    Column("input_id", ForeignKey("inputs.id", ondelete="CASCADE"), primary_key=True),
    Column("first", BigInteger, primary_key=True, comment="index of the part's first line"),
    Column("content", LargeBinary, nullable=False, comment="lines of JSON, compressed with zlib"),
    Column(
        "settings",
        LargeBinary,
        comment="uint16 of each line: index into the input's settings; null: all have the first",
    ),
)

input_images = Table(
    "input_images",
    metadata,
    Column("input_id", ForeignKey("inputs.id", ondelete="CASCADE"), primary_key=True),
    Column("sha256", LargeBinary, primary_key=True),
    Column("tenant_id", Uuid, nullable=False),
    Column("line", BigInteger, nullable=False, comment="first line that names it"),
    comment="Control images that lines of inputs name.",
)

job_groups = Table(
    "job_groups",
    metadata,
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("first", BigInteger, primary_key=True, comment="its first position"),
    Column("stop", BigInteger, nullable=False, comment="position after its last"),
    Column("run", SmallInteger, nullable=False, comment="index into the job's runs"),
    comment="Positions of a job whose frames share a batch_key.",
)

job_order = Table(
    "job_order",
    metadata,
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("first", BigInteger, primary_key=True, comment="its first position"),
    Column("images", BigInteger, nullable=False, comment="images_per_prompt"),
    Column(
        "places",
        ARRAY(Integer),
        nullable=False,
        comment="ordinal / images of each `images` positions",
    ),
    comment="The ordinals of a job with groups, in the order in which they are claimed.",
)

job_prompts = Table(
    "job_prompts",
    metadata,
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("first", BigInteger, primary_key=True, comment="index of the chunk's first prompt"),
    Column("prompts", ARRAY(Text), nullable=False),
)

exports = Table(
    "exports",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("tenant_id", ForeignKey("tenants.id"), nullable=False),
    Column("kind", Text, nullable=False),
    Column("job_ids", ARRAY(Uuid), nullable=False),
    Column("shard_frames", Integer, nullable=False),
    Column("bucket", Text, nullable=False),
    Column("prefix", Text, nullable=False),
    Column("state", Text, nullable=False, server_default="running"),
    Column("error", Text),
    Column("shards", Integer, nullable=False),
    Column("shards_done", Integer, nullable=False, server_default=text("0")),
    Column("images", BigInteger, nullable=False, server_default=text("0")),
    Column("missing", BigInteger, nullable=False, server_default=text("0")),
    Column("bytes", BigInteger, nullable=False, server_default=text("0")),
    _moment("created_at", now=True),
    _moment("finished_at"),
    _moment("removed_at"),
    _moment("claimed_at"),
    CheckConstraint(_one_of("kind", ["webdataset", "parquet", "imagefolder"]), "kind"),
    CheckConstraint(_one_of("state", ["running", "succeeded", "failed"]), "state"),
    Index("exports_newest", "tenant_id", "created_at", "id"),
    Index("exports_all_newest", "created_at", "id", postgresql_where=text("removed_at IS NULL")),
    Index(
        "exports_finished",
        "finished_at",
        postgresql_where=text("finished_at IS NOT NULL AND removed_at IS NULL"),
    ),
    Index("exports_removed", "removed_at", postgresql_where=text("removed_at IS NOT NULL")),
    Index("exports_running", "created_at", postgresql_where=text("state = 'running'")),
)

export_shards = Table(
    "export_shards",
    metadata,
    Column("export_id", ForeignKey("exports.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("job_id", Uuid, comment="null: the dataset files, which are the last shard"),
    Column("first", BigInteger, nullable=False, comment="ordinal of its first frame"),
    Column("stop", BigInteger, nullable=False),
    Column("base", BigInteger, nullable=False, comment="base + ordinal is the number of an image"),
    Column("attempt", SmallInteger, nullable=False, server_default=text("0")),
    Column("failures", SmallInteger, nullable=False, server_default=text("0")),
    Column("worker", Text),
    _moment("due_at", now=True),
    _moment("done_at"),
    Column("rows", Integer),
    Column("missing", Integer),
    Column("files", JSONB),
    Column("error", Text),
    Column("whole", Boolean, comment="true: may be written; null: not checked yet"),
    Index("export_shards_due", "export_id", "number", postgresql_where=text("done_at IS NULL")),
    Index("export_shards_new", "export_id", postgresql_where=text("whole IS NULL")),
    Index("export_shards_waiting", "job_id", postgresql_where=text("whole IS NOT TRUE")),
    Index("export_shards_ready", "due_at", postgresql_where=text("whole AND done_at IS NULL")),
)

export_news = Table(
    "export_news",
    metadata,
    Column("id", BigInteger, Identity(), primary_key=True),
    Column("job_id", Uuid, nullable=False, comment="job of which some frames have ended"),
)

frames = Table(
    "frames",
    metadata,
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("ordinal", BigInteger, primary_key=True),
    Column("state", Text, nullable=False),
    Column(
        "attempt",
        SmallInteger,
        nullable=False,
        comment="number of the latest attempt, counted at the claim",
    ),
    Column(
        "uncharged",
        SmallInteger,
        nullable=False,
        server_default=text("0"),
        comment="attempts that do not count towards max_attempts",
    ),
    Column(
        "rerolls",
        SmallInteger,
        nullable=False,
        server_default=text("0"),
        comment="number of images that a filter rejected",
    ),
    Column(
        "reused",
        Boolean,
        nullable=False,
        server_default=text("false"),
        comment="true: its artifact is a copy of another frame's",
    ),
    Column("worker", Text, nullable=False, comment="name of the worker of the latest attempt"),
    Column("bucket", SmallInteger, comment="bucket of the latest attempt"),
    _moment("started_at", null=False),
    _moment("finished_at"),
    Column(
        "isolated",
        Boolean,
        nullable=False,
        server_default=text("false"),
        comment="true: an attempt failed, so it gets no neighbours",
    ),
    Column("slot", SmallInteger, comment="place in the batch, from 0"),
    Column("sha256", LargeBinary),
    Column("bytes", Integer),
    Column("error", Text, comment="reason why the latest attempt failed"),
    Column("run", SmallInteger, comment="index into its job's runs, if that has groups"),
    CheckConstraint(_one_of("state", list(ROW_STATES)), name="state"),
    CheckConstraint(
        "(state = 'succeeded') = (sha256 IS NOT NULL AND bytes IS NOT NULL)", name="artifact"
    ),
    # Space on each page for the one update that most frames get.
    postgresql_with={"fillfactor": "75"},
)

perceptual_hashes = Table(
    "perceptual_hashes",
    metadata,
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("ordinal", BigInteger, primary_key=True),
    Column("hash", BigInteger, nullable=False, comment="perceptual hash of 64 bits"),
    *(
        # two of its eight bytes
        Index(
            f"perceptual_hashes_band_{first}",
            "job_id",
            text(f'"substring"(int8send(hash), {first}, 2)'),
        )
        for first in (1, 3, 5, 7)
    ),
)

reusable_renders = Table(
    "reusable_renders",
    metadata,
    Column("tenant_id", ForeignKey("tenants.id"), primary_key=True),
    Column(
        "digest", LargeBinary, primary_key=True, comment="hash of everything that decides its bytes"
    ),
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("ordinal", BigInteger, nullable=False),
    Index("reusable_renders_job", "job_id"),
)

requeued_frames = Table(
    "requeued_frames",
    metadata,
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("ordinal", BigInteger, primary_key=True),
    Column("pipeline", Text, nullable=False),
    Column("tenant_id", Uuid, nullable=False),
    Column("priority", SmallInteger, nullable=False),
    Column("batch_key", Text, nullable=False),
    Column("bucket", SmallInteger, nullable=False),
    _moment("not_before", null=False),
    _moment("job_created_at", null=False),  # for older versions
    Column("paused", Boolean, nullable=False),
    Column(
        "isolated",
        Boolean,
        nullable=False,
        comment="true: its attempt failed, so it gets no neighbours",
    ),
    Index(
        "requeued_frames_due",
        "pipeline",
        "tenant_id",
        "priority",
        "not_before",
        "job_id",
        "ordinal",
        postgresql_where=text("NOT paused"),
    ),
    Index(
        "requeued_frames_alike",
        "pipeline",
        "batch_key",
        "priority",
        "not_before",
        "job_id",
        "ordinal",
        postgresql_where=text("NOT paused AND NOT isolated"),
    ),
    Index("requeued_frames_of_job", "job_id", "isolated", "not_before", "ordinal"),
)

attempts = Table(
    "attempts",
    metadata,
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("ordinal", BigInteger, primary_key=True),
    Column("attempt", SmallInteger, primary_key=True),
    Column("worker", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("message", Text, nullable=False),
    Column("traceback", Text),
    _moment("started_at", null=False),
    _moment("ended_at", now=True),
    Column("fault", Text, comment="its cause, 16 hexadecimal digits; null: none"),
    Index("attempts_ended", "ended_at", postgresql_where=text("fault IS NOT NULL")),
    Index(
        "attempts_fault",
        "fault",
        "job_id",
        "ordinal",
        "attempt",
        postgresql_where=text("fault IS NOT NULL"),
    ),
)

faults = Table(
    "faults",
    metadata,
    Column("fault", Text, primary_key=True),
    Column("reason", Text, nullable=False),
    Column("message", Text, nullable=False, comment="of its first attempt"),
    _moment("first_at", null=False),
    _moment("last_at", null=False),
    Column("state", Text, nullable=False, server_default="new"),
    Column("note", Text, nullable=False, server_default=""),
    Column("changed_at", DateTime(timezone=True), comment="of state and note"),
    CheckConstraint(_one_of("state", ["new", "seen", "muted", "resolved"]), name="state"),
    Index("faults_last", "last_at"),
    comment="Causes of failed attempts.",
)

control_images = Table(
    "control_images",
    metadata,
    Column("tenant_id", ForeignKey("tenants.id"), primary_key=True),
    Column(
        "sha256",
        LargeBinary,
        primary_key=True,
        comment="sha256 of the PNG in S3; in hex it is the image's id",
    ),
    Column("width", Integer, nullable=False),
    Column("height", Integer, nullable=False),
    Column("bytes", Integer, nullable=False),
    _moment("created_at", now=True),
    Column(
        "state",
        Text,
        nullable=False,
        server_default="stored",
        comment="stored, arriving or removing; the object may be missing unless it is stored",
    ),
    Index("control_images_removing", "tenant_id", postgresql_where=text("state = 'removing'")),
)

leases = Table(
    "leases",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("worker_id", Uuid, nullable=False),
    Column(
        "pid", Integer, nullable=False, comment="process ID of the child that renders the batch"
    ),
    Column("pipeline", Text, nullable=False),
    _moment("created_at", now=True),
    _moment("expires_at", null=False),
    Column("job_ids", ARRAY(Uuid), nullable=False),
    Column("ordinals", ARRAY(BigInteger), nullable=False),
    Column("attempts", ARRAY(SmallInteger), nullable=False),
    Column("tenant_ids", ARRAY(Uuid), comment="null: claimed by a version before this column"),
    Column(
        "frame_cost",
        BigInteger,
        comment="steps x pixels of each frame; null: claimed by a version before this column",
    ),
    Column(
        "spooled",
        Boolean,
        nullable=False,
        server_default=text("false"),
        comment="true: its batch is rendered and waits for the storage",
    ),
    Column("step", Integer, nullable=False, server_default=text("0")),
    Column("steps", Integer, nullable=False, server_default=text("0")),
    _moment("stepped_at", now=True),
    Index("leases_worker", "worker_id"),
    Index("leases_expiry", "expires_at"),
)

workers = Table(
    "workers",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("name", Text, nullable=False),
    Column("pipeline", Text, nullable=False),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("state", Text, nullable=False),
    Column("draining", Boolean, nullable=False, server_default=text("false")),
    Column("gone", Boolean, nullable=False, server_default=text("false")),
    Column("device", Text),
    Column("version", Text, comment="its version of the farm"),
    Column("device_id", Text, comment="UUID of its CUDA device; null without one"),
    Column("device_bytes", BigInteger, comment="memory of that device"),
    Column("problem", Text, comment="reason why it cannot render"),
    Column(
        "failing",
        ARRAY(Text),
        nullable=False,
        server_default="{}",
        comment="different frames that failed since the last success",
    ),
    Column("trips", SmallInteger, nullable=False, server_default=text("0")),
    _moment("tripped_until"),
    Column("avoids", Uuid, comment="tenant to leave out while tripped, if only its frames failed"),
    Column("load_seconds", Double, comment="time in which its child loaded the pipeline"),
    _moment("started_at", now=True),
    _moment("seen_at", now=True),
    # Sums since the worker's start, added up by pipeline for /metrics.
    Column("succeeded", BigInteger, nullable=False, server_default=text("0")),
    Column("requeued", BigInteger, nullable=False, server_default=text("0")),
    Column("dead", BigInteger, nullable=False, server_default=text("0")),
    Column("dropped", BigInteger, nullable=False, server_default=text("0")),
    Column("expired", BigInteger, nullable=False, server_default=text("0")),
    Column("batches", BigInteger, nullable=False, server_default=text("0")),
    Column("denoise_seconds", Double, nullable=False, server_default=text("0")),
    Column("encode_seconds", Double, nullable=False, server_default=text("0")),
    Column("put_seconds", Double, nullable=False, server_default=text("0")),
    Column("commit_seconds", Double, nullable=False, server_default=text("0")),
    Column(
        "work_seconds",
        Double,
        nullable=False,
        server_default=text("0"),
        comment="wall-clock time while there was something to render",
    ),
    Column(
        "cost",
        Double,
        nullable=False,
        server_default=text("0"),
        comment="steps x pixels of all rendered frames",
    ),
    Column(
        "cost_seconds",
        Double,
        nullable=False,
        server_default=text("0"),
        comment="time in which `cost` was denoised",
    ),
    Column(
        "denoise_buckets",
        ARRAY(BigInteger),
        nullable=False,
        server_default="{}",
        comment="number of batches by seconds of denoising; see histograms.py",
    ),
    Column(
        "wait_buckets",
        ARRAY(BigInteger),
        nullable=False,
        server_default="{}",
        comment="number of jobs by priority and by seconds until their first claim",
    ),
    Column("spool_bytes", BigInteger, comment="pictures on its disk, not stored yet"),
    Column("spool_limit_bytes", BigInteger, comment="maximum of spool_bytes"),
    CheckConstraint(_one_of("state", ["loading", "idle", "rendering", "failed"]), "state"),
    Index("workers_pipeline", "pipeline"),
    Index("workers_alive", "pipeline", "name", postgresql_where=text("NOT gone")),
)

shares = Table(
    "shares",
    metadata,
    Column("pipeline", Text, primary_key=True),
    Column("tenant_id", ForeignKey("tenants.id"), primary_key=True),
    Column(
        "served",
        BigInteger,
        nullable=False,
        server_default="0",
        comment="number of frames claimed, by which versions before `used` share lanes",
    ),
    Column(
        "used",
        Double,
        nullable=False,
        server_default="0",
        comment="bucket x steps x pixels of claimed batches, divided by the tenant's weight",
    ),
    # The next two are bounds, which claims correct. Triggers of the database lower them.
    Column(
        "priority",
        SmallInteger,
        server_default=text("0"),
        comment="no claimable frame is more urgent; null: there is none",
    ),
    Column(
        "retry_at",
        DateTime(timezone=True),
        server_default="-infinity",
        comment="no other requeued frame is due before; null: there is none",
    ),
    Column(
        "waiting",
        ARRAY(BigInteger),
        nullable=False,
        server_default="{0,0,0}",
        comment="frames of open jobs that were never claimed, by priority",
    ),
    Column(
        "requeued",
        ARRAY(BigInteger),
        nullable=False,
        server_default="{0,0,0}",
        comment="requeued frames that are not paused, by priority",
    ),
    Column(
        "waiting_cost",
        Numeric,
        nullable=False,
        server_default="0",
        comment="steps x pixels of the frames in `waiting` and `requeued`",
    ),
    Index("shares_by_use", "pipeline", "priority", "used", "tenant_id"),
    Index("shares_of_tenant", "tenant_id"),
    Index(
        "shares_normal",
        "pipeline",
        "used",
        "tenant_id",
        postgresql_where=text("waiting[2] + requeued[2] > 0"),
    ),
    Index(
        "shares_bulk",
        "pipeline",
        "used",
        "tenant_id",
        postgresql_where=text("waiting[3] + requeued[3] > 0"),
    ),
    Index("shares_retries", "pipeline", "retry_at", postgresql_where=text("retry_at IS NOT NULL")),
)

lanes = Table(
    "lanes",
    metadata,
    Column("pipeline", Text, primary_key=True),
    Column(
        "owed",
        ARRAY(Double),
        nullable=False,
        comment="device cost owed: to normal and bulk together; to bulk",
    ),
    Column(
        "some_full",
        Boolean,
        nullable=False,
        server_default=text("false"),
        comment="a claim should count first which tenants may have no more running frames",
    ),
    Column("held_from", SmallInteger, comment="priorities from this one on are held; null: none"),
    Column("held_why", Text, comment="reason of the hold, which every tenant may read"),
    Column("held_by", Text, comment="name of the operator's key"),
    _moment("held_at"),
    Column("held_until", DateTime(timezone=True), comment="null: until it is released"),
)

samples = Table(
    "samples",
    metadata,
    Column("step", SmallInteger, primary_key=True, comment="60, 600 or 3600 seconds"),
    Column("pipeline", Text, primary_key=True),
    Column("at", DateTime(timezone=True), primary_key=True, comment="end of the step"),
    Column(
        "read_at",
        DateTime(timezone=True),
        nullable=False,
        comment="time at which the sums were read",
    ),
    Column("waiting", ARRAY(BigInteger), nullable=False, comment="frames that wait, by priority"),
    *(
        Column(name, REAL, nullable=False)
        for name in ("workers", "able", "rendering", "loading", "failed", "draining")
    ),
    *(
        Column(name, BigInteger, nullable=False)
        for name in ("succeeded", "requeued", "dead", "dropped", "expired", "batches")
    ),
    *(
        Column(f"{name}_seconds", Double, nullable=False)
        for name in ("denoise", "encode", "put", "commit", "work")
    ),
    Column(
        "wait_buckets",
        ARRAY(BigInteger),
        nullable=False,
        comment="histograms of waits, by priority",
    ),
    Index("samples_at", "step", "at"),
    comment="Means of what is now, and sums since the beginning, for charts.",
)


def _figures() -> list[Column[object]]:
    return [
        Column("frames", BigInteger, nullable=False),
        Column("device_seconds", Double, nullable=False),
        Column("bytes", BigInteger, nullable=False),
        Column("failed", BigInteger, nullable=False, comment="attempts"),
    ]


usage = Table(
    "usage",
    metadata,
    Column("tenant_id", Uuid, primary_key=True),
    Column("day", Date, primary_key=True, comment="UTC"),
    Column("pipeline", Text, primary_key=True),
    Column("digest", Text, primary_key=True, comment="md5 of the labels"),
    Column("labels", JSONB, nullable=False),
    *_figures(),
    Index("usage_day", "day"),
    comment="What jobs used. It outlives them.",
)

accounted = Table(
    "accounted",
    metadata,
    Column("job_id", Uuid, primary_key=True),
    *_figures(),
    comment="What of a job is in `usage` already.",
)

usage_mark = Table(
    "usage_mark",
    metadata,
    Column("number", SmallInteger, primary_key=True, autoincrement=False),
    Column(
        "finished_at",
        DateTime(timezone=True),
        comment="jobs that ended before are in `usage`; null: none is",
    ),
    Column("noted_at", DateTime(timezone=True), comment="time of the last note"),
    comment="One row: how far `usage` is.",
)

signing_secrets = Table(
    "signing_secrets",
    metadata,
    Column("number", SmallInteger, primary_key=True, autoincrement=False),
    Column("secret", LargeBinary, nullable=False),
    _moment("created_at", now=True),
    comment="Secrets that sign addresses of images.",
)

device_use = Table(
    "device_use",
    metadata,
    Column("tenant_id", Uuid, primary_key=True),  # no key: it would lock the tenant's row
    Column("day", Date, primary_key=True, comment="UTC"),
    Column("pipeline", Text, primary_key=True),
    # Each session writes rows that no other one writes, so that no commit waits for another.
    Column(
        "writer",
        Integer,
        primary_key=True,
        autoincrement=False,
        comment="process ID of the session in Postgres; 0: sum of earlier ones",
    ),
    Column("seconds", Double, nullable=False),
    Index("device_use_parts", "tenant_id", postgresql_where=text("writer <> 0")),
    comment="Device time of succeeded frames. It outlives their jobs.",
)

events = Table(
    "events",
    metadata,
    Column("id", BigInteger, Identity(), primary_key=True),
    Column(
        "xid",
        BigInteger,
        nullable=False,
        server_default=text("(pg_current_xact_id()::text)::bigint"),
        comment="transaction that wrote it; 0: written before version 31 of the schema",
    ),
    Column("job_id", Uuid, nullable=True, comment="null: of an export, or of the tenant"),
    Column("tenant_id", Uuid, nullable=False),
    _moment("at", now=True),
    Column("kind", Text, nullable=False),
    Column("data", JSONB, nullable=False),
    Index("events_job", "job_id", "id"),
    Index("events_tenant", "tenant_id", "xid", "id", postgresql_where=text("xid > 0")),
    Index("events_at", "at"),
    Index(
        "events_pictures",
        "tenant_id",
        "id",
        postgresql_where=text("kind = 'frames.succeeded'"),
    ),
)

event_epochs = Table(
    "event_epochs",
    metadata,
    Column("id", Text, primary_key=True),
    Column(
        "system", Text, nullable=False, comment="identifiers of the server's data, and of the table"
    ),
    Column("timeline", Text, nullable=False),
    Column("last_before", BigInteger, nullable=False, comment="last event of another system"),
    _moment("began_at", now=True),
    UniqueConstraint("system", "timeline"),
    comment="Servers that wrote events. Each counts its transactions from the beginning.",
)

webhooks = Table(
    "webhooks",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("tenant_id", ForeignKey("tenants.id"), nullable=False),
    Column("url", Text, nullable=False),
    Column("kinds", ARRAY(Text), nullable=False),
    Column("labels", JSONB, nullable=False),
    Column("description", Text, nullable=False),
    Column("state", Text, nullable=False, server_default=text("'enabled'")),
    Column("disabled_because", Text),
    Column("secret", LargeBinary, nullable=False),
    Column("secret_before", LargeBinary),
    _moment("before_until"),
    _moment("created_at", now=True),
    Column(
        "failures",
        Integer,
        nullable=False,
        server_default=text("0"),
        comment="attempts that failed since the last success",
    ),
    _moment("failing_since"),
    _moment("last_success_at"),
    Column(
        "parked_until",
        DateTime(timezone=True),
        comment="its deliveries wait until then; null: it is not parked",
    ),
    _moment("served_at"),
    _moment("removed_at"),
    Column(
        "origin",
        Text,
        comment="server whose addresses jobs name; null: a tenant created the endpoint",
    ),
    CheckConstraint(_one_of("state", ["enabled", "paused", "disabled"]), name="state"),
    Index("webhooks_tenant", "tenant_id"),
    Index(
        "webhooks_origin",
        "tenant_id",
        "origin",
        postgresql_where=text("origin IS NOT NULL AND removed_at IS NULL"),
    ),
    Index("webhooks_disabled", "id", postgresql_where=text("state = 'disabled'")),
    comment="Endpoints of tenants that are told of events.",
)

webhook_events = Table(
    "webhook_events",
    metadata,
    Column("event_id", BigInteger, primary_key=True, autoincrement=False),
    comment="Events whose messages are not made yet.",
)

webhook_deliveries = Table(
    "webhook_deliveries",
    metadata,
    Column("id", BigInteger, Identity(), primary_key=True),
    Column("webhook_id", ForeignKey("webhooks.id", ondelete="CASCADE"), nullable=False),
    Column("message_id", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("job_id", Uuid),
    Column("body", LargeBinary, nullable=False),
    Column("state", Text, nullable=False, server_default=text("'pending'")),
    Column("tries", SmallInteger, nullable=False, server_default=text("0")),
    _moment("next_at", now=True),
    Column(
        "leased_until",
        DateTime(timezone=True),
        comment="an attempt may be in progress until then",
    ),
    _moment("created_at", now=True),
    Column("url", Text, comment="the job's address; null: the endpoint's"),
    UniqueConstraint("webhook_id", "message_id"),
    CheckConstraint(
        _one_of("state", ["pending", "retrying", "succeeded", "dead", "dropped"]), name="state"
    ),
    Index(
        "webhook_deliveries_due",
        "webhook_id",
        "next_at",
        postgresql_where=text("state IN ('pending', 'retrying')"),
    ),
    Index(
        "webhook_deliveries_leased",
        "webhook_id",
        postgresql_where=text("leased_until IS NOT NULL"),
    ),
    Index("webhook_deliveries_log", "webhook_id", "id"),
    Index("webhook_deliveries_age", "created_at"),
    Index("webhook_deliveries_job", "job_id", "id", postgresql_where=text("job_id IS NOT NULL")),
    comment="Messages, one row for each endpoint that gets it.",
)

frame_provenances = Table(
    "frame_provenances",
    metadata,
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("ordinal", BigInteger, primary_key=True),
    Column("attempt", SmallInteger, nullable=False),
    Column("provenance", Text, nullable=False),
    comment="Of frames whose image files hold no metadata.",
)

unanswered_calls = Table(
    "unanswered_calls",
    metadata,
    Column("key", Text, primary_key=True, comment="idempotency key of its job"),
    Column("digest", LargeBinary, nullable=False, comment="sha256 of the API key and the content"),
    Column("repeats", SmallInteger, nullable=False, comment="times it was sent before"),
    Column("given_up", Boolean, nullable=False, server_default=text("false")),
    _moment("at", now=True),
    Index("unanswered_calls_digest", "digest"),
    Index("unanswered_calls_at", "at"),
    comment="Calls without an idempotency key that have no answer yet.",
)

job_webhooks = Table(
    "job_webhooks",
    metadata,
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("webhook_id", Uuid, nullable=False),
    Column("url", Text, nullable=False),
    Column("kinds", ARRAY(Text), nullable=False),
    comment="Addresses that jobs name, to be told of them.",
)

webhook_attempts = Table(
    "webhook_attempts",
    metadata,
    Column(
        "delivery_id",
        ForeignKey("webhook_deliveries.id", ondelete="CASCADE"),
        primary_key=True,
    ),
    Column("number", SmallInteger, primary_key=True),
    _moment("at", now=True),
    Column("milliseconds", Integer, nullable=False),
    Column("status", SmallInteger),
    Column("error", Text),
    Column("answer", Text, nullable=False),
    comment="Attempts to deliver a message, with the receiver's answers.",
)
