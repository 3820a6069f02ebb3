"""Actions: what operators did, each recorded in the transaction that did it."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, text

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
    """Who acts, and from where."""

    key_id: uuid.UUID
    name: str
    """the key's"""
    tenant: str
    """the key's"""
    address: str
    """of the client, as the API sees it"""


def record(
    connection: Connection, actor: Actor, verb: str, target: str, why: str, outcome: str
) -> None:
    """Record an action.

    Args:
        connection: in the transaction that does it: both are committed, or neither.
        actor: who.
        verb: what, such as `tenant.delete`.
        target: on what, such as `tenant ann`.
        why: the reason that was given; empty: none.
        outcome: what came of it.
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
) -> Sequence[Row[Any]]:
    """Read a page of actions, newest first, beginning below the id `after`."""
    return connection.execute(LIST, {"limit": limit, "after": after}).all()
