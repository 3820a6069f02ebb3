"""Destinations: places to which a tenant may export, in addition to the farm's own storage."""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import Connection, text

from farm.store.rows import row_of, rows_of

COLUMNS = "d.id, t.name AS tenant, d.bucket, d.prefix, d.created_at"

# The update changes nothing. Without it an existing row would not be returned.
GRANT = text(f"""
WITH d AS (
    INSERT INTO destinations (id, tenant_id, bucket, prefix)
    SELECT :id, id, :bucket, :prefix FROM tenants WHERE name = :tenant AND removed_at IS NULL
    ON CONFLICT (tenant_id, bucket, prefix) DO UPDATE SET bucket = excluded.bucket
    RETURNING *
)
SELECT {COLUMNS} FROM d JOIN tenants t ON t.id = d.tenant_id
""")  # noqa: S608 - constants only

LIST = text(f"""
SELECT {COLUMNS} FROM destinations d JOIN tenants t ON t.id = d.tenant_id
WHERE CAST(:tenant_id AS uuid) IS NULL OR d.tenant_id = :tenant_id
ORDER BY t.name, d.bucket, d.prefix
""")  # noqa: S608 - constants only

REVOKE = text("""
DELETE FROM destinations d USING tenants t WHERE t.id = d.tenant_id AND d.id = :id
RETURNING t.name AS tenant, d.bucket, d.prefix
""")

COVERS = text("""
SELECT EXISTS (
    SELECT FROM destinations
    WHERE tenant_id = :tenant_id AND bucket = :bucket AND starts_with(:prefix, prefix))
""")


class DestinationRow(NamedTuple):
    """A destination, with the name of its tenant."""

    id: uuid.UUID
    tenant: str
    bucket: str
    prefix: str
    created_at: datetime


class RevokedRow(NamedTuple):
    """A destination that was deleted."""

    tenant: str
    bucket: str
    prefix: str


def grant(connection: Connection, tenant: str, bucket: str, prefix: str) -> DestinationRow | None:
    """Allow a tenant to export to a bucket, below a prefix. Return None if there is no such tenant.

    Args:
        connection: in a transaction.
        tenant: the tenant's name.
        bucket: the bucket's name.
        prefix: the beginning of the keys: empty, or ending with a slash, for example `datasets/`.
    """
    values = {"id": uuid.uuid4(), "tenant": tenant, "bucket": bucket, "prefix": prefix}
    return row_of(connection.execute(GRANT, values), DestinationRow)


def list_destinations(
    connection: Connection, tenant_id: uuid.UUID | None = None
) -> list[DestinationRow]:
    """Read the destinations of a tenant, or of all."""
    return rows_of(connection.execute(LIST, {"tenant_id": tenant_id}), DestinationRow)


def revoke(connection: Connection, destination_id: uuid.UUID) -> RevokedRow | None:
    """Delete a destination. Return it, or None if there is none with this ID."""
    return row_of(connection.execute(REVOKE, {"id": destination_id}), RevokedRow)


def covers(connection: Connection, tenant_id: uuid.UUID, bucket: str, prefix: str) -> bool:
    """Return True if a tenant may export to a place: at or below one of its destinations."""
    values = {"tenant_id": tenant_id, "bucket": bucket, "prefix": prefix}
    return bool(connection.execute(COVERS, values).scalar_one())
