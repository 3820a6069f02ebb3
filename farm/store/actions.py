"""Actions: a log of what operators did. Each is recorded in the transaction that performs it."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import Connection, text

from farm.store.rows import rows_of

INSERT = text("""
INSERT INTO actions (key_id, who, tenant, address, verb, target, why, outcome)
VALUES (:key_id, :who, :tenant, :address, :verb, :target, :why, :outcome)
""")

LIST = text("""
SELECT id, at, key_id, who, tenant, address, verb, target, why, outcome FROM actions
WHERE CAST(:after AS bigint) IS NULL OR id < :after
ORDER BY id DESC LIMIT :limit
""")


@dataclass(frozen=True)
class Actor:
    """The person or program that acts, known by its API key."""

    key_id: uuid.UUID
    name: str
    """Name of the key."""
    tenant: str
    """Name of the key's tenant."""
    address: str
    """Network address of the client, as the API sees it."""


class ActionRow(NamedTuple):
    """A recorded action."""

    id: int
    at: datetime
    key_id: uuid.UUID
    who: str
    tenant: str
    address: str
    verb: str
    target: str
    why: str
    outcome: str


def record(
    connection: Connection, actor: Actor, verb: str, target: str, why: str, outcome: str
) -> None:
    """Record an action.

    Args:
        connection: in the transaction of the action, so that both are committed or neither.
        actor: the key that acts.
        verb: the kind of action, for example `tenant.delete`.
        target: the object of the action, for example `tenant ann`.
        why: the reason given; empty for none.
        outcome: the result of the action.
    """
    connection.execute(
        INSERT,
        {
            "key_id": actor.key_id,
            "who": actor.name,
            "tenant": actor.tenant,
            "address": actor.address,
            "verb": verb,
            "target": target,
            "why": why,
            "outcome": outcome,
        },
    )


def list_actions(
    connection: Connection, *, limit: int, after: int | None = None
) -> list[ActionRow]:
    """Read a page of actions, newest first, starting below the id `after`."""
    return rows_of(connection.execute(LIST, {"limit": limit, "after": after}), ActionRow)
