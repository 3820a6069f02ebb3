"""Operations: a verb on all jobs of a filter, one job after another. See ADR 52."""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Any, Literal, NamedTuple

from pydantic import TypeAdapter
from sqlalchemy import Connection, TextClause, text

from farm.domain.verbs import Order, Verb
from farm.store.actions import DAY_SECONDS, Actor
from farm.store.job_lists import JobFilter
from farm.store.rows import JsonObject, row_of, rows_of

State = Literal["running", "stopped", "ended"]
Outcome = Literal["done", "skipped", "failed"]
"""Outcome for a job: the verb was done, there was nothing to do, or it was refused."""

COLUMNS = """
o.id, o.created_at, o.verb, o.args, o.tenant_id,
(SELECT t.name FROM tenants t WHERE t.id = o.tenant_id) AS tenant, o.filter,
o.key_id, o.who, o.role, o.home, o.via, o.address, o.why, o.expected, o.done, o.skipped, o.failed,
o.problem, o.state, o.at_time, o.at_id, o.ended_at
"""

INSERT = text("""
INSERT INTO operations (id, verb, args, tenant_id, filter, key_id, who, role, home, via, address,
                        why, expected)
VALUES (:id, :verb, CAST(:args AS jsonb), :tenant_id, CAST(:filter AS jsonb), :key_id, :who, :role,
        :home, :via, :address, :why, :expected)
""")

# So that two calls of a key do not both find none.
ONE_AT_A_TIME = text("SELECT pg_advisory_xact_lock(hashtextextended('operation ' || :key_id, 0))")
RUNNING_OF_KEY = text("""
SELECT id FROM operations
WHERE state = 'running' AND key_id = :key_id AND verb = :verb ORDER BY stepped_at LIMIT 1
""")

NEXT = text(f"""
SELECT {COLUMNS} FROM operations o
WHERE o.state = 'running' ORDER BY o.stepped_at NULLS FIRST LIMIT 1
""")  # noqa: S608 - constants only

# The place before is a fence: of two janitors, only one goes on from it.
ADVANCE = text("""
UPDATE operations
SET done = done + :done, skipped = skipped + :skipped, failed = failed + :failed,
    problem = coalesce(problem, :problem), at_time = :at_time, at_id = :at_id,
    stepped_at = clock_timestamp()
WHERE id = :id AND state = 'running' AND at_id IS NOT DISTINCT FROM CAST(:before AS uuid)
""")

STILL_AT = text("""
UPDATE operations SET stepped_at = clock_timestamp()
WHERE id = :id AND state = 'running' AND at_id IS NOT DISTINCT FROM CAST(:before AS uuid)
""")

PUT_LAST = text("UPDATE operations SET stepped_at = clock_timestamp() WHERE id = :id")

END = text("""
UPDATE operations SET state = :state, ended_at = clock_timestamp()
WHERE id = :id AND state = 'running'
""")

STOP_OF_KEY = text("""
UPDATE operations SET state = 'stopped', ended_at = clock_timestamp()
WHERE key_id = :key_id AND state = 'running'
""")

PRUNE = text("""
DELETE FROM operations WHERE id = ANY(ARRAY(
    SELECT id FROM operations
    WHERE created_at < now() - make_interval(secs => :seconds) AND state <> 'running'
    ORDER BY created_at LIMIT :limit))
""")

CONDITIONS = {
    "id": "o.id = :id",
    "tenant_id": "o.tenant_id = :tenant_id",
    "after": "(o.created_at, o.id) < (SELECT created_at, id FROM operations WHERE id = :after)",
}

FILTERS = TypeAdapter(JobFilter)
ORDERS = TypeAdapter(Order)


class OperationRow(NamedTuple):
    """An operation."""

    id: uuid.UUID
    created_at: datetime
    verb: str
    args: JsonObject
    tenant_id: uuid.UUID | None
    tenant: str | None
    """Name of the owner of the jobs. None: all tenants."""
    filter: JsonObject
    key_id: uuid.UUID
    who: str
    role: str
    home: str
    """Tenant of the key."""
    via: Literal["api", "page", "shell"]
    address: str
    why: str
    expected: int
    """Number of jobs to which the verb could do something at first."""
    done: int
    skipped: int
    failed: int
    problem: str | None
    """Reason of the first failure."""
    state: State
    at_time: datetime | None
    """Time of submission of the last job that was handled."""
    at_id: uuid.UUID | None
    ended_at: datetime | None

    @property
    def jobs(self) -> JobFilter:
        """The jobs, as they were selected at first."""
        return FILTERS.validate_python(self.filter)

    @property
    def order(self) -> Order:
        """The verb with its arguments."""
        return ORDERS.validate_python(self.args)

    @property
    def place(self) -> tuple[datetime, uuid.UUID] | None:
        """The last job that was handled."""
        return None if self.at_time is None or self.at_id is None else (self.at_time, self.at_id)

    @property
    def actor(self) -> Actor:
        """Who started it, as the one who acts on each job."""
        return Actor(
            self.key_id,
            self.who,
            self.role,
            self.home,
            self.via,
            self.address,
            self.why,
            operation=self.id,
        )


def insert(
    connection: Connection, order: Order, wanted: JobFilter, actor: Actor, expected: int
) -> uuid.UUID:
    """Store an operation, which the janitor then carries out. Return its ID.

    Args:
        connection: in a transaction.
        order: the verb and its arguments.
        wanted: the jobs, with the time `until` at which they were selected.
        actor: who starts it.
        expected: number of jobs to which the verb could do something.
    """
    operation_id = uuid.uuid4()
    connection.execute(
        INSERT,
        {
            "id": operation_id,
            "verb": order.verb,
            "args": ORDERS.dump_json(order).decode(),
            "tenant_id": wanted.tenant_id,
            "filter": FILTERS.dump_json(wanted).decode(),
            "key_id": actor.key_id,
            "who": actor.name,
            "role": actor.role,
            "home": actor.tenant,
            "via": actor.via,
            "address": actor.address,
            "why": actor.why,
            "expected": expected,
        },
    )
    return operation_id


def running_of_key(connection: Connection, key_id: uuid.UUID, verb: Verb) -> uuid.UUID | None:
    """Return the running operation of a key with a verb. Other calls of the key wait.

    Args:
        connection: in a transaction, at whose end another call goes on.
        key_id: the key.
        verb: the verb.
    """
    connection.execute(ONE_AT_A_TIME, {"key_id": str(key_id)})
    found: uuid.UUID | None = connection.execute(
        RUNNING_OF_KEY, {"key_id": key_id, "verb": verb}
    ).scalar()
    return found


def next_operation(connection: Connection) -> OperationRow | None:
    """Return the running operation that has waited longest for its turn."""
    return row_of(connection.execute(NEXT), OperationRow)


def advance(
    connection: Connection,
    operation: OperationRow,
    at: tuple[datetime, uuid.UUID],
    outcome: Outcome,
    problem: str | None = None,
) -> bool:
    """Count a job that was handled, in the transaction that handled it.

    Args:
        connection: in that transaction.
        operation: the operation, as it was before.
        at: time of submission and ID of the job.
        outcome: what became of it.
        problem: the reason of a failure.

    Returns:
        False if it was stopped, or another janitor handles it. Roll the transaction back.
    """
    counts = {"done": 0, "skipped": 0, "failed": 0, outcome: 1}
    places = {"before": operation.at_id, "at_time": at[0], "at_id": at[1]}
    values = {"id": operation.id, "problem": problem, **counts, **places}
    return connection.execute(ADVANCE, values).rowcount > 0


def still_at(connection: Connection, operation: OperationRow) -> bool:
    """Return False if an operation was stopped, or another janitor handles it.

    Args:
        connection: in a transaction, until whose end nobody stops it.
        operation: the operation, as it was before.
    """
    values = {"id": operation.id, "before": operation.at_id}
    return connection.execute(STILL_AT, values).rowcount > 0


def put_last(connection: Connection, operation_id: uuid.UUID) -> None:
    """Let the other operations have their turn first."""
    connection.execute(PUT_LAST, {"id": operation_id})


def end(connection: Connection, operation_id: uuid.UUID, state: State) -> bool:
    """End an operation: all jobs are handled, or somebody stops it. False: it had ended."""
    return connection.execute(END, {"id": operation_id, "state": state}).rowcount > 0


def stop_of_key(connection: Connection, key_id: uuid.UUID) -> int:
    """Stop the running operations that a key started. Return how many."""
    return connection.execute(STOP_OF_KEY, {"key_id": key_id}).rowcount


def list_operations(
    connection: Connection,
    *,
    tenant_id: uuid.UUID | None,
    limit: int,
    after: uuid.UUID | None = None,
) -> list[OperationRow]:
    """Read a page of the operations on a tenant's jobs, or of all (None), newest first."""
    asked = {"tenant_id": tenant_id, "after": after}
    values = {name: value for name, value in asked.items() if value is not None}
    return rows_of(connection.execute(listing(values), {**values, "limit": limit}), OperationRow)


def find_operation(
    connection: Connection, operation_id: uuid.UUID, tenant_id: uuid.UUID | None
) -> OperationRow | None:
    """Read an operation on a tenant's jobs, or any (None)."""
    values: dict[str, Any] = {"id": operation_id, "limit": 1}
    if tenant_id is not None:
        values["tenant_id"] = tenant_id
    return row_of(connection.execute(listing(values), values), OperationRow)


def listing(names: Any) -> TextClause:
    """Return the statement that lists operations by these fields of CONDITIONS."""
    conditions = [CONDITIONS[name] for name in names if name in CONDITIONS]
    return text(f"""
SELECT {COLUMNS} FROM operations o WHERE {" AND ".join(conditions or ["true"])}
ORDER BY o.created_at DESC, o.id DESC LIMIT :limit
""")  # noqa: S608 - constants only


def prune(connection: Connection, days: float, limit: int) -> None:
    """Delete up to `limit` operations of more than `days` ago that have ended. 0: none."""
    if days > 0:
        connection.execute(PRUNE, {"seconds": days * DAY_SECONDS, "limit": limit})
