"""Owners: the tenants of jobs and other objects, for callers that see every tenant."""

from __future__ import annotations

import uuid
from typing import NamedTuple

from sqlalchemy import Connection, text

from farm.store.rows import row_of

TABLES = {
    "job_id": "jobs",
    "export_id": "exports",
    "input_id": "inputs",
    "webhook_id": "webhooks",
}

OWNED = {
    **{
        name: text(f"""
SELECT t.id AS tenant_id, t.name AS tenant
FROM {table} o JOIN tenants t ON t.id = o.tenant_id WHERE o.id = :id
""")  # noqa: S608 - constants only
        for name, table in TABLES.items()
    },
    "delivery_id": text("""
SELECT t.id AS tenant_id, t.name AS tenant
FROM webhook_deliveries d JOIN webhooks w ON w.id = d.webhook_id
JOIN tenants t ON t.id = w.tenant_id WHERE d.id = :id
"""),
}
"""Statements by the name of the ID in the API's paths."""

NAMED = text("""
SELECT id AS tenant_id, name AS tenant FROM tenants WHERE name = :name AND removed_at IS NULL
""")


class Owner(NamedTuple):
    """A tenant."""

    tenant_id: uuid.UUID
    tenant: str


def owner_of(connection: Connection, kind: str, found_by: object) -> Owner | None:
    """Find the tenant of an object.

    Args:
        connection: any connection.
        kind: name of the ID, a key of OWNED.
        found_by: the ID, as it stands in the path.

    Returns:
        None if there is no such object, or the ID is malformed.
    """
    try:
        value = int(str(found_by)) if kind == "delivery_id" else uuid.UUID(str(found_by))
    except ValueError:
        return None
    if isinstance(value, int) and not 0 < value < 2**63:
        return None
    return row_of(connection.execute(OWNED[kind], {"id": value}), Owner)


def named(connection: Connection, name: str) -> Owner | None:
    """Find a tenant by its name. None if there is none."""
    return row_of(connection.execute(NAMED, {"name": name}), Owner)
