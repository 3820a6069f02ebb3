"""What goes: jobs, exports and inputs kept long enough, and the artifacts that no frame names.

A job that is removed is gone for everybody at once. Then its rows are deleted, piece by piece, then
its objects, and its own row last: whoever takes over finds there what is left to do. An export goes
in the same way. An input goes when no job draws it.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, text

from farm.domain.image_formats import Format
from farm.domain.states import TERMINAL

MAX_JOBS_PER_CALL = 1000
"""Jobs that are being removed at the same time, at most."""

DAY_SECONDS = 86_400.0

ArtifactName = tuple[uuid.UUID, uuid.UUID, int, bytes, Format]
"""(tenant, job, ordinal, sha256): what an artifact's key says."""

# now(), not clock_timestamp(): an index takes only what stays the same for a statement.
REMOVE = text("""
WITH due AS (
    SELECT id FROM jobs
    WHERE finished_at < now() - make_interval(secs => :seconds)
      AND removed_at IS NULL AND status = ANY(:terminal)
      AND NOT EXISTS (
          SELECT FROM exports e
          WHERE e.state = 'running' AND e.removed_at IS NULL AND jobs.id = ANY(e.job_ids))
    ORDER BY finished_at
    LIMIT greatest(0, :at_once - (SELECT count(*) FROM jobs WHERE removed_at IS NOT NULL))
    FOR UPDATE SKIP LOCKED
), removed AS (
    -- its idempotency key may be used anew
    UPDATE jobs j SET removed_at = clock_timestamp(), idempotency_key = NULL
    FROM due WHERE j.id = due.id
    RETURNING j.id, j.tenant_id
), news AS (
    INSERT INTO export_news (job_id)
    SELECT id FROM removed
    WHERE EXISTS (SELECT FROM export_shards s WHERE s.job_id = removed.id AND s.whole IS NOT TRUE)
)
INSERT INTO events (job_id, tenant_id, kind, data)
SELECT id, tenant_id, 'job.removed', '{}' FROM removed
RETURNING job_id
""")

# A row that somebody looks at under a lock waits for the next sweep.
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
    for table, key, order in (  # as an index has it
        ("requeued_frames", ["ordinal"], "ordinal"),
        ("perceptual_hashes", ["ordinal"], "ordinal"),
        ("reusable_renders", ["tenant_id", "digest"], "job_id"),
        ("attempts", ["ordinal", "attempt"], "ordinal, attempt"),
        ("frames", ["ordinal"], "ordinal"),
    )
}

# The events of a job are kept after its removal, for streams; those of a removed tenant are not.
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

# Ordered as the index is: one probe of it for each job, however large the planner thinks a job is.
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
  AND NOT EXISTS (
      SELECT FROM tenants t JOIN events e ON e.job_id = j.id
      WHERE t.id = j.tenant_id AND t.removed_at IS NOT NULL)
ORDER BY j.removed_at LIMIT :limit
""")

FORGET = text("DELETE FROM jobs WHERE id = :id AND removed_at IS NOT NULL")

REMOVE_EXPORTS = text("""
UPDATE exports SET removed_at = clock_timestamp()
WHERE finished_at < now() - make_interval(secs => :seconds) AND removed_at IS NULL
""")

# Whoever still writes a shard of it finds out when the lease is to be renewed.
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

# Looked for again: a job may have come just before the lock.
DELETE_INPUTS = text("""
DELETE FROM inputs i
WHERE id = ANY(:ids) AND NOT EXISTS (SELECT FROM jobs WHERE input_id = i.id)
""")

NAMED = """
unnest(CAST(:tenant_ids AS uuid[]), CAST(:job_ids AS uuid[]), CAST(:ordinals AS bigint[]),
       CAST(:hashes AS bytea[])) WITH ORDINALITY AS d (tenant_id, job_id, ordinal, sha256, place)
"""

# A tenant that is not known here may be another farm's, in the same bucket.
OF_NO_JOB = text(f"""
SELECT d.place FROM {NAMED} JOIN tenants t ON t.id = d.tenant_id
WHERE NOT EXISTS (SELECT FROM jobs j WHERE j.id = d.job_id) LIMIT :limit
""")  # noqa: S608 - constants only

# Nothing that is chosen here can be named again later: a frame that is cancelled or succeeded stays
# so. A dead one may be retried, and succeed with these very bytes: they stay as long as its job.
OF_NO_FRAME = text(f"""
SELECT d.place FROM {NAMED}
JOIN jobs j ON j.id = d.job_id AND j.tenant_id = d.tenant_id AND j.removed_at IS NULL
JOIN frames f ON f.job_id = d.job_id AND f.ordinal = d.ordinal
WHERE f.state = 'cancelled' OR (f.state = 'succeeded' AND f.sha256 <> d.sha256)
LIMIT :limit
""")  # noqa: S608 - constants only


def remove_due(connection: Connection, days: float) -> list[uuid.UUID]:
    """Remove the jobs that ended more than `days` ago; returns which. 0 days removes none."""
    if days == 0:
        return []
    values = {
        "seconds": days * DAY_SECONDS,
        "terminal": list(TERMINAL),
        "at_once": MAX_JOBS_PER_CALL,
    }
    return list(connection.execute(REMOVE, values).scalars())


def delete_rows(connection: Connection, limit: int) -> int:
    """Delete up to `limit` rows of each table that belong to removed jobs; returns how many."""
    return sum(
        connection.execute(statement, {"limit": limit}).rowcount
        for statement in (*DELETE_ROWS.values(), DELETE_EVENTS)
    )


def empty_jobs(connection: Connection, limit: int) -> list[tuple[uuid.UUID, uuid.UUID]]:
    """Name removed jobs whose frames are deleted, as (tenant, job): their objects may go."""
    rows = connection.execute(EMPTY, {"limit": limit})
    return [(row.tenant_id, row.id) for row in rows]


def forget(connection: Connection, job_id: uuid.UUID) -> None:
    """Delete a removed job's own row, with its prompts: nothing is left of it."""
    connection.execute(FORGET, {"id": job_id})


def remove_exports(connection: Connection, days: float) -> None:
    """Remove the exports that ended more than `days` ago; 0 days removes none."""
    if days > 0:
        connection.execute(REMOVE_EXPORTS, {"seconds": days * DAY_SECONDS})


def removed_exports(connection: Connection, limit: int) -> Sequence[Row[Any]]:
    """Name removed exports that nobody writes to any more: id, tenant_id, bucket and prefix."""
    return connection.execute(REMOVED_EXPORTS, {"limit": limit}).all()


def forget_export(connection: Connection, export_id: uuid.UUID) -> None:
    """Delete a removed export's rows: nothing is left of it."""
    connection.execute(FORGET_EXPORT, {"id": export_id})


def delete_inputs(connection: Connection, days: float, limit: int) -> None:
    """Delete inputs that were sent more than `days` ago and no job draws; 0 days deletes none."""
    if days > 0:
        values = {"seconds": days * DAY_SECONDS, "limit": limit}
        ids = list(connection.execute(LOCK_INPUTS, values).scalars())
        connection.execute(DELETE_INPUTS, {"ids": ids})


def orphans(connection: Connection, names: Sequence[ArtifactName], limit: int) -> list[int]:
    """Choose, of some artifacts, up to `limit` that no frame names, nor ever will.

    Returns:
        Their places among `names`.
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
