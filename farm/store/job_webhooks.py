"""Addresses that jobs name, to be told of them. See ADR 43.

All addresses of a server, such as https://shop.example, share one row of `webhooks`: the server is
parked if it does not answer, whichever address a job named. One secret of the tenant signs all.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import Connection, text

from farm.store import arrays
from farm.store.rows import row_of, rows_of

FIND = text("""
SELECT id, state FROM webhooks
WHERE tenant_id = :tenant_id AND origin = :origin AND removed_at IS NULL
""")

ENABLE = text("""
UPDATE webhooks
SET state = 'enabled', disabled_because = NULL, failures = 0, failing_since = NULL,
    parked_until = NULL
WHERE id = :id AND state = 'disabled'
""")

SECRET = text("SELECT webhook_secret FROM tenants WHERE id = :tenant_id")

# Of two that make one at the same time, the first one's stays.
MAKE_SECRET = text("""
UPDATE tenants SET webhook_secret = coalesce(webhook_secret, :new)
WHERE id = :tenant_id RETURNING webhook_secret
""")

ROTATE = text("""
UPDATE tenants
SET webhook_secret_before = CASE WHEN :seconds > 0 THEN webhook_secret END,
    webhook_before_until = CASE WHEN :seconds > 0 AND webhook_secret IS NOT NULL
                                THEN clock_timestamp() + make_interval(secs => :seconds) END,
    webhook_secret = :new
WHERE id = :tenant_id RETURNING webhook_before_until
""")

COPY_SECRET = text("""
UPDATE webhooks w
SET secret = t.webhook_secret, secret_before = t.webhook_secret_before,
    before_until = t.webhook_before_until
FROM tenants t
WHERE t.id = :tenant_id AND w.tenant_id = t.id AND w.origin IS NOT NULL AND w.removed_at IS NULL
  AND (CAST(:id AS uuid) IS NULL OR w.id = :id)
""")

OF_JOBS = text("""
SELECT j.job_id, j.webhook_id, j.url, j.kinds
FROM job_webhooks j JOIN webhooks w ON w.id = j.webhook_id
WHERE j.job_id = ANY(CAST(:ids AS uuid[])) AND w.state <> 'disabled' AND w.removed_at IS NULL
""")


class JobWebhook(NamedTuple):
    """An address that a job named."""

    webhook_id: uuid.UUID
    """The row of its server."""
    url: str
    kinds: list[str]


class ServerRow(NamedTuple):
    """A server whose addresses a tenant's jobs name."""

    id: uuid.UUID
    state: str


class OfJob(NamedTuple):
    """A job's address, with the job."""

    job_id: uuid.UUID
    webhook_id: uuid.UUID
    url: str
    kinds: list[str]


def find_server(connection: Connection, tenant_id: uuid.UUID, origin: str) -> ServerRow | None:
    """Find a server that a tenant's jobs have named before."""
    values = {"tenant_id": tenant_id, "origin": origin}
    return row_of(connection.execute(FIND, values), ServerRow)


def enable_server(connection: Connection, webhook_id: uuid.UUID) -> None:
    """Enable a server that is disabled, and forget that it failed."""
    connection.execute(ENABLE, {"id": webhook_id})


def secret_of(connection: Connection, tenant_id: uuid.UUID, new: bytes) -> bytes:
    """Return the secret that signs what a tenant's jobs cause. If it has none, store `new`."""
    found = connection.execute(SECRET, {"tenant_id": tenant_id}).scalar_one()
    if found is None:
        values = {"tenant_id": tenant_id, "new": new}
        found = connection.execute(MAKE_SECRET, values).scalar_one()
    return bytes(found)


def rotate_secret(
    connection: Connection, tenant_id: uuid.UUID, new: bytes, keep_seconds: float
) -> datetime | None:
    """Replace a tenant's secret. Return the time until which the one before signs too."""
    values = {"tenant_id": tenant_id, "new": new, "seconds": keep_seconds}
    until: datetime | None = connection.execute(ROTATE, values).scalar_one()
    return until


def copy_secret(
    connection: Connection, tenant_id: uuid.UUID, webhook_id: uuid.UUID | None = None
) -> None:
    """Give the tenant's secret to a server that its jobs name; with None, to all of them."""
    connection.execute(COPY_SECRET, {"tenant_id": tenant_id, "id": webhook_id})


def webhooks_of_jobs(
    connection: Connection, job_ids: Collection[uuid.UUID]
) -> dict[uuid.UUID, JobWebhook]:
    """Read the addresses that some jobs named, without those of disabled and deleted servers."""
    if not job_ids:
        return {}
    found = rows_of(connection.execute(OF_JOBS, {"ids": arrays.ids(job_ids)}), OfJob)
    return {row.job_id: JobWebhook(row.webhook_id, row.url, row.kinds) for row in found}
