"""The connection to Postgres. Whoever holds the `Store` decides where a transaction ends."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy import Connection as Connection
from sqlalchemy import Engine, ExceptionContext, create_engine, event, text
from sqlalchemy import Row as Row
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
"""A connection left alone for longer is tried before it is used: one more round trip."""
IDLE_IN_TRANSACTION = "25P03"
READ_ONLY = "25006"
"""A standby, or a primary that became one: another server may be the primary now"""
TRY_AGAIN = {"08", "40", "53", "57", "58"}
"""SQLSTATE classes: connection, rollback (a deadlock's victim), resources, operator, its system."""

ROUTINES = "SET LOCAL check_function_bodies = off;\n" + "".join(  # the tables may not be there yet
    (Path(__file__).parent / "sql" / f"{name}.sql").read_text(encoding="utf-8")
    for name in ("tally", "claim", "complete")
)
"""What takes several statements and is asked for with every batch: one round trip each. They live
in each connection's `pg_temp`, so that a process always runs those of its own version."""

Store = Engine
"""A pool of connections to Postgres."""

Transaction = Connection
"""A connection inside a transaction: what `transaction` gives."""


def open_store(settings: Settings) -> Store:
    """Open a pool of connections; the first one is made when it is first needed."""
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
    """Refuse what libpq cannot read; its own message may hold the password."""
    try:
        ports = str(psycopg.conninfo.conninfo_to_dict(address).get("port") or "")
    except psycopg.ProgrammingError:
        ports = "unknown"
    if not ports.replace(",", "0").isdigit() and ports:
        raise FarmError(
            "FARM_DATABASE_URL is no address that libpq reads; its form is "
            "postgresql://USER:PASSWORD@HOST:PORT/NAME."
        )
    return address


def _connect(address: str, idle_milliseconds: int) -> psycopg.Connection[Any]:
    """Connect as libpq does, which knows several hosts, and make the session the farm's.

    Its settings are SET: a pooler between here and Postgres knows no `options`.
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
    try:
        # A process stopped in the middle of a claim must not hold the lane's lock for ever.
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
    """Drop every connection to a server that takes no writes: none of them will do any more."""
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
    """Run a block in one transaction, committed at its end and rolled back by an exception.

    Raises:
        Unavailable: Postgres cannot be reached, or the connection broke. Nothing was committed,
            unless it broke while the answer to COMMIT was on its way. Every write after a claim
            is fenced, so trying it again is safe; see release_unknown for the claim itself.
    """
    with _telling_outages(), store.begin() as connection:
        yield connection


@contextmanager
def one_statement(store: Store) -> Iterator[Connection]:
    """Run a block of one statement, committed by itself: one round trip rather than three.

    Raises:
        Unavailable: as `transaction` does.
    """
    with _telling_outages(), store.connect() as connection:
        yield connection.execution_options(isolation_level="AUTOCOMMIT")


@contextmanager
def reads(store: Store) -> Iterator[Connection]:
    """Run a block that only reads; each statement sees what is committed when it begins.

    A transaction would see no more, and cost two round trips.

    Raises:
        Unavailable: as `transaction` does.
    """
    with one_statement(store) as connection:
        yield connection


@contextmanager
def _telling_outages() -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        if is_outage(error):
            raise Unavailable("Postgres does not answer.") from error
        raise
    except PoolTimeout as error:
        raise Unavailable("Every connection to Postgres is in use.") from error


def is_outage(error: DBAPIError) -> bool:
    """Whether an error means that Postgres was away, rather than that the statement was wrong."""
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
            raise Unavailable("Postgres takes no writes: it is read-only.")


def tells_statements(error: Exception) -> bool:
    """Whether an error's text holds SQL and its parameters: for operators alone."""
    return isinstance(error, SQLAlchemyError)


def server_place(store: Store) -> str:
    """Tell the host and port of the Postgres that answers.

    Raises:
        Unavailable: none does; its cause is what libpq says.
    """
    with transaction(store) as connection:
        info = connection.connection.driver_connection.info  # type: ignore[union-attr]  # psycopg's
        return f"{info.host}:{info.port}"


def require_sessions(store: Store) -> None:
    """Return if each connection has a session of Postgres for itself.

    Raises:
        FarmError: a pooler gives one session to several connections, so what one sets, another
            has: no claim can work, and no stopped process would lose its locks.
        Unavailable: Postgres cannot be reached.
    """
    with _telling_outages(), store.connect() as one, store.connect() as other:
        one.execute(text("SET farm.probe = 'set'"))
        one.commit()
        probe = text("SELECT current_setting('farm.probe', true)")
        if other.execute(probe).scalar_one() == "set":
            raise FarmError(
                "A pooler in front of Postgres shares sessions among connections. Let it pool "
                "sessions (PgBouncer: pool_mode = session)."
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
