"""Tenants and their API keys. A key is shown once, when it is made: only its hash is stored."""

from __future__ import annotations

import hashlib
import secrets
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import Connection, text

from farm.domain.spec import Metadata
from farm.errors import InvalidRequest
from farm.store.rows import row_of, rows_of

OPERATOR = "operator"
ROLES = ("client", OPERATOR, "viewer")

KNOWN = text("SELECT id FROM tenants WHERE name = :name AND removed_at IS NULL")
TENANT = text("""
INSERT INTO tenants (id, name) VALUES (:id, :name)
ON CONFLICT (name) DO UPDATE SET name = excluded.name
RETURNING id
""")

CREATE = text("""
INSERT INTO keys (id, tenant_id, role, name, prefix, digest, metadata, everywhere)
VALUES (:id, :tenant_id, :role, :name, :prefix, :digest, :metadata, :everywhere)
""")

FIND = text("""
SELECT k.digest, k.id AS key_id, k.tenant_id, t.name AS tenant, k.role, k.name,
       t.requests_a_second, t.requests_burst, k.metadata, k.everywhere
FROM keys k JOIN tenants t ON t.id = k.tenant_id
WHERE k.digest = ANY(:digests) AND k.revoked_at IS NULL AND t.removed_at IS NULL
""")

SHOWN = """
SELECT k.id, k.prefix, k.role, k.everywhere, k.name, t.name AS tenant, k.created_at, k.revoked_at
FROM keys k JOIN tenants t ON t.id = k.tenant_id
"""
LIST = text(f"""
{SHOWN} WHERE CAST(:tenant AS text) IS NULL OR t.name = :tenant ORDER BY k.created_at, k.id
""")
ONE = text(f"{SHOWN} WHERE k.id = :id")

MADE_BY = text(f"""
WITH RECURSIVE made AS (
    SELECT substr(target, 5)::uuid AS id FROM actions WHERE key_id = :id AND verb = 'key.create'
    UNION
    SELECT substr(a.target, 5)::uuid FROM made m JOIN actions a ON a.key_id = m.id
    WHERE a.verb = 'key.create'
)
{SHOWN} WHERE k.id IN (SELECT id FROM made) AND k.revoked_at IS NULL ORDER BY k.created_at, k.id
""")  # noqa: S608 - constants only

REVOKE = text("""
UPDATE keys k SET revoked_at = coalesce(k.revoked_at, clock_timestamp())
FROM keys before JOIN tenants t ON t.id = before.tenant_id
WHERE k.id = :id AND before.id = k.id
RETURNING k.id, k.name, t.name AS tenant, before.revoked_at IS NULL AS is_news
""")


@dataclass(frozen=True)
class Caller:
    """The owner of a key."""

    key_id: uuid.UUID
    tenant_id: uuid.UUID
    tenant: str
    role: str
    name: str
    """Name of the key."""
    requests_a_second: float | None = None
    """Limit of its tenant. None: no limit."""
    requests_burst: int | None = None
    """Number of requests that may arrive at once. None: those of ten seconds."""
    metadata: Metadata | None = None
    """Texts in image files, for jobs that do not say. None: the farm's default."""
    everywhere: bool = False
    """True for a viewer's key that sees every tenant."""
    home: str | None = None
    """Tenant of the key, if the call is about another one. `tenant` is that other one."""

    @property
    def sees_everywhere(self) -> bool:
        """True if it may look at every tenant."""
        return self.everywhere or self.role == OPERATOR


class KeyRow(NamedTuple):
    """Description of a key, without the key."""

    id: uuid.UUID
    prefix: str
    role: str
    everywhere: bool
    name: str
    tenant: str
    created_at: datetime
    revoked_at: datetime | None

    @property
    def sees(self) -> str:
        """Its role in words."""
        return f"{self.role} of every tenant" if self.everywhere else self.role


def ensure_tenant(connection: Connection, name: str) -> uuid.UUID:
    """Find a tenant by name, or insert it if it is new.

    Raises:
        InvalidRequest: no new tenant can have this name.
    """
    known: uuid.UUID | None = connection.execute(KNOWN, {"name": name}).scalar()
    if known is not None:
        return known
    if name != name.strip() or not name or name == "*" or not name.isprintable():
        raise InvalidRequest(
            f"tenant: {name!r} is not a name. Use letters, digits and signs that can be seen. "
            "Example: shop.",
            param="tenant",
        )
    if _is_id(name):
        raise InvalidRequest(
            f"tenant: {name} has the form of an ID. Choose another name. Example: shop.",
            param="tenant",
        )
    found: uuid.UUID = connection.execute(TENANT, {"id": uuid.uuid4(), "name": name}).scalar_one()
    return found


def _is_id(name: str) -> bool:
    """Return True for the form of an ID: a deleted tenant has its ID for a name."""
    try:
        uuid.UUID(name)
    except ValueError:
        return False
    return True


def create_key(
    connection: Connection,
    tenant: str,
    role: str,
    name: str = "",
    metadata: Metadata | None = None,
    *,
    everywhere: bool = False,
) -> tuple[uuid.UUID, str]:
    """Create a key for a tenant. Return (id, key). The key itself is never shown again.

    Args:
        connection: in a transaction.
        tenant: its name. A new one is inserted.
        role: one of ROLES.
        name: note of what the key is for.
        metadata: texts in image files, for jobs that do not say. None: the farm's default.
        everywhere: it sees every tenant.

    Raises:
        InvalidRequest: no new tenant can have this name, or the role does not go with `everywhere`.
    """
    if everywhere and role != "viewer":
        raise InvalidRequest(
            f"everywhere: only a viewer's key takes it, and the role is {role}. An operator's key "
            "sees every tenant without it.",
            param="everywhere",
        )
    key_id, key = uuid.uuid4(), f"farm_{secrets.token_urlsafe(32)}"
    connection.execute(
        CREATE,
        {
            "id": key_id,
            "tenant_id": ensure_tenant(connection, tenant),
            "role": role,
            "name": name,
            "prefix": key[:10],
            "digest": digest_of(key),
            "metadata": metadata,
            "everywhere": everywhere,
        },
    )
    return key_id, key


def find_callers(connection: Connection, keys: Collection[str]) -> dict[str, Caller]:
    """Find the owners of keys. Keys that are unknown or revoked are left out."""
    digests = {digest_of(key): key for key in keys}
    rows = connection.execute(FIND, {"digests": list(digests)})
    return {digests[digest]: Caller(*fields) for digest, *fields in rows}


def list_keys(connection: Connection, tenant: str | None = None) -> list[KeyRow]:
    """Read the description of each key of a tenant, or of all, oldest first."""
    return rows_of(connection.execute(LIST, {"tenant": tenant}), KeyRow)


def find_key(connection: Connection, key_id: uuid.UUID) -> KeyRow | None:
    """Read the description of a key."""
    return row_of(connection.execute(ONE, {"id": key_id}), KeyRow)


def made_by(connection: Connection, key_id: uuid.UUID) -> list[KeyRow]:
    """Read the valid keys that a key has made, and those that they have made, oldest first."""
    return rows_of(connection.execute(MADE_BY, {"id": key_id}), KeyRow)


class RevokedKey(NamedTuple):
    """A key that was revoked."""

    id: uuid.UUID
    name: str
    tenant: str
    is_news: bool
    """False if it was revoked before."""


def revoke_key(connection: Connection, key_id: uuid.UUID) -> RevokedKey | None:
    """Revoke a key. Return None if there is no key with this ID."""
    return row_of(connection.execute(REVOKE, {"id": key_id}), RevokedKey)


def digest_of(secret: str) -> bytes:
    """Hash a key or a session. The tables contain only this hash."""
    # The secret has 256 random bits, so one round of a plain hash cannot be reversed.
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()
