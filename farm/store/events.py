"""Events: a log that each transition appends to in its own transaction (an outbox).

The events of one job are in the order of their ids. Each is appended under the job's row lock, so
a lower id was committed before a higher one was generated.
"""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import Connection, text

from farm.store.rows import JsonObject, rows_of

OF_JOB = text("""
SELECT id, at, kind, data FROM events
WHERE job_id = :job_id AND id > :after ORDER BY id LIMIT :limit
""")

# now(), not clock_timestamp(): an index scan needs a value that is constant within a statement.
PRUNE = text("""
WITH old AS MATERIALIZED (
    SELECT id FROM events WHERE at < now() - make_interval(secs => :seconds)
    ORDER BY at LIMIT 10000
)
DELETE FROM events e USING old WHERE e.id = old.id
""")


class EventRow(NamedTuple):
    """An event of the outbox."""

    id: int
    at: datetime
    kind: str
    data: JsonObject


def events_of(
    connection: Connection, job_id: uuid.UUID, *, after: int = 0, limit: int = 1000
) -> list[EventRow]:
    """Read a job's events, oldest first, starting after the id `after`."""
    values = {"job_id": job_id, "after": after, "limit": limit}
    return rows_of(connection.execute(OF_JOB, values), EventRow)


def prune(connection: Connection, days: float) -> int:
    """Delete up to ten thousand events older than `days`. Return the number deleted."""
    return connection.execute(PRUNE, {"seconds": days * 86_400}).rowcount
