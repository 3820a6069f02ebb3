"""Leadership: one of several janitors works, under a lock that ends with its connection."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from farm.errors import Unavailable
from farm.store.engine import Store, is_outage

LEAD = text("SELECT pg_try_advisory_lock(hashtextextended('janitor', 0))")

IDLE = text("SELECT set_config('idle_session_timeout', :milliseconds, false)")
IS_LED = text("""
SELECT EXISTS (
    SELECT FROM pg_locks
    WHERE locktype = 'advisory' AND granted AND objsubid = 1
      AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
      AND (classid::bigint << 32) | objid::bigint = hashtextextended('janitor', 0))
""")
STEP_DOWN = text("SELECT pg_advisory_unlock(hashtextextended('janitor', 0))")


def is_led(connection: Connection) -> bool:
    """Return True if a janitor leads. It takes no lock, so it disturbs none."""
    return bool(connection.execute(IS_LED).scalar_one())


@contextmanager
def leadership(store: Store, idle_seconds: float) -> Iterator[Connection | None]:
    """Try to become the leader. Yield the connection with the lock, or None if another leads.

    The leader does all its work through that connection, so a process that lost the lock cannot
    continue. A leader silent for `idle_seconds` was stopped, or its machine is gone: Postgres
    closes the connection.

    Raises:
        Unavailable: Postgres cannot be reached, or the connection broke.
    """
    try:
        with store.connect() as connection:
            # Closed at the end rather than pooled: a pooled connection would keep the lock.
            connection.detach()
            connection.execute(IDLE, {"milliseconds": str(round(idle_seconds * 1000))})
            leads = bool(connection.execute(LEAD).scalar_one())
            connection.commit()
            yield connection if leads else None
            if leads:
                connection.execute(STEP_DOWN)
    except DBAPIError as error:
        if is_outage(error):
            raise Unavailable("Postgres does not answer.") from error
        raise
