"""Use cases of API keys: create and revoke. Each is recorded as an action."""

from __future__ import annotations

import uuid

from farm.domain.spec import Metadata
from farm.errors import InvalidRequest, NotFound
from farm.store import keys, operations
from farm.store.actions import Actor, record
from farm.store.engine import Transaction
from farm.store.keys import ROLES, KeyRow, RevokedKey


def create_key(
    connection: Transaction,
    actor: Actor,
    tenant: str,
    role: str,
    name: str = "",
    metadata: Metadata | None = None,
    *,
    everywhere: bool = False,
) -> tuple[KeyRow, str]:
    """Create a key for a tenant, and the tenant if it is new. Return its description and the key.

    Args:
        connection: in a transaction.
        actor: who creates it, and why.
        tenant: its name.
        role: one of ROLES.
        name: note of what the key is for.
        metadata: texts in image files, for jobs that do not say. None: the farm's default.
        everywhere: it sees every tenant.

    Raises:
        InvalidRequest: there is no such role, or it does not go with `everywhere`; or no tenant can
            have this name.
    """
    if role not in ROLES:
        raise InvalidRequest(
            f"role: {role!r} is not a role. Use one of {', '.join(ROLES)}.", param="role"
        )
    tenant = tenant.strip()
    key_id, key = keys.create_key(connection, tenant, role, name, metadata, everywhere=everywhere)
    row = keys.find_key(connection, key_id)
    assert row is not None
    record(connection, actor.on(tenant), "key.create", f"key {key_id}", row.sees)
    return row, key


def revoke_key(connection: Transaction, actor: Actor, key_id: uuid.UUID) -> RevokedKey:
    """Revoke a key, and stop its operations. A key that is revoked stays so.

    Raises:
        NotFound: there is no key with this ID.
    """
    revoked = keys.revoke_key(connection, key_id)
    if revoked is None:
        raise NotFound(f"There is no key {key_id}. `farm keys list` lists the keys.")
    if revoked.is_news:
        outcome = f"revoked: {revoked.name or 'no name'}"
        if stopped := operations.stop_of_key(connection, key_id):
            outcome += f"; operations stopped: {stopped}"
        record(connection, actor.on(revoked.tenant), "key.revoke", f"key {key_id}", outcome)
    return revoked
