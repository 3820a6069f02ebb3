"""Actions: a log of who did what, and of what changed by itself. See ADR 56.

Each is recorded in the transaction that performs it.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal, NamedTuple

from sqlalchemy import Connection, TextClause, text

from farm.process import version
from farm.store.rows import rows_of

Via = Literal["api", "page", "shell", "farm"]
"""Way of an action: a call of the API, a button of the dashboard, a command at a shell, or none: it
changed by itself, such as a worker that came."""

INSERT = text("""
INSERT INTO actions
    (key_id, who, role, tenant, via, address, verb, target, owner, why, outcome, operation_id, lane)
VALUES (:key_id, :who, :role, :tenant, :via, :address, :verb, :target,
        :owner, :why, :outcome, :operation, :lane)
""")

COLUMNS = """id, at, key_id, who, role, tenant, via, address, verb, target, owner, why, outcome,
operation_id AS operation, lane"""

LOCK_VERSION = text("SELECT pg_advisory_xact_lock(hashtextextended(:target, 0))")

VERSION = text("""
SELECT outcome FROM actions WHERE verb = 'version.run' AND target = :target
ORDER BY id DESC LIMIT 1
""")

MARKED = f"""
SELECT {COLUMNS} FROM actions
WHERE lane IS NOT NULL AND at > :since AND at <= :until AND {{kind}}
  AND (CAST(:lane AS text) IS NULL OR lane IN ('', :lane))
ORDER BY at DESC LIMIT :limit
"""  # noqa: S608 - constants only

# Workers come and go often. They leave room for what is rarer.
MARKS = text(f"""
({MARKED.format(kind="verb = ANY(:of_workers)")})
UNION ALL
({MARKED.format(kind="verb <> ALL(:of_workers)")})
ORDER BY at DESC
""")

# The newest version of a program stays: the next start compares with it.
PRUNE = text("""
DELETE FROM actions WHERE id = ANY(ARRAY(
    SELECT id FROM actions a
    WHERE at < now() - make_interval(secs => :seconds) AND (verb <> 'version.run' OR id < (
        SELECT max(id) FROM actions b WHERE b.verb = 'version.run' AND b.target = a.target))
    ORDER BY at LIMIT :limit))
""")

PRUNE_WORKERS = text("""
DELETE FROM actions WHERE id = ANY(ARRAY(
    SELECT id FROM actions
    WHERE verb = ANY(:of_workers) AND at < now() - make_interval(secs => :seconds) LIMIT :limit))
""")

OF_WORKERS = ["worker.start", "worker.end", "worker.lost", "worker.return"]
"""Verbs of workers that come and go by themselves."""
WORKER_DAYS = 30.0
"""Days for which these are kept at most. A fleet that grows and shrinks writes thousands a day."""

DAY_SECONDS = 86_400.0


@dataclass(frozen=True)
class Actor:
    """Who acts: an API key, a user of a shell, or the farm itself."""

    key_id: uuid.UUID
    """Zero for a user of a shell, and for the farm itself."""
    name: str
    """Name of the key, or of the user."""
    role: str
    """Role of the key. Empty for a user of a shell."""
    tenant: str
    """Name of the key's tenant. Empty for a user of a shell."""
    via: Via
    address: str
    """Network address of the client, as the API sees it; or the name of the shell's machine."""
    why: str = ""
    """Reason given."""
    owner: str | None = None
    """Name of the tenant that owns the target. None: the farm does."""
    operation: uuid.UUID | None = None
    """Operation that the action is part of."""

    def on(self, owner: str, why: str = "") -> Actor:
        """Return the actor as one that acts on a tenant's object, for another reason if given."""
        return replace(self, owner=owner, why=why or self.why)


class ActionRow(NamedTuple):
    """A recorded action."""

    id: int
    at: datetime
    key_id: uuid.UUID
    who: str
    role: str
    tenant: str
    via: Via
    address: str
    verb: str
    target: str
    owner: str | None
    why: str
    outcome: str
    operation: uuid.UUID | None
    lane: str | None
    """Lane that it is about. Empty: every lane. None: no lane."""


@dataclass(frozen=True)
class ActionFilter:
    """Selects actions. None: any."""

    who: str | None = None
    verb: str | None = None
    verbs: Sequence[str] | None = None
    target: str | None = None
    owner: str | None = None
    """Name of the tenant that owns the target."""
    since: datetime | None = None
    until: datetime | None = None
    operation: uuid.UUID | None = None
    lane: str | None = None
    """Those about this lane, and about every lane."""


FARM = Actor(uuid.UUID(int=0), "farm", role="", tenant="", via="farm", address="")
"""The farm itself."""

CONDITIONS = {
    "who": "who = :who",
    "verb": "verb = :verb",
    "verbs": "verb = ANY(:verbs)",
    "target": "target = :target",
    "owner": "owner = :owner",
    "since": "at >= :since",
    "until": "at < :until",
    "operation": "operation_id = :operation",
    "lane": "lane IN ('', :lane)",
    "after": "id < :after",
}


def record(
    connection: Connection,
    actor: Actor | None,
    verb: str,
    target: str,
    outcome: str,
    lane: str | None = None,
) -> None:
    """Record an action.

    Args:
        connection: in the transaction of the action, so that both are committed or neither.
        actor: who acts. None: nothing is recorded.
        verb: the kind of action, for example `tenant.delete`.
        target: the object of the action, for example `tenant ann`.
        outcome: the result of the action.
        lane: the lane that it is about. Empty: every lane. It is marked on the charts.
    """
    if actor is None:
        return
    connection.execute(
        INSERT,
        {
            "key_id": actor.key_id,
            "who": actor.name,
            "role": actor.role,
            "tenant": actor.tenant,
            "via": actor.via,
            "address": actor.address,
            "verb": verb,
            "target": target,
            "owner": actor.owner,
            "why": actor.why,
            "outcome": outcome,
            "operation": actor.operation,
            "lane": lane,
        },
    )


def note_version(connection: Connection, program: str) -> None:
    """Record that a program of another version than before runs on the farm, if it does."""
    target = f"program {program}"
    connection.execute(LOCK_VERSION, {"target": target})  # several start at the same moment
    before = connection.execute(VERSION, {"target": target}).scalar()
    if before != version():
        record(connection, FARM, "version.run", target, version(), lane="")


def list_marks(
    connection: Connection, since: datetime, until: datetime, lane: str | None, limit: int
) -> list[ActionRow]:
    """Read what is marked on the charts of a lane, or of all, newest first.

    It is up to `limit` workers that came or went, and up to `limit` other changes.
    """
    between = {"since": since, "until": until, "lane": lane}
    values = {**between, "limit": limit, "of_workers": OF_WORKERS}
    return rows_of(connection.execute(MARKS, values), ActionRow)


def list_actions(
    connection: Connection, wanted: ActionFilter, *, limit: int, after: int | None = None
) -> list[ActionRow]:
    """Read a page of actions, newest first, starting below the id `after`."""
    asked = {**vars(wanted), "after": after}
    values = {name: value for name, value in asked.items() if value is not None}
    return rows_of(connection.execute(listing(values), {**values, "limit": limit}), ActionRow)


def listing(names: Iterable[str]) -> TextClause:
    """Return the statement that lists actions by these fields of CONDITIONS."""
    conditions = [CONDITIONS[name] for name in names]
    return text(f"""
SELECT {COLUMNS} FROM actions WHERE {" AND ".join(conditions or ["true"])}
ORDER BY id DESC LIMIT :limit
""")  # noqa: S608 - constants only


def prune(connection: Connection, days: float, limit: int) -> None:
    """Delete up to `limit` of the actions of more than `days` ago. 0 days deletes none.

    Workers that came or went are deleted after WORKER_DAYS, if that is sooner, and with 0 days too.
    """
    if days > 0:
        connection.execute(PRUNE, {"seconds": days * DAY_SECONDS, "limit": limit})
    seconds = min(days or WORKER_DAYS, WORKER_DAYS) * DAY_SECONDS
    values = {"seconds": seconds, "limit": limit, "of_workers": OF_WORKERS}
    connection.execute(PRUNE_WORKERS, values)
