"""Events: a log that each transition appends to in its own transaction (an outbox). See ADR 40.

The events of one job are in the order of their ids. Each is appended under the job's row lock, so
a lower id was committed before a higher one was generated.

The events of a tenant have no such order: a lower id may be committed last. They are read in the
order of (xid, id), where `xid` is the transaction, and only up to the oldest transaction that still
runs. So no event can appear behind a reader. A transaction that stays open delays the readers.

A server counts its transactions from the beginning, so a restored database has events with xids of
another server. `event_epochs` has a row for each server, and for each promotion of a standby,
which may have lost commits. Events up to `last_before` were counted by another server.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import Connection, text

from farm.store import arrays
from farm.store.rows import JsonObject, rows_of

MAX_AT_ONCE = 5000
"""Events that one reading returns at most."""

# Images are joined here: only dead frames are retried, so an attempt that succeeded stays as it is.
COLUMNS = """
e.id, e.xid, e.tenant_id, e.job_id, e.at, e.kind, e.data, j.pipeline, j.labels,
CASE WHEN e.kind = 'frames.succeeded' AND :with_images AND j.removed_at IS NULL THEN (
    SELECT jsonb_agg(jsonb_build_array(
        f.ordinal, f.attempt, encode(f.sha256, 'hex'), f.bytes, f.rerolls))
    FROM jsonb_array_elements(e.data -> 'frames') AS d (fence)
    CROSS JOIN LATERAL (
        SELECT * FROM frames f
        WHERE f.job_id = e.job_id AND f.ordinal = (d.fence ->> 0)::bigint LIMIT 1
    ) f
    WHERE f.attempt = (d.fence ->> 1)::smallint AND f.state = 'succeeded'
) END AS images
"""

OF_JOBS = text(f"""
SELECT {COLUMNS}
FROM unnest(CAST(:job_ids AS uuid[]), CAST(:after AS bigint[])) AS w (job_id, after)
CROSS JOIN LATERAL (
    SELECT * FROM events e WHERE e.job_id = w.job_id AND e.id > w.after ORDER BY e.id LIMIT :limit
) e
LEFT JOIN jobs j ON j.id = ANY (ARRAY[e.job_id])
ORDER BY e.id LIMIT :total
""")  # noqa: S608 - constants only

OF_TENANTS = text(f"""
SELECT {COLUMNS}
FROM unnest(CAST(:tenant_ids AS uuid[]), CAST(:xids AS bigint[]), CAST(:ids AS bigint[]))
     AS w (tenant_id, xid, id)
CROSS JOIN LATERAL (
    SELECT * FROM events e
    WHERE e.tenant_id = w.tenant_id AND e.xid > 0 AND (e.xid, e.id) > (w.xid, w.id)
      AND e.xid < :until AND e.id > :last_before
    ORDER BY e.xid, e.id LIMIT :limit
) e
LEFT JOIN jobs j ON j.id = ANY (ARRAY[e.job_id])
ORDER BY e.xid, e.id LIMIT :total
""")  # noqa: S608 - constants only

# A table that was restored from a dump has another oid, also on the same server.
SERVER = """
SELECT system_identifier || '/' || 'events'::regclass::oid AS system,
       left(pg_walfile_name(pg_current_wal_lsn()), 8) AS timeline
FROM pg_control_system()
"""

HORIZON = text(f"""
SELECT e.id AS epoch, coalesce(e.last_before, 0) AS last_before,
       pg_snapshot_xmin(pg_current_snapshot())::text::bigint AS xid,
       extract(epoch FROM statement_timestamp())::bigint AS at
FROM ({SERVER}) s LEFT JOIN event_epochs e ON e.system = s.system AND e.timeline = s.timeline
""")  # noqa: S608 - constants only

# A promoted standby goes on with the count of transactions. The lock waits for events that are not
# committed yet: an ID below `last_before` would never be read.
BEGIN_EPOCH = text(f"""
DO $$ BEGIN
    LOCK TABLE events IN SHARE ROW EXCLUSIVE MODE;
    INSERT INTO event_epochs (id, system, timeline, last_before)
    SELECT substr(md5(gen_random_uuid()::text), 1, 8), s.system, s.timeline, coalesce(
        (SELECT e.last_before FROM event_epochs e WHERE e.system = s.system LIMIT 1),
        (SELECT max(id) FROM events), 0)
    FROM ({SERVER}) s
    ON CONFLICT (system, timeline) DO NOTHING;
END $$
""")  # noqa: S608 - constants only

NEWEST_OF_JOB = text("SELECT coalesce(max(id), 0) FROM events WHERE job_id = :job_id")

APPEND = text("""
INSERT INTO events (tenant_id, kind, data) VALUES (:tenant_id, :kind, CAST(:data AS jsonb))
""")

# now(), not clock_timestamp(): an index scan needs a value that is constant within a statement.
PRUNE = text("""
WITH old AS MATERIALIZED (
    SELECT id FROM events WHERE at < now() - make_interval(secs => :seconds)
    ORDER BY at LIMIT 10000
)
DELETE FROM events e USING old WHERE e.id = old.id
""")


class EventRow(NamedTuple):
    """An event of the outbox."""

    id: int
    xid: int
    tenant_id: uuid.UUID
    job_id: uuid.UUID | None
    """None: the event is of an export, or of the tenant."""
    at: datetime
    kind: str
    data: JsonObject
    pipeline: str | None
    """Of the job. None: there is no job, or its row is deleted."""
    labels: dict[str, str] | None
    """Of the job."""
    images: list[tuple[int, int, str, int, int]] | None
    """(ordinal, attempt, sha256, bytes, rerolls) of frames that succeeded and are still stored."""


class Horizon(NamedTuple):
    """Limits of what a reader of events may read now."""

    epoch: str
    """ID of the server's epoch. A cursor of another epoch has lost its meaning."""
    last_before: int
    """ID of the last event that another server counted."""
    xid: int
    """Oldest transaction that still runs. Events of earlier ones are complete."""
    at: int
    """Time of the server, in Unix seconds."""


def horizon(connection: Connection) -> Horizon:
    """Read what may be read now. The first reader of a new server begins its epoch."""
    row = connection.execute(HORIZON).one()
    if row.epoch is None:
        connection.execute(BEGIN_EPOCH)
        row = connection.execute(HORIZON).one()
    return Horizon(*row)


def of_jobs(
    connection: Connection,
    after: Mapping[uuid.UUID, int],
    *,
    limit: int = 1000,
    with_images: bool = True,
) -> list[EventRow]:
    """Read the events of some jobs in the order of their ids, at most `limit` of each job.

    Args:
        connection: a connection.
        after: jobs, each with the id of the last event that has been read. 0: none.
        limit: events of a job. Of all together there are MAX_AT_ONCE at most.
        with_images: False to leave out the images, which takes a probe for each.
    """
    values = {
        "job_ids": arrays.ids(after),
        "after": arrays.numbers(after.values()),
        "limit": limit,
        "total": MAX_AT_ONCE,
        "with_images": with_images,
    }
    return rows_of(connection.execute(OF_JOBS, values), EventRow)


def of_tenants(
    connection: Connection,
    after: Mapping[uuid.UUID, tuple[int, int]],
    until: Horizon,
    *,
    limit: int = 1000,
    with_images: bool = True,
) -> list[EventRow]:
    """Read the events of some tenants in the order of (xid, id), at most `limit` of each tenant.

    Args:
        connection: a connection.
        after: tenants, each with (xid, id) of the last event that has been read. (0, 0): none.
        until: what may be read.
        limit: events of a tenant. Of all together there are MAX_AT_ONCE at most.
        with_images: False to leave out the images, which takes a probe for each.
    """
    values = {
        "tenant_ids": arrays.ids(after),
        "xids": arrays.numbers(xid for xid, _ in after.values()),
        "ids": arrays.numbers(event_id for _, event_id in after.values()),
        "until": until.xid,
        "last_before": until.last_before,
        "limit": limit,
        "total": MAX_AT_ONCE,
        "with_images": with_images,
    }
    return rows_of(connection.execute(OF_TENANTS, values), EventRow)


def events_of(
    connection: Connection, job_id: uuid.UUID, *, after: int = 0, limit: int = 1000
) -> list[EventRow]:
    """Read a job's events, oldest first, starting after the id `after`."""
    return of_jobs(connection, {job_id: after}, limit=limit)


def newest_of_job(connection: Connection, job_id: uuid.UUID) -> int:
    """Return the id of a job's newest event. 0: it has none."""
    return int(connection.execute(NEWEST_OF_JOB, {"job_id": job_id}).scalar_one())


def append(connection: Connection, tenant_id: uuid.UUID, kind: str, data: JsonObject) -> None:
    """Append an event of a tenant that is of no job, in the transaction of what it tells."""
    values = {"tenant_id": tenant_id, "kind": kind, "data": json.dumps(data)}
    connection.execute(APPEND, values)


def prune(connection: Connection, days: float) -> int:
    """Delete up to ten thousand events older than `days`. Return the number deleted."""
    return connection.execute(PRUNE, {"seconds": days * 86_400}).rowcount
