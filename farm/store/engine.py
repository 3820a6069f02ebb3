"""Connections to Postgres. The owner of the `Store` decides where a transaction ends."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg
from psycopg.types.json import set_json_loads
from pydantic_core import from_json
from sqlalchemy import Connection as Connection
from sqlalchemy import Engine, ExceptionContext, create_engine, event, text
from sqlalchemy.exc import (
    DBAPIError,
    InterfaceError,
    InvalidatePoolError,
    OperationalError,
    SQLAlchemyError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import ConnectionPoolEntry

from farm.config import Settings
from farm.errors import FarmError, Unavailable

CONNECT_SECONDS = 5
POOL_SIZE = 10
STATEMENT_MILLISECONDS = 30_000
IDLE_SECONDS = 1.0
"""Idle time after which a connection is tested before use, which costs a round trip. Seconds."""
IDLE_IN_TRANSACTION = "25P03"
READ_ONLY = "25006"
"""SQLSTATE of a standby, or of a demoted primary. Another server may be the primary now."""
TRY_AGAIN = {"08", "40", "53", "57", "58"}
"""SQLSTATE classes to retry: connection, rollback (deadlock), resources, operator, system."""

BY_INDEX = """
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_material = off SET enable_sort = off
SET enable_incremental_sort = off
"""
"""Options of routines whose every row is found by a probe of an index, whatever statistics say.

Plans are generic: planning their queries at each call takes longer than running them. A plan may be
minutes old, from a time when a table was empty or nothing was open. So no join and no sort may read
a table or an index from end to end because it looked small then. If there is no other way, Postgres
still does it.

Each query must leave the probe as the only way. `id = ANY (ARRAY[x])` does so. With `id = x`,
Postgres may instead read a whole index in its order for a join, or put all rows of an EXISTS into a
hash table. LIMIT 1 in a LATERAL subquery does so too, and is needed where the rows found are
grouped or sorted.
"""

ROUTINES = "SET LOCAL check_function_bodies = off;\n" + "".join(  # the tables may not exist yet
    (Path(__file__).parent / "sql" / f"{name}.sql")
    .read_text(encoding="utf-8")
    .replace("/* by index */", BY_INDEX)
    for name in ("tally", "claim", "complete", "limits")
)
"""Routines that run with every batch: several statements in one round trip.

They are created in each connection's `pg_temp`, so a process always runs those of its version.
"""

Store = Engine
"""A pool of connections to Postgres."""

Transaction = Connection
"""A connection inside a transaction, as `transaction` yields it."""


def open_store(settings: Settings) -> Store:
    """Open a pool of connections. The first connection is made when it is first needed."""
    address = _checked(settings.database_url.get_secret_value())
    idle = round(settings.transaction_seconds * 1000)
    store = create_engine(
        "postgresql+psycopg://",
        creator=lambda: _connect(address, idle),
        pool_size=POOL_SIZE,
        max_overflow=POOL_SIZE,
        pool_timeout=CONNECT_SECONDS,
        hide_parameters=True,  # they hold prompts, and errors are logged
    )
    event.listen(store, "handle_error", _leave_read_only)
    _try_idle_ones(store)
    return store


def _checked(address: str) -> str:
    """Refuse an address that libpq cannot read. libpq's message may contain the password."""
    try:
        ports = str(psycopg.conninfo.conninfo_to_dict(address).get("port") or "")
    except psycopg.ProgrammingError:
        ports = "unknown"
    if not ports.replace(",", "0").isdigit() and ports:
        raise FarmError(
            "FARM_DATABASE_URL: not a Postgres address. Use the form "
            "postgresql://USER:PASSWORD@HOST:PORT/NAME, "
            "for example postgresql://farm:secret@127.0.0.1:5432/farm."
        )
    return address


def _connect(address: str, idle_milliseconds: int) -> psycopg.Connection[Any]:
    """Connect through libpq, which accepts several hosts, and set up the session.

    Settings are SET, since a pooler in front of Postgres does not pass on `options`.
    """
    connection = psycopg.connect(
        address,
        target_session_attrs="read-write",
        connect_timeout=CONNECT_SECONDS,
        application_name="farm",
        # A half-open connection is noticed within a quarter of a minute.
        keepalives_idle=5,
        keepalives_interval=3,
        keepalives_count=3,
        tcp_user_timeout=15_000,
    )
    set_json_loads(from_json, connection)
    try:
        # A process stopped in the middle of a claim must not hold the lane's lock forever.
        connection.execute(
            f"SET statement_timeout = {STATEMENT_MILLISECONDS}; SET timezone = 'UTC';"
            f"SET idle_in_transaction_session_timeout = {idle_milliseconds};{ROUTINES}".encode()
        )
        connection.commit()
    except BaseException:
        connection.close()
        raise
    return connection


def _leave_read_only(context: ExceptionContext) -> None:
    """Drop every connection to a server that takes no writes: all of them are useless."""
    if getattr(context.original_exception, "sqlstate", None) == READ_ONLY:
        context.is_disconnect = True


def _try_idle_ones(store: Engine) -> None:
    def before(connection: Any, record: ConnectionPoolEntry, _proxy: object) -> None:
        used = record.info.pop("used", None)
        if used is None or time.monotonic() - used < IDLE_SECONDS:
            return
        try:
            store.dialect.do_ping(connection)
        except Exception as error:
            raise InvalidatePoolError from error

    def after(_connection: Any, record: ConnectionPoolEntry) -> None:
        record.info["used"] = time.monotonic()

    event.listen(store, "checkout", before)
    event.listen(store, "checkin", after)


@contextmanager
def transaction(store: Store) -> Iterator[Connection]:
    """Run a block in one transaction. Commit at its end, or roll back on an exception.

    Raises:
        Unavailable: Postgres cannot be reached, or the connection broke. Nothing was committed,
            unless it broke before the reply to COMMIT arrived. Every write after a claim is
            fenced, so a retry is safe. For the claim itself see release_unknown.
    """
    with _telling_outages() as began, store.begin() as connection:
        began.append(connection)
        yield connection


@contextmanager
def one_statement(store: Store) -> Iterator[Connection]:
    """Run a block of one statement with autocommit: one round trip instead of three.

    Raises:
        Unavailable: as `transaction` does.
    """
    with _telling_outages() as began, store.connect() as connection:
        began.append(connection)
        yield connection.execution_options(isolation_level="AUTOCOMMIT")


@contextmanager
def reads(store: Store) -> Iterator[Connection]:
    """Run a block that only reads. Each statement sees the data committed before it begins.

    A transaction would see no more, and would cost two more round trips.

    Raises:
        Unavailable: as `transaction` does.
    """
    with one_statement(store) as connection:
        yield connection


@contextmanager
def _telling_outages() -> Iterator[list[Connection]]:
    """Raise Unavailable for an outage. It is undecided once a connection is in the list."""
    began: list[Connection] = []
    try:
        yield began
    except DBAPIError as error:
        if is_outage(error):
            outage = Unavailable("Postgres does not answer.")
            outage.is_undecided = bool(began)
            raise outage from error
        raise
    except PoolTimeout as error:
        message = "Every connection to Postgres is in use. Try again in a few seconds."
        raise Unavailable(message) from error


def is_outage(error: Exception) -> bool:
    """Return True if an error means that Postgres was away, not that the statement was wrong."""
    if not isinstance(error, DBAPIError):
        return False
    state = getattr(error.orig, "sqlstate", None)
    if state in {IDLE_IN_TRANSACTION, READ_ONLY}:
        return True
    if not isinstance(error, OperationalError | InterfaceError):
        return False
    return error.connection_invalidated or state is None or state[:2] in TRY_AGAIN


def require_writes(store: Store) -> None:
    """Return if Postgres takes writes.

    Raises:
        Unavailable: it does not, or cannot be reached.
    """
    with reads(store) as connection:
        if connection.execute(text("SHOW transaction_read_only")).scalar_one() == "on":
            connection.invalidate()
            raise Unavailable("Postgres is read-only. Connect the farm to the primary server.")


def tells_statements(error: Exception) -> bool:
    """Return True if an error's text contains SQL and parameters, which only operators may see."""
    return isinstance(error, SQLAlchemyError)


def server_place(store: Store) -> str:
    """Return `host:port` of the Postgres server that answers.

    Raises:
        Unavailable: no server answers. Its cause is libpq's error.
    """
    with transaction(store) as connection:
        info = connection.connection.driver_connection.info  # type: ignore[union-attr]  # psycopg's
        return f"{info.host}:{info.port}"


def require_sessions(store: Store) -> None:
    """Return if each connection has its own Postgres session.

    Raises:
        FarmError: a pooler shares one session among several connections, so they share settings.
            No claim can work then, and a stopped process would keep its locks.
        Unavailable: Postgres cannot be reached.
    """
    with _telling_outages(), store.connect() as one, store.connect() as other:
        one.execute(text("SET farm.probe = 'set'"))
        one.commit()
        probe = text("SELECT current_setting('farm.probe', true)")
        if other.execute(probe).scalar_one() == "set":
            raise FarmError(
                "A pooler in front of Postgres shares one session among several connections. "
                "Set it to session pooling (PgBouncer: pool_mode = session)."
            )
        one.execute(text("RESET farm.probe"))
        one.commit()


def server_clock(store: Store) -> datetime:
    """Read Postgres's clock.

    Raises:
        Unavailable: Postgres cannot be reached.
    """
    with transaction(store) as connection:
        now: datetime = connection.execute(text("SELECT clock_timestamp()")).scalar_one()
    return now
