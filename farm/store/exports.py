"""Exports: datasets that are being written, one row per shard. A shard is claimed by a lease too.

A shard is a range of a job's frames. It is whole, and may be written, once all its frames have
ended. So an export of a job that still renders advances with the job. The last row has no job: it
holds the dataset files, and is whole once all other shards are done.

A transition that ends frames adds their job to `export_news` if a shard waits for it. So shards
need no polling.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection, text

from farm.domain.states import REJECTED
from farm.errors import NotFound
from farm.store.rows import TENANT_NAME, JsonObject, rows_of

MAX_FAILURES = 5
"""Failures of one shard after which its export has failed."""
MAX_REST_SECONDS = 60.0
SHARDS_PER_LOOK = 1_000
"""News rows, and new shards, that one claim checks at most, so that no claim takes long."""

EVENT = """
INSERT INTO events (tenant_id, kind, data)
SELECT tenant_id, {kind}, jsonb_strip_nulls(jsonb_build_object('export', id, 'error', error))
FROM {rows}
"""
"""Appends the event of a transition of exports. They are of no job."""

INSERT = text(f"""
WITH added AS (
    INSERT INTO exports (id, tenant_id, kind, job_ids, shard_frames, bucket, prefix, shards)
    VALUES (:id, :tenant_id, :kind, :job_ids, :shard_frames, :bucket, :prefix, :shards)
    RETURNING id, tenant_id, error
) {EVENT.format(kind="'export.queued'", rows="added")}
""")  # noqa: S608 - constants only

# Shards are numbered across all jobs, in job order. Image number = `base` of the job + ordinal.
INSERT_SHARDS = text("""
WITH job AS (
    SELECT j.id, j.total, d.place,
           coalesce(sum(j.total) OVER (ORDER BY d.place ROWS BETWEEN UNBOUNDED PRECEDING
                                       AND 1 PRECEDING), 0)::bigint AS base
    FROM unnest(CAST(:job_ids AS uuid[])) WITH ORDINALITY AS d (id, place) JOIN jobs j USING (id)
), shard AS (
    SELECT row_number() OVER (ORDER BY job.place, first) - 1 AS number, job.id, first,
           least(first + :shard_frames, job.total) AS stop, job.base
    FROM job CROSS JOIN LATERAL generate_series(0, job.total - 1, :shard_frames) AS first
)
INSERT INTO export_shards (export_id, number, job_id, first, stop, base)
SELECT :id, number, id, first, stop, base FROM shard
UNION ALL
SELECT :id, :shards, NULL, 0, 0, 0
""")

COUNT_SHARDS = text("""
SELECT coalesce(sum((total + :frames - 1) / :frames), 0)::bigint FROM jobs WHERE id = ANY(:ids)
""")

KEEP_JOBS = text("SELECT FROM jobs WHERE id = ANY(:ids) ORDER BY id FOR KEY SHARE")

FORMATS_OF = text("""
SELECT DISTINCT coalesce(spec ->> 'format', 'png') FROM jobs WHERE id = ANY(:ids) ORDER BY 1
""")

# Only if lines of one of the jobs have different settings: other datasets have the same columns.
SPECS_OF = text("""
SELECT spec FROM jobs WHERE id = ANY(:ids) AND EXISTS (
    SELECT FROM jobs v WHERE v.id = ANY(:ids) AND v.stretch IS NOT NULL)
""")

# Every frame with a lower ordinal was claimed.
CLAIMED_BEFORE = """
(CASE WHEN j.cursor = j.total THEN j.total
      ELSE j.cursor - j.cursor % coalesce(j.stretch, 1) END)"""

# Only these shards are checked: new ones, and those of jobs with frames that ended since. A claimed
# frame that has not ended is in a lease or in requeued_frames; both are small. A whole shard stays
# whole.
LOOK = text(f"""
WITH news AS (
    DELETE FROM export_news WHERE id IN (
        SELECT id FROM export_news ORDER BY id LIMIT :limit FOR UPDATE SKIP LOCKED)
    RETURNING job_id
), candidate AS (
    (SELECT s.export_id, s.number, s.job_id, s.first, s.stop FROM export_shards s
     WHERE s.whole IS NULL AND s.done_at IS NULL LIMIT :limit)
    UNION
    SELECT s.export_id, s.number, s.job_id, s.first, s.stop
    FROM (SELECT DISTINCT job_id FROM news) n JOIN export_shards s ON s.job_id = n.job_id
    WHERE NOT s.whole AND s.done_at IS NULL
), judged AS (
    SELECT c.export_id, c.number, CASE
        WHEN c.job_id IS NULL THEN NOT EXISTS (
            SELECT FROM export_shards o
            WHERE o.export_id = c.export_id AND o.done_at IS NULL AND o.job_id IS NOT NULL)
        WHEN j.id IS NULL OR j.removed_at IS NOT NULL OR j.finished_at IS NOT NULL THEN true
        ELSE {CLAIMED_BEFORE} >= c.stop AND NOT EXISTS (
            SELECT FROM requeued_frames r
            WHERE r.job_id = c.job_id AND r.ordinal >= c.first AND r.ordinal < c.stop
        ) AND NOT EXISTS (
            SELECT FROM leases l
            CROSS JOIN LATERAL unnest(l.job_ids, l.ordinals) AS d (job_id, ordinal)
            WHERE l.pipeline = j.pipeline AND d.job_id = c.job_id
              AND d.ordinal >= c.first AND d.ordinal < c.stop)
        END AS whole
    FROM candidate c LEFT JOIN jobs j ON j.id = c.job_id
)
UPDATE export_shards s SET whole = j.whole, due_at = clock_timestamp()
FROM judged j
WHERE s.export_id = j.export_id AND s.number = j.number AND s.whole IS NOT TRUE
""")  # noqa: S608 - constants only

# Checks again: a shard may have been checked while its job ended, or its frames may have been ended
# by a version that writes no news.
LOOK_AGAIN = text(f"""
WITH doubtful AS (
    SELECT s.export_id, s.number
    FROM exports e JOIN export_shards s ON s.export_id = e.id LEFT JOIN jobs j ON j.id = s.job_id
    WHERE e.state = 'running' AND e.removed_at IS NULL
      AND s.whole = false AND s.done_at IS NULL
      AND s.due_at < clock_timestamp() - interval '1 minute'
      AND (j.id IS NULL OR j.finished_at IS NOT NULL OR {CLAIMED_BEFORE} >= s.stop)
    LIMIT :limit
)
UPDATE export_shards s SET whole = NULL
FROM doubtful d WHERE s.export_id = d.export_id AND s.number = d.number AND s.whole = false
""")  # noqa: S608 - constants only

# Tenants take turns: the tenant with the oldest last claim is first. A process writes one shard of
# a tenant at a time.
CLAIM = text("""
WITH turn AS MATERIALIZED (
    SELECT e.id FROM (
        SELECT id, tenant_id, created_at, max(claimed_at) OVER (PARTITION BY tenant_id) AS served
        FROM exports WHERE state = 'running' AND removed_at IS NULL
    ) e
    WHERE e.tenant_id <> ALL(:busy)
    ORDER BY e.served NULLS FIRST, e.created_at, e.id
), chosen AS MATERIALIZED (
    SELECT s.export_id, s.number FROM turn t CROSS JOIN LATERAL (
        SELECT s.export_id, s.number FROM export_shards s
        WHERE s.export_id = t.id AND s.whole AND s.done_at IS NULL
          AND s.due_at <= clock_timestamp()
        ORDER BY s.number LIMIT 1 FOR UPDATE OF s SKIP LOCKED
    ) s LIMIT 1
), served AS (
    UPDATE exports e SET claimed_at = clock_timestamp() FROM chosen c WHERE e.id = c.export_id
)
UPDATE export_shards s
SET attempt = s.attempt + 1, worker = :worker,
    due_at = clock_timestamp() + make_interval(secs => :seconds)
FROM chosen c JOIN exports e ON e.id = c.export_id
WHERE s.export_id = c.export_id AND s.number = c.number
RETURNING s.export_id, s.number, s.job_id, s.first, s.stop, s.base, s.attempt, e.tenant_id, e.kind,
          e.bucket, e.prefix
""")

# `due_at` of a waiting shard is in the past; that of a shard being written is its lease's end.
RENEW = text("""
UPDATE export_shards SET due_at = clock_timestamp() + make_interval(secs => :seconds)
WHERE export_id = :export_id AND number = :number AND attempt = :attempt AND done_at IS NULL
  AND EXISTS (SELECT FROM exports WHERE id = :export_id AND removed_at IS NULL)
RETURNING number
""")

FINISH = text(f"""
WITH done AS (
    UPDATE export_shards SET done_at = clock_timestamp(), error = NULL,
                             files = CAST(:files AS jsonb), rows = :rows, missing = :missing
    WHERE export_id = :export_id AND number = :number AND attempt = :attempt AND done_at IS NULL
    RETURNING export_id, job_id, rows, missing
), counted AS (
UPDATE exports e
SET shards_done = e.shards_done + (d.job_id IS NOT NULL)::int,
    images = e.images + d.rows, missing = e.missing + d.missing,
    bytes = e.bytes + :bytes,
    state = CASE WHEN d.job_id IS NULL THEN 'succeeded' ELSE e.state END,
    finished_at = CASE WHEN d.job_id IS NULL THEN clock_timestamp() ELSE e.finished_at END
FROM done d WHERE e.id = d.export_id AND e.state = 'running'
RETURNING e.id, e.tenant_id, e.error, e.state,
          e.shards_done = e.shards AND d.job_id IS NOT NULL AS is_last
), event AS ({EVENT.format(kind="'export.succeeded'", rows="counted WHERE state = 'succeeded'")}
), cover AS (
    UPDATE export_shards s SET whole = true, due_at = clock_timestamp()
    FROM counted c WHERE s.export_id = c.id AND c.is_last AND s.job_id IS NULL
)
SELECT id FROM counted
""")  # noqa: S608 - constants only

FAIL = text(f"""
WITH failed AS (
    UPDATE export_shards
    SET error = :error, failures = failures + :counts,
        due_at = clock_timestamp() + make_interval(secs => :seconds)
    WHERE export_id = :export_id AND number = :number AND attempt = :attempt AND done_at IS NULL
    RETURNING export_id, failures
), ended AS (
    UPDATE exports e
    SET state = 'failed', error = :error, finished_at = clock_timestamp()
    FROM failed f WHERE e.id = f.export_id AND e.state = 'running' AND f.failures >= :most
    RETURNING e.id, e.tenant_id, e.error
) {EVENT.format(kind="'export.failed'", rows="ended")}
""")  # noqa: S608 - constants only

COLUMNS = f"""
id, tenant_id, kind, job_ids, shard_frames, bucket, prefix, state, error, shards, shards_done,
images, missing, bytes, created_at, finished_at, {TENANT_NAME}
"""

ONE = text(f"""
SELECT {COLUMNS} FROM exports
WHERE id = :id AND tenant_id = :tenant_id AND removed_at IS NULL
""")  # noqa: S608 - constants only

LIST, LIST_ALL = (
    text(f"""
SELECT {COLUMNS} FROM exports
WHERE {whose} AND removed_at IS NULL
  AND (CAST(:after AS uuid) IS NULL OR (created_at, id) <
       (SELECT created_at, id FROM exports WHERE id = :after AND {whose}))
ORDER BY created_at DESC, id DESC LIMIT :limit
""")  # noqa: S608 - constants only
    for whose in ("tenant_id = :tenant_id", "true")
)

SHARDS = text("""
SELECT number, job_id, first, stop, done_at IS NOT NULL AS done, attempt, error, files, rows,
       missing
FROM export_shards
WHERE export_id = :export_id AND number > :after ORDER BY number LIMIT :limit
""")

REJECTED_OF = text("""
SELECT s.number, count(*) AS images
FROM export_shards s JOIN attempts a
  ON a.job_id = s.job_id AND a.ordinal >= s.first AND a.ordinal < s.stop
WHERE s.export_id = :export_id AND a.reason = :reason GROUP BY s.number
""")

LISTED = text("""
SELECT EXISTS (
    SELECT FROM export_shards
    WHERE export_id = :export_id AND files @> CAST(:listed AS jsonb))
""")

HOLDS = text("""
SELECT EXISTS (
    SELECT FROM export_shards
    WHERE export_id = :export_id AND number = :number AND done_at IS NOT NULL
      AND :picture >= base + first AND :picture < base + stop)
""")

DUE = text("""
SELECT EXISTS (SELECT FROM export_news)
    OR EXISTS (SELECT FROM export_shards WHERE whole IS NULL AND done_at IS NULL)
    OR EXISTS (
        SELECT FROM export_shards s
        WHERE s.whole AND s.done_at IS NULL AND s.due_at <= clock_timestamp() AND EXISTS (
            SELECT FROM exports e
            WHERE e.id = s.export_id AND e.state = 'running' AND e.removed_at IS NULL))
""")

REMOVE = text(f"""
WITH removed AS (
    UPDATE exports SET removed_at = clock_timestamp()
    WHERE id = :id AND tenant_id = :tenant_id AND removed_at IS NULL
    RETURNING id, tenant_id, CAST(NULL AS text) AS error
), event AS ({EVENT.format(kind="'export.removed'", rows="removed")})
SELECT id FROM removed
""")  # noqa: S608 - constants only


@dataclass(frozen=True)
class Shard:
    """A shard that a worker may write; its fence is (export_id, number, attempt)."""

    export_id: uuid.UUID
    number: int
    job_id: uuid.UUID | None
    """Job of the shard's frames. None for the shard of dataset files."""
    first: int
    stop: int
    base: int
    attempt: int
    tenant_id: uuid.UUID
    kind: str
    bucket: str
    prefix: str

    @property
    def fence(self) -> dict[str, Any]:
        """Values that a write after the claim must match."""
        return {"export_id": self.export_id, "number": self.number, "attempt": self.attempt}

    def __str__(self) -> str:
        return f"export {self.export_id} shard {self.number} attempt {self.attempt}"


@dataclass(frozen=True)
class Export:
    """An export and its counters."""

    id: uuid.UUID
    tenant_id: uuid.UUID
    kind: str
    job_ids: Sequence[uuid.UUID]
    shard_frames: int
    bucket: str
    prefix: str
    state: str
    error: str | None
    shards: int
    shards_done: int
    images: int
    missing: int
    bytes: int
    created_at: datetime
    finished_at: datetime | None
    tenant: str


def keep_jobs(connection: Connection, job_ids: Sequence[uuid.UUID]) -> None:
    """Keep others from removing jobs until the commit, before an export of them is stored."""
    connection.execute(KEEP_JOBS, {"ids": list(job_ids)})


def formats_of(connection: Connection, job_ids: Sequence[uuid.UUID]) -> list[str]:
    """Read the image formats that some jobs use, without repeats."""
    return list(connection.execute(FORMATS_OF, {"ids": list(job_ids)}).scalars())


def count_shards(connection: Connection, job_ids: Sequence[uuid.UUID], frames: int) -> int:
    """Count the shards of some jobs, if a shard holds `frames` frames."""
    values = {"ids": list(job_ids), "frames": frames}
    return int(connection.execute(COUNT_SHARDS, values).scalar_one())


def insert_export(
    connection: Connection,
    export_id: uuid.UUID,
    tenant_id: uuid.UUID,
    *,
    kind: str,
    job_ids: Sequence[uuid.UUID],
    shard_frames: int,
    shards: int,
    bucket: str,
    prefix: str,
) -> Export:
    """Store an export and lay out its shards.

    Args:
        connection: in a transaction.
        export_id: a new ID.
        tenant_id: the owner of the export and of its jobs.
        kind: webdataset, parquet or imagefolder.
        job_ids: the jobs, in the order of writing.
        shard_frames: frames in a shard, at most.
        shards: the number of shards; see count_shards.
        bucket: the S3 bucket to write to.
        prefix: the first part of its objects' keys.
    """
    values = {
        "id": export_id,
        "tenant_id": tenant_id,
        "kind": kind,
        "job_ids": list(job_ids),
        "shard_frames": shard_frames,
        "shards": shards,
        "bucket": bucket,
        "prefix": prefix,
    }
    connection.execute(INSERT, values)
    connection.execute(INSERT_SHARDS, values)
    return get_export(connection, tenant_id, export_id)


def get_export(connection: Connection, tenant_id: uuid.UUID, export_id: uuid.UUID) -> Export:
    """Read one export.

    Raises:
        NotFound: there is none, or it is another tenant's.
    """
    row = connection.execute(ONE, {"id": export_id, "tenant_id": tenant_id}).first()
    if row is None:
        raise NotFound(f"There is no export {export_id}.")
    return Export(**row._mapping)


def list_exports(
    connection: Connection,
    tenant_id: uuid.UUID | None,
    *,
    limit: int,
    after: uuid.UUID | None = None,
) -> list[Export]:
    """Read a page of a tenant's exports, newest first. No tenant: of all."""
    values = {"tenant_id": tenant_id, "limit": limit, "after": after}
    statement = LIST_ALL if tenant_id is None else LIST
    return [Export(**row._mapping) for row in connection.execute(statement, values)]


class ShardRow(NamedTuple):
    """A shard of an export. Counts and files are None until it is finished."""

    number: int
    job_id: uuid.UUID | None
    first: int
    stop: int
    done: bool
    attempt: int
    error: str | None
    files: list[JsonObject] | None
    rows: int | None
    missing: int | None


def specs_of(connection: Connection, job_ids: Sequence[uuid.UUID]) -> list[JsonObject]:
    """Read the specs of jobs. Empty if none has lines with different settings."""
    return [*connection.execute(SPECS_OF, {"ids": [*job_ids]}).scalars()]


def shards_of(
    connection: Connection, export_id: uuid.UUID, *, limit: int, after: int = -1
) -> list[ShardRow]:
    """Read a page of an export's shards. The shard of dataset files is the last."""
    values = {"export_id": export_id, "limit": limit, "after": after}
    return rows_of(connection.execute(SHARDS, values), ShardRow)


def has_file(connection: Connection, export_id: uuid.UUID, name: str) -> bool:
    """Return True if a finished shard contains a file of this name."""
    listed = json.dumps([{"name": name}])
    values = {"export_id": export_id, "listed": listed}
    return bool(connection.execute(LISTED, values).scalar_one())


def has_picture(connection: Connection, export_id: uuid.UUID, shard: int, picture: int) -> bool:
    """Return True if the image with this number belongs to the given shard, and it is finished."""
    values = {"export_id": export_id, "number": shard, "picture": picture}
    return bool(connection.execute(HOLDS, values).scalar_one())


def rejected(connection: Connection, export_id: uuid.UUID) -> dict[int, int]:
    """Count the images that filters rejected, by shard."""
    rows = connection.execute(REJECTED_OF, {"export_id": export_id, "reason": REJECTED})
    return {row.number: row.images for row in rows}


def remove_export(connection: Connection, tenant_id: uuid.UUID, export_id: uuid.UUID) -> None:
    """Remove an export. It is hidden at once, and its files are deleted soon.

    Raises:
        NotFound: there is none, or it is another tenant's.
    """
    values = {"id": export_id, "tenant_id": tenant_id}
    if connection.execute(REMOVE, values).first() is None:
        raise NotFound(f"There is no export {export_id}.")


def any_due(connection: Connection) -> bool:
    """Return True if a shard may be waiting for a worker."""
    return bool(connection.execute(DUE).scalar_one())


def look_again(connection: Connection) -> None:
    """Recheck shards that were not whole a minute ago, though all their frames were claimed."""
    connection.execute(LOOK_AGAIN, {"limit": SHARDS_PER_LOOK})


def claim_shard(
    connection: Connection, worker: str, seconds: float, busy: Collection[uuid.UUID] = ()
) -> Shard | None:
    """Find the shards that have become whole, and claim one of the tenant whose turn it is.

    Args:
        connection: best in no transaction: each of the two steps is one statement.
        worker: the name of the worker.
        seconds: the duration of its lease.
        busy: tenants of which this process is writing a shard already.
    """
    values = {"worker": worker, "seconds": seconds, "busy": list(busy)}
    connection.execute(LOOK, {"limit": SHARDS_PER_LOOK})
    row = connection.execute(CLAIM, values).first()
    return Shard(**row._mapping) if row else None


def renew(connection: Connection, shard: Shard, seconds: float) -> bool:
    """Renew a shard's lease. Return False if the lease was lost."""
    return connection.execute(RENEW, {**shard.fence, "seconds": seconds}).first() is not None


def finish(
    connection: Connection,
    shard: Shard,
    files: Sequence[Mapping[str, Any]],
    *,
    rows: int,
    missing: int,
) -> bool:
    """Mark a shard as written. Return False if its lease was lost before."""
    values = {
        **shard.fence,
        "files": json.dumps(list(files)),
        "bytes": sum(file["bytes"] for file in files),
        "rows": rows,
        "missing": missing,
    }
    return connection.execute(FINISH, values).first() is not None


def fail(connection: Connection, shard: Shard, error: str, *, counts: bool) -> None:
    """Record why a shard was not written. It is retried with a growing delay.

    Args:
        connection: in a transaction or not: this is one statement.
        shard: the shard.
        error: the reason.
        counts: True if this counts as a failure. After MAX_FAILURES the export has failed.
    """
    rest = min(2.0 ** min(shard.attempt, 10), MAX_REST_SECONDS)
    values = {**shard.fence, "error": error, "seconds": rest, "most": MAX_FAILURES}
    connection.execute(FAIL, {**values, "counts": int(counts)})


def give_back(connection: Connection, shard: Shard) -> None:
    """Release a shard, so that another worker can claim it at once."""
    connection.execute(RENEW, {**shard.fence, "seconds": 0.0})
