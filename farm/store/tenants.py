"""Tenants, and their removal with everything they own.

A removed tenant is gone at once: its keys are refused, and its name is free for another tenant.
Then the janitor deletes everything it owned, in pieces. Its row stays, without a name. By its id
the farm recognizes objects that a late worker still stores for it, and deletes them too.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection
from contextlib import suppress
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import Connection, text

from farm.domain.spec import Priority
from farm.domain.states import TERMINAL, JobStatus
from farm.errors import Conflict, NotFound
from farm.store import arrays, events
from farm.store.job_commands import cancel_job
from farm.store.rows import row_of, rows_of

LATE_SECONDS = 120.0
"""Time in which others may still store something for a removed tenant, in seconds.

A request may have begun before, and an API process may still remember its key.
"""
JOBS_PER_CALL = 100
INPUTS_PER_CALL = 10
EVENTS_PER_CALL = 10_000

OWNS = """
(SELECT count(*) FROM keys WHERE tenant_id = t.id AND revoked_at IS NULL) AS keys,
(SELECT count(*) FROM jobs WHERE tenant_id = t.id) AS jobs,
(SELECT count(*) FROM exports WHERE tenant_id = t.id) AS exports,
(SELECT count(*) FROM inputs WHERE tenant_id = t.id) AS inputs,
(SELECT count(*) FROM control_images WHERE tenant_id = t.id) AS images,
(SELECT count(*) FROM destinations WHERE tenant_id = t.id) AS destinations
"""

FIELDS = """
t.id, t.name, t.created_at, t.removed_at, t.emptied_at, t.weight, t.priorities, t.max_open_jobs,
t.max_running_frames, t.max_waiting_frames, t.max_input_bytes, t.requests_a_second,
t.requests_burst, t.device_seconds_a_month, t.keep_for, t.max_keep_for
"""

PROMISED = """
LEFT JOIN pg_temp.promised_seconds(ARRAY(
    SELECT b.id FROM tenants b WHERE b.device_seconds_a_month IS NOT NULL AND b.removed_at IS NULL
)) p ON p.tenant_id = t.id
"""

# In a list only those with limits are counted: there may be thousands of others.
LIST = text(f"""
SELECT {FIELDS},
    CASE WHEN t.max_open_jobs IS NOT NULL THEN pg_temp.open_jobs(t.id) END AS open_jobs,
    CASE WHEN t.max_waiting_frames IS NOT NULL THEN pg_temp.waiting_frames(t.id) END
    AS waiting_frames,
    CASE WHEN t.max_input_bytes IS NOT NULL THEN pg_temp.input_bytes(t.id) END AS input_bytes,
    CASE WHEN t.max_running_frames IS NOT NULL THEN coalesce(r.frames, 0) END AS running_frames,
    CASE WHEN t.device_seconds_a_month IS NOT NULL THEN pg_temp.used_seconds(t.id) END
    AS used_seconds,
    CASE WHEN t.device_seconds_a_month IS NOT NULL THEN coalesce(p.seconds, 0) END
    AS promised_seconds,
    {OWNS}
FROM tenants t LEFT JOIN pg_temp.running_frames() r ON r.tenant_id = t.id
{PROMISED}
WHERE t.removed_at IS NULL ORDER BY t.name
""")  # noqa: S608 - constants only

ONE = text(f"""
SELECT {FIELDS}, pg_temp.open_jobs(t.id) AS open_jobs,
    pg_temp.waiting_frames(t.id) AS waiting_frames, pg_temp.input_bytes(t.id) AS input_bytes,
    coalesce((SELECT r.frames FROM pg_temp.running_frames(ARRAY[t.id]) r), 0) AS running_frames,
    pg_temp.used_seconds(t.id) AS used_seconds,
    coalesce((SELECT p.seconds FROM pg_temp.promised_seconds(ARRAY[t.id]) p), 0)
    AS promised_seconds,
    {OWNS}
FROM tenants t
WHERE (t.name = :word AND t.removed_at IS NULL) OR t.id::text = :word
""")  # noqa: S608 - constants only

LIMITS_IN_USE = text(f"""
SELECT t.name AS tenant, l.name, l.value, l.used
FROM tenants t LEFT JOIN pg_temp.running_frames() r ON r.tenant_id = t.id
{PROMISED}
CROSS JOIN LATERAL (VALUES
    ('max_open_jobs', t.max_open_jobs,
     CASE WHEN t.max_open_jobs IS NOT NULL THEN pg_temp.open_jobs(t.id) END),
    ('max_running_frames', t.max_running_frames, coalesce(r.frames, 0)),
    ('max_waiting_frames', t.max_waiting_frames,
     CASE WHEN t.max_waiting_frames IS NOT NULL THEN pg_temp.waiting_frames(t.id) END),
    ('max_input_bytes', t.max_input_bytes,
     CASE WHEN t.max_input_bytes IS NOT NULL THEN pg_temp.input_bytes(t.id) END),
    ('device_seconds_a_month', t.device_seconds_a_month,
     CASE WHEN t.device_seconds_a_month IS NOT NULL
          THEN pg_temp.used_seconds(t.id) + coalesce(p.seconds, 0) END)
) AS l (name, value, used)
WHERE t.removed_at IS NULL AND l.value IS NOT NULL ORDER BY t.name, l.name
""")  # noqa: S608 - constants only

# Waits for submissions that found other limits, and the next ones wait for it: see INSERT_JOBS.
LOCK = text("""
SELECT weight, priorities, max_open_jobs, max_running_frames, max_waiting_frames, max_input_bytes,
       requests_a_second, requests_burst, device_seconds_a_month, keep_for, max_keep_for
FROM tenants WHERE id = :id AND removed_at IS NULL FOR UPDATE
""")

SET = text("""
UPDATE tenants SET weight = :weight, priorities = CAST(:priorities AS smallint[]),
    max_open_jobs = :max_open_jobs, max_running_frames = :max_running_frames,
    max_waiting_frames = :max_waiting_frames,
    max_input_bytes = :max_input_bytes, requests_a_second = :requests_a_second,
    requests_burst = :requests_burst, device_seconds_a_month = :device_seconds_a_month,
    keep_for = :keep_for, max_keep_for = :max_keep_for
WHERE id = :id
""")

# What a tenant used more than the others that wait is divided by its weight. It is now divided by
# the new one, so that a raised weight counts at once.
RESCALE = text("""
UPDATE shares s SET used = l.used + (s.used - l.used) * CAST(:scale AS float)
FROM (
    SELECT s.pipeline, least(s.used, (
               SELECT min(o.used) FROM shares o
               WHERE o.pipeline = s.pipeline AND o.priority IS NOT NULL)) AS used
    FROM shares s WHERE s.tenant_id = :id ORDER BY s.pipeline FOR UPDATE OF s
) l
WHERE s.tenant_id = :id AND s.pipeline = l.pipeline
""")

# Waits for claims that found another limit. The next ones wait for it: see pg_temp.rooms_to_run.
LOCK_RUNNING = text("""
SELECT pg_advisory_xact_lock(hashtextextended('running ' || CAST(:id AS uuid), 0))
""")

WAITING_LANES = text("""
SELECT s.pipeline, coalesce(min(s.priority) = 0, false) AS urgent FROM shares s
WHERE s.tenant_id = ANY(CAST(:ids AS uuid[])) AND (s.priority IS NOT NULL OR s.retry_at IS NOT NULL)
GROUP BY s.pipeline ORDER BY s.pipeline
""")

REMOVE = text("""
UPDATE tenants SET removed_at = clock_timestamp(), name = id::text, max_running_frames = NULL
WHERE id = :id AND removed_at IS NULL
""")

REMOVED = text("""
SELECT id, removed_at < clock_timestamp() - make_interval(secs => :late) AS settled FROM tenants
WHERE removed_at IS NOT NULL AND emptied_at IS NULL ORDER BY removed_at
""")

OPEN_JOBS = text("""
SELECT id FROM jobs WHERE tenant_id = :id AND status = ANY(:open) LIMIT :limit
""")

REMOVE_JOBS = text("""
WITH due AS (
    SELECT id FROM jobs
    WHERE tenant_id = :id AND removed_at IS NULL AND status = ANY(:terminal) AND running = 0
    LIMIT :limit FOR UPDATE SKIP LOCKED
)
UPDATE jobs j SET removed_at = clock_timestamp(), idempotency_key = NULL
FROM due WHERE j.id = due.id
""")

REMOVE_EXPORTS = text("""
UPDATE exports SET removed_at = clock_timestamp() WHERE tenant_id = :id AND removed_at IS NULL
""")

REMOVE_WEBHOOKS = text("""
UPDATE webhooks SET removed_at = clock_timestamp() WHERE tenant_id = :id AND removed_at IS NULL
""")

DELETE_EVENTS = text("""
DELETE FROM events WHERE id IN (
    SELECT id FROM events WHERE tenant_id = :id AND xid > 0 LIMIT :limit)
AND NOT EXISTS (SELECT FROM jobs WHERE tenant_id = :id)
""")

DELETE_INPUTS = text("""
DELETE FROM inputs WHERE id IN (
    SELECT id FROM inputs i
    WHERE tenant_id = :id AND NOT EXISTS (SELECT FROM jobs WHERE input_id = i.id)
    LIMIT :limit FOR UPDATE SKIP LOCKED)
""")

# Sessions go with their keys.
DELETE_REST = [
    text(f"DELETE FROM {table} WHERE tenant_id = :id")  # noqa: S608 - constants only
    for table in ("keys", "destinations", "shares", "operations", "used_keys")
]

HAS_ROWS = text("""
SELECT EXISTS (SELECT FROM jobs WHERE tenant_id = :id)
    OR EXISTS (SELECT FROM exports WHERE tenant_id = :id)
    OR EXISTS (SELECT FROM inputs WHERE tenant_id = :id)
    OR EXISTS (SELECT FROM webhooks WHERE tenant_id = :id)
    OR EXISTS (SELECT FROM events WHERE tenant_id = :id AND xid > 0)
""")

EMPTIED = text("""
WITH control_images AS (
    DELETE FROM control_images WHERE tenant_id = :id
), device_use AS (
    DELETE FROM device_use WHERE tenant_id = :id
), used AS (
    DELETE FROM usage WHERE tenant_id = :id
)
UPDATE tenants
SET emptied_at = clock_timestamp(), webhook_secret = NULL, webhook_secret_before = NULL
WHERE id = :id
""")


class TenantRow(NamedTuple):
    """A tenant, with counts of what it owns."""

    id: uuid.UUID
    name: str
    created_at: datetime
    removed_at: datetime | None
    emptied_at: datetime | None
    weight: float
    priorities: list[int] | None
    """Those that it may use; None: all."""
    max_open_jobs: int | None
    max_running_frames: int | None
    max_waiting_frames: int | None
    max_input_bytes: int | None
    requests_a_second: float | None
    requests_burst: int | None
    device_seconds_a_month: float | None
    keep_for: int | None
    """Seconds for which a job that does not say is kept. None: the farm's retention."""
    max_keep_for: int | None
    open_jobs: int | None
    """None in a list, if it has no such limit."""
    waiting_frames: int | None
    input_bytes: int | None
    running_frames: int | None
    used_seconds: float | None
    """Device time since the beginning of the month, in seconds."""
    promised_seconds: float | None
    """Expected device time of the frames that wait or run."""
    keys: int
    jobs: int
    exports: int
    inputs: int
    images: int
    destinations: int


def list_tenants(connection: Connection) -> list[TenantRow]:
    """Read every tenant that is not removed, by name, with counts of what it owns."""
    return rows_of(connection.execute(LIST), TenantRow)


def find_tenant(connection: Connection, word: str) -> TenantRow | None:
    """Read one tenant by name, or by id, removed or not, with counts of what it owns."""
    return row_of(connection.execute(ONE, {"word": word}), TenantRow)


class LimitInUse(NamedTuple):
    """A limit that is set, and what its tenant has of it."""

    tenant: str
    name: str
    value: float
    used: float


def limits_in_use(connection: Connection) -> list[LimitInUse]:
    """Read the limits of all tenants, and what they have."""
    return rows_of(connection.execute(LIMITS_IN_USE), LimitInUse)


class TenantSettings(NamedTuple):
    """Weight and limits of a tenant, as in TenantRow."""

    weight: float
    priorities: list[int] | None
    max_open_jobs: int | None
    max_running_frames: int | None
    max_waiting_frames: int | None
    max_input_bytes: int | None
    requests_a_second: float | None
    requests_burst: int | None
    device_seconds_a_month: float | None
    keep_for: int | None
    max_keep_for: int | None

    def limits(self) -> dict[str, object]:
        """Return the limits by name, with priorities as words."""
        limits = self._asdict()
        if self.priorities is not None:
            limits["priorities"] = [Priority(each).wire for each in self.priorities]
        del limits["weight"]
        return limits


def lock_settings(connection: Connection, tenant_id: uuid.UUID) -> TenantSettings | None:
    """Read and lock a tenant's weight and limits. None if the tenant is removed."""
    connection.execute(LOCK_RUNNING, {"id": tenant_id})
    return row_of(connection.execute(LOCK, {"id": tenant_id}), TenantSettings)


def set_tenant(
    connection: Connection, tenant_id: uuid.UUID, before: TenantSettings, now: TenantSettings
) -> None:
    """Set a tenant's weight and limits, for every batch, job and request from then on."""
    connection.execute(SET, {"id": tenant_id, **now._asdict()})
    limits = now.limits()
    changed = {name: limits[name] for name, old in before.limits().items() if limits[name] != old}
    if changed:
        events.append(connection, tenant_id, "limits.changed", {"limits": changed})
    if now.weight != before.weight:
        connection.execute(RESCALE, {"id": tenant_id, "scale": before.weight / now.weight})


def waiting_lanes(
    connection: Connection, tenant_ids: Collection[uuid.UUID]
) -> list[tuple[str, bool]]:
    """List pipelines on which work of tenants may wait, each with True if it may be interactive."""
    rows = connection.execute(WAITING_LANES, {"ids": arrays.ids(tenant_ids)})
    return [(row.pipeline, row.urgent) for row in rows]


def remove_tenant(connection: Connection, tenant_id: uuid.UUID) -> None:
    """Remove a tenant. Its keys and sessions are refused from then on: see `keys.FIND`."""
    connection.execute(REMOVE, {"id": tenant_id})


def delete_of_removed(connection: Connection) -> None:
    """Cancel some of the jobs of removed tenants, and delete some of their rows.

    Args:
        connection: not in a transaction: each job is cancelled in a separate one.
    """
    with connection.begin():
        removed = connection.execute(REMOVED, {"late": LATE_SECONDS}).all()
    for tenant in removed:
        wanted = {"id": tenant.id, "limit": JOBS_PER_CALL}
        wanted |= {"open": [JobStatus.QUEUED, JobStatus.RUNNING], "terminal": list(TERMINAL)}
        with connection.begin():
            job_ids = connection.execute(OPEN_JOBS, wanted).scalars().all()
        for job_id in job_ids:
            with suppress(Conflict, NotFound), connection.begin():  # it has ended since
                cancel_job(connection, tenant.id, job_id)
        with connection.begin():
            connection.execute(REMOVE_JOBS, wanted)
            connection.execute(REMOVE_EXPORTS, wanted)
            connection.execute(REMOVE_WEBHOOKS, wanted)
            connection.execute(DELETE_INPUTS, {**wanted, "limit": INPUTS_PER_CALL})
            connection.execute(DELETE_EVENTS, {**wanted, "limit": EVENTS_PER_CALL})
            for statement in DELETE_REST:
                connection.execute(statement, wanted)


def settled(connection: Connection) -> list[uuid.UUID]:
    """List removed tenants that own only images, and for whom no late request can store more."""
    removed = connection.execute(REMOVED, {"late": LATE_SECONDS}).all()
    return [
        tenant.id
        for tenant in removed
        if tenant.settled and not connection.execute(HAS_ROWS, {"id": tenant.id}).scalar_one()
    ]


def mark_emptied(connection: Connection, tenant_id: uuid.UUID) -> None:
    """Mark a removed tenant as emptied: its objects are deleted, and nothing else is left."""
    connection.execute(EMPTIED, {"id": tenant_id})
