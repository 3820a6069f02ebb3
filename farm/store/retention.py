"""Retention: deletes old jobs, exports and inputs, and artifacts that no frame refers to.

A removed job is hidden from everybody at once. Then its rows are deleted in pieces, then its
objects, and the job's own row last. So a janitor that takes over finds there the work that is
left. Exports are deleted in the same way. An input is deleted when no job uses it.

A job is removed when its own time is over, `keep_for` after its end. Without one it has the time of
the farm. An export that is not finished holds its jobs. A job's idempotency key outlives it.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import Connection, text

from farm.domain.image_formats import Format
from farm.domain.states import TERMINAL
from farm.errors import Conflict, Unavailable
from farm.store import usage
from farm.store.exports import EVENT
from farm.store.job_commands import lock_job
from farm.store.rows import rows_of

MAX_JOBS_PER_CALL = 1000
"""Maximum number of jobs that are being removed at the same time."""

DAY_SECONDS = 86_400.0

ArtifactName = tuple[uuid.UUID, uuid.UUID, int, bytes, Format, bool]
"""(tenant, job, ordinal, sha256, format, is a thumbnail): the parts of an artifact's key."""

KEY_SECONDS = 86_400.0
"""Time from a job's submission in which its idempotency key makes no other job, in seconds."""

# The row keeps the key too: a submission that began before this commit meets it.
REMOVE = text("""
WITH removed AS (
    UPDATE jobs j SET removed_at = clock_timestamp(), due_at = NULL, idempotency_key = CASE
        WHEN j.created_at > clock_timestamp() - make_interval(secs => :key_seconds)
        THEN j.idempotency_key END
    WHERE j.id = ANY(:ids) AND NOT EXISTS (
        SELECT FROM exports e
        WHERE e.state = 'running' AND e.removed_at IS NULL AND j.id = ANY(e.job_ids))
    RETURNING j.id, j.tenant_id, j.created_at, j.idempotency_key, j.idempotency_digest
), used AS (
    INSERT INTO used_keys (tenant_id, idempotency_key, digest, job_id, ends_at)
    SELECT tenant_id, idempotency_key, idempotency_digest, id,
           created_at + make_interval(secs => :key_seconds)
    FROM removed WHERE idempotency_key IS NOT NULL
    ON CONFLICT (tenant_id, idempotency_key) DO UPDATE
    SET digest = excluded.digest, job_id = excluded.job_id, ends_at = excluded.ends_at
), news AS (
    INSERT INTO export_news (job_id)
    SELECT id FROM removed
    WHERE EXISTS (SELECT FROM export_shards s WHERE s.job_id = removed.id AND s.whole IS NOT TRUE)
)
INSERT INTO events (job_id, tenant_id, kind, data)
SELECT id, tenant_id, 'job.removed', '{}' FROM removed
RETURNING job_id
""")
"""Removes jobs that are locked. Those that an export reads by now are left out."""

# now(), not clock_timestamp(): an index scan needs a value that is constant within a statement.
ENDED = "finished_at < now() - make_interval(secs => :seconds) AND keep_for IS NULL"
KEPT_UNTIL = "((finished_at AT TIME ZONE 'UTC') + make_interval(secs => keep_for))"
OVER = f"{KEPT_UNTIL} < now() AT TIME ZONE 'UTC' AND keep_for IS NOT NULL"

LOCK_DUE, LOCK_OVER = (
    text(f"""
SELECT id FROM jobs
WHERE {condition} AND finished_at IS NOT NULL AND removed_at IS NULL AND status = ANY(:terminal)
  AND NOT EXISTS (
      SELECT FROM exports e
      WHERE e.state = 'running' AND e.removed_at IS NULL AND jobs.id = ANY(e.job_ids))
ORDER BY {first}
LIMIT greatest(0, :at_once - (SELECT count(*) FROM jobs WHERE removed_at IS NOT NULL))
FOR UPDATE SKIP LOCKED
""")  # noqa: S608 - constants only
    for condition, first in ((ENDED, "finished_at"), (OVER, KEPT_UNTIL))
)
"""Jobs of the farm's time, and jobs of their own time, that are due."""

FORGET_KEYS = text("""
DELETE FROM used_keys WHERE (tenant_id, idempotency_key) IN (
    SELECT tenant_id, idempotency_key FROM used_keys
    WHERE ends_at < now() ORDER BY ends_at LIMIT :limit)
""")

REMOVING = text("SELECT count(*) FROM jobs WHERE removed_at IS NOT NULL")

EXPORTING = text("""
SELECT id FROM exports
WHERE state = 'running' AND removed_at IS NULL AND job_ids @> ARRAY[CAST(:id AS uuid)] LIMIT 1
""")

# A locked row waits for the next sweep.
DELETE_ROWS = {
    table: text(f"""
WITH old AS (
    SELECT t.job_id, {", ".join(f"t.{column}" for column in key)}
    FROM jobs j CROSS JOIN LATERAL (
        SELECT * FROM {table} r WHERE r.job_id = j.id
        ORDER BY {order} LIMIT :limit FOR UPDATE SKIP LOCKED
    ) t
    WHERE j.removed_at IS NOT NULL LIMIT :limit
)
DELETE FROM {table} d USING old
WHERE d.job_id = old.job_id AND {" AND ".join(f"d.{column} = old.{column}" for column in key)}
""")  # noqa: S608 - constants only
    for table, key, order in (  # the order of an index
        ("requeued_frames", ["ordinal"], "ordinal"),
        ("perceptual_hashes", ["ordinal"], "ordinal"),
        ("frame_provenances", ["ordinal"], "ordinal"),
        ("reusable_renders", ["tenant_id", "digest"], "job_id"),
        ("attempts", ["ordinal", "attempt"], "ordinal, attempt"),
        ("frames", ["ordinal"], "ordinal"),
    )
}

# A removed job keeps its events, for streams, unless its tenant is removed too.
DELETE_EVENTS = text("""
WITH old AS (
    SELECT e.id
    FROM jobs j JOIN tenants t ON t.id = j.tenant_id AND t.removed_at IS NOT NULL
    CROSS JOIN LATERAL (
        SELECT id FROM events e WHERE e.job_id = j.id ORDER BY id LIMIT :limit
    ) e
    WHERE j.removed_at IS NOT NULL LIMIT :limit
)
DELETE FROM events d USING old WHERE d.id = old.id
""")

# In index order: one probe of the index per job, for any job size that the planner assumes.
EMPTY = text("""
SELECT j.id, j.tenant_id FROM jobs j
LEFT JOIN LATERAL (
    SELECT ordinal FROM frames WHERE job_id = j.id ORDER BY ordinal LIMIT 1
) f ON true
LEFT JOIN LATERAL (
    SELECT ordinal FROM attempts WHERE job_id = j.id ORDER BY ordinal, attempt LIMIT 1
) a ON true
WHERE j.removed_at IS NOT NULL AND f.ordinal IS NULL AND a.ordinal IS NULL
  AND NOT EXISTS (SELECT FROM perceptual_hashes WHERE job_id = j.id)
  AND NOT EXISTS (SELECT FROM reusable_renders WHERE job_id = j.id)
  AND NOT EXISTS (SELECT FROM frame_provenances WHERE job_id = j.id)
  AND NOT EXISTS (
      SELECT FROM tenants t JOIN events e ON e.job_id = j.id
      WHERE t.id = j.tenant_id AND t.removed_at IS NOT NULL)
ORDER BY j.removed_at LIMIT :limit
""")

FORGET = text("DELETE FROM jobs WHERE id = :id AND removed_at IS NOT NULL")

REMOVE_EXPORTS = text(f"""
WITH removed AS (
    UPDATE exports SET removed_at = clock_timestamp()
    WHERE finished_at < now() - make_interval(secs => :seconds) AND removed_at IS NULL
    RETURNING id, tenant_id, CAST(NULL AS text) AS error
) {EVENT.format(kind="'export.removed'", rows="removed")}
""")  # noqa: S608 - constants only

# A process that still writes a shard of it notices the removal when it renews the lease.
REMOVED_EXPORTS = text("""
SELECT id, tenant_id, bucket, prefix FROM exports e
WHERE removed_at IS NOT NULL AND NOT EXISTS (
    SELECT FROM export_shards s
    WHERE s.export_id = e.id AND s.done_at IS NULL AND s.due_at > clock_timestamp())
ORDER BY removed_at LIMIT :limit
""")

FORGET_EXPORT = text("DELETE FROM exports WHERE id = :id AND removed_at IS NOT NULL")

LOCK_INPUTS = text("""
SELECT id FROM inputs i
WHERE created_at < now() - make_interval(secs => :seconds)
  AND NOT EXISTS (SELECT FROM jobs WHERE input_id = i.id)
ORDER BY created_at LIMIT :limit FOR UPDATE SKIP LOCKED
""")

# Jobs are checked again: one may have been inserted just before the lock.
DELETE_INPUTS = text("""
DELETE FROM inputs i
WHERE id = ANY(:ids) AND NOT EXISTS (SELECT FROM jobs WHERE input_id = i.id)
""")

NAMED = """
unnest(CAST(:tenant_ids AS uuid[]), CAST(:job_ids AS uuid[]), CAST(:ordinals AS bigint[]),
       CAST(:hashes AS bytea[])) WITH ORDINALITY AS d (tenant_id, job_id, ordinal, sha256, place)
"""

# Objects of unknown tenants are left: they may belong to another farm in the same bucket.
OF_NO_JOB = text(f"""
SELECT d.place FROM {NAMED} JOIN tenants t ON t.id = d.tenant_id
WHERE NOT EXISTS (SELECT FROM jobs j WHERE j.id = d.job_id) LIMIT :limit
""")  # noqa: S608 - constants only

# No frame can refer to these artifacts later, since `cancelled` and `succeeded` are final. A dead
# frame may be retried, and succeed with the same bytes: its artifacts stay as long as its job.
OF_NO_FRAME = text(f"""
SELECT d.place FROM {NAMED}
JOIN jobs j ON j.id = d.job_id AND j.tenant_id = d.tenant_id AND j.removed_at IS NULL
JOIN frames f ON f.job_id = d.job_id AND f.ordinal = d.ordinal
WHERE f.state = 'cancelled' OR (f.state = 'succeeded' AND f.sha256 <> d.sha256)
LIMIT :limit
""")  # noqa: S608 - constants only


def remove_due(connection: Connection, days: float) -> list[uuid.UUID]:
    """Remove the jobs whose time is over. Return their IDs.

    Args:
        connection: in a transaction.
        days: time after the end for jobs without `keep_for`. 0 removes none of them.
    """
    limits = {"terminal": list(TERMINAL), "at_once": MAX_JOBS_PER_CALL}
    removed = _remove(connection, connection.execute(LOCK_OVER, limits).scalars().all())
    if days > 0:
        limits["seconds"] = days * DAY_SECONDS
        removed += _remove(connection, connection.execute(LOCK_DUE, limits).scalars().all())
    return removed


def _remove(connection: Connection, job_ids: Sequence[uuid.UUID]) -> list[uuid.UUID]:
    """Remove jobs that are locked, so that no new export reads them."""
    if not job_ids:
        return []
    values = {"ids": list(job_ids), "key_seconds": KEY_SECONDS}
    return list(connection.execute(REMOVE, values).scalars())


def remove_job(connection: Connection, tenant_id: uuid.UUID, job_id: uuid.UUID) -> None:
    """Remove a job that has ended. Its rows and pictures are deleted by the janitor.

    Raises:
        NotFound: there is no such job, or it is another tenant's.
        Conflict: it has not ended, or an export reads it.
        Unavailable: so many jobs are being removed that it must wait.
    """
    job = lock_job(connection, tenant_id, job_id)
    if job.status not in TERMINAL:
        raise Conflict(f"Job {job_id} cannot be removed: it is {job.status}. Cancel it first.")
    if export_id := connection.execute(EXPORTING, {"id": job_id}).scalar():
        raise Conflict(f"Job {job_id} cannot be removed: the export {export_id} reads it.")
    if room(connection) <= 0:
        raise Unavailable(
            f"{MAX_JOBS_PER_CALL} jobs are being removed. Remove this one in a minute."
        )
    _remove(connection, [job_id])


def room(connection: Connection) -> int:
    """Return the number of jobs that may be removed now."""
    return MAX_JOBS_PER_CALL - int(connection.execute(REMOVING).scalar_one())


def delete_rows(connection: Connection, limit: int) -> int:
    """Delete up to `limit` rows of removed jobs from each table. Return the number of rows."""
    return sum(
        connection.execute(statement, {"limit": limit}).rowcount
        for statement in (*DELETE_ROWS.values(), DELETE_EVENTS)
    )


def empty_jobs(connection: Connection, limit: int) -> list[tuple[uuid.UUID, uuid.UUID]]:
    """List removed jobs without frames, as (tenant, job). Their objects may be deleted."""
    rows = connection.execute(EMPTY, {"limit": limit})
    return [(row.tenant_id, row.id) for row in rows]


def forget(connection: Connection, job_id: uuid.UUID) -> None:
    """Delete a removed job's own row and its prompts. Nothing is left of it but its usage."""
    usage.account_last(connection, job_id)
    connection.execute(FORGET, {"id": job_id})


def forget_keys(connection: Connection, limit: int) -> None:
    """Delete up to `limit` idempotency keys of removed jobs that may be used again."""
    connection.execute(FORGET_KEYS, {"limit": limit})


def remove_exports(connection: Connection, days: float) -> None:
    """Remove the exports that ended more than `days` ago. 0 days removes none."""
    if days > 0:
        connection.execute(REMOVE_EXPORTS, {"seconds": days * DAY_SECONDS})


class RemovedExport(NamedTuple):
    """A removed export whose files may be deleted."""

    id: uuid.UUID
    tenant_id: uuid.UUID
    bucket: str
    prefix: str


def removed_exports(connection: Connection, limit: int) -> list[RemovedExport]:
    """List removed exports to which no process writes."""
    return rows_of(connection.execute(REMOVED_EXPORTS, {"limit": limit}), RemovedExport)


def forget_export(connection: Connection, export_id: uuid.UUID) -> None:
    """Delete the rows of a removed export. Nothing is left of it."""
    connection.execute(FORGET_EXPORT, {"id": export_id})


def delete_inputs(connection: Connection, days: float, limit: int) -> None:
    """Delete inputs sent more than `days` ago that no job uses. 0 days deletes none."""
    if days > 0:
        values = {"seconds": days * DAY_SECONDS, "limit": limit}
        ids = list(connection.execute(LOCK_INPUTS, values).scalars())
        connection.execute(DELETE_INPUTS, {"ids": ids})


def orphans(connection: Connection, names: Sequence[ArtifactName], limit: int) -> list[int]:
    """Find up to `limit` of the given artifacts that no frame refers to, now or later.

    Returns:
        Their indexes in `names`.
    """
    values = {
        "tenant_ids": [name[0] for name in names],
        "job_ids": [name[1] for name in names],
        "ordinals": [name[2] for name in names],
        "hashes": [name[3] for name in names],
    }
    places = list(connection.execute(OF_NO_JOB, {**values, "limit": limit}).scalars())
    free = limit - len(places)
    places += connection.execute(OF_NO_FRAME, {**values, "limit": free}).scalars()
    return [place - 1 for place in places]
