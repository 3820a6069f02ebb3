"""Migrations: upgrade the database to this version's schema, and refuse an incompatible one.

Steps form one chain. A `pre` step only adds, so the version before it can still work. A `post` step
removes or restricts, so only code that knows it may work. The newest post step that was applied is
the database's floor. It is stored in the comment of alembic's table.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from itertools import takewhile
from pathlib import Path

import alembic.command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, MetaData, Table, text
from sqlalchemy.schema import DropTableComment, SetTableComment
from tenacity import Retrying, retry_if_exception, wait_fixed

import migrations
from farm.errors import FarmError, InvalidRequest, Unavailable
from farm.process import version
from farm.store import workers
from farm.store.actions import FARM, record
from farm.store.engine import Store, transaction

log = logging.getLogger(__name__)

FOLDER = Path(migrations.__file__).parent

# A step may take long, and so may waiting for the step of another process.
NO_LIMIT = text(
    "SET LOCAL statement_timeout = 0; SET LOCAL idle_in_transaction_session_timeout = 0"
)
LOCK_SECONDS = 2
LOCK_TIMEOUT = text(f"SET LOCAL lock_timeout = '{LOCK_SECONDS}s'")
PAUSE_SECONDS = 3.0
"""Pause between two tries, in seconds. Queries that waited are answered in it."""
LOCK_NOT_AVAILABLE, DEADLOCK = "55P03", "40P01"
LOCK = text("SELECT pg_advisory_xact_lock(hashtextextended('migrations', 0))")
HAS_LANES = text("""
SELECT EXISTS (SELECT FROM pg_attribute
               WHERE attrelid = to_regclass('actions') AND attname = 'lane' AND NOT attisdropped)
""")
GROUPS = "0048"
"""After this step no older version runs, which would claim a job with groups in a wrong order."""
HAS_ROLE = text("SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = :role)")
FLOOR = text("SELECT obj_description(to_regclass('alembic_version'), 'pg_class')")


class SchemaRefused(FarmError):
    """This version cannot work on the database. The message says what to do."""

    code = "schema_refused"
    status = 503


class Stage(StrEnum):
    """Time of a step: before new code starts, or after the last old process has ended."""

    PRE = "pre"
    POST = "post"


@dataclass(frozen=True)
class Step:
    """One file of migrations/versions."""

    revision: str
    stage: Stage


@dataclass(frozen=True)
class Upgrade:
    """Result of an upgrade: the steps applied and the steps left for later, by revision."""

    applied: list[str]
    left: list[str]


@dataclass(frozen=True)
class _Place:
    """State of a database: its last step, and the newest of its post steps."""

    at: str | None
    floor: str | None


@cache
def steps(folder: Path = FOLDER) -> tuple[Step, ...]:
    """Read this version's steps, oldest first."""
    scripts = [*ScriptDirectory.from_config(_config(folder)).walk_revisions()]
    return tuple(Step(script.revision, Stage(script.module.stage)) for script in scripts[::-1])


def require_schema(store: Store, folder: Path = FOLDER) -> None:
    """Return if this version can work on the database: it has every pre step, no unknown post step.

    Raises:
        SchemaRefused: the database is older than this version needs, or a newer version made a
            change that this version cannot handle.
        Unavailable: Postgres cannot be reached.
    """
    with transaction(store) as connection:
        place = _place(connection)
    missing = _missing(steps(folder), place)
    while missing and missing[-1].stage is Stage.POST:
        missing.pop()
    if missing:
        raise SchemaRefused(_older(missing))


def require_groups(connection: Connection) -> None:
    """Return if lines of an input may have settings: no older version runs that knows none.

    Raises:
        SchemaRefused: processes of an older version may still run.
    """
    floor = connection.execute(FLOOR).scalar_one()
    if floor is None or floor < GROUPS:
        raise SchemaRefused(
            "input: lines with parameters are accepted once the farm's upgrade is complete. Try "
            "again later. An operator completes it: run `farm migrate` once no older version runs."
        )


def upgrade(store: Store, *, pre_only: bool = False, folder: Path = FOLDER) -> Upgrade:
    """Apply the missing steps, each in its own transaction. Two callers take turns.

    `pre_only` stops before the first post step, so that an older version can keep running. An empty
    database, on which nothing runs, still gets every step, in one transaction.

    A step waits LOCK_SECONDS at most for a lock, since every query behind it waits too. Then it is
    rolled back, and tried again after a pause. A post step is refused while a worker of another
    version is alive: that version might not work after it.

    Raises:
        SchemaRefused: a newer version made a change that this version cannot handle, the database
            is older than the first step, or a worker of another version is alive.
        Unavailable: Postgres cannot be reached.
    """
    chain = steps(folder)
    with transaction(store) as turn:
        turn.execute(NO_LIMIT)
        turn.execute(LOCK)
        place = _place(turn)
        missing = wanted = _missing(chain, place)
        if place.at is None:
            _apply(store, wanted[-1:], folder)
        else:
            if pre_only:
                wanted = list(takewhile(lambda step: step.stage is Stage.PRE, missing))
            for step in wanted:
                if step.stage is Stage.POST:
                    _require_one_version(store, step)
                _apply(store, [step], folder)
    revisions = [step.revision for step in missing]
    return Upgrade(revisions[: len(wanted)], revisions[len(wanted) :])


def _require_one_version(store: Store, step: Step) -> None:
    with transaction(store) as connection:
        others = workers.of_other_versions(connection)
    if others:
        first = others[0]
        more = f", and {len(others) - 1} more" if len(others) > 1 else ""
        raise SchemaRefused(
            f"Step {step.revision} needs workers of one version, {version()}. Worker {first.name} "
            f"runs version {first.version or 'unknown'}{more}. Replace them, then run "
            "`farm migrate` again."
        )


def grant_scaling(store: Store, role: str) -> None:
    """Let a role of Postgres read the view `scaling`, and nothing else of the farm.

    Raises:
        InvalidRequest: there is no such role.
    """
    with transaction(store) as connection:
        if not connection.execute(HAS_ROLE, {"role": role}).scalar_one():
            raise InvalidRequest(
                f"--grant-scaling: Postgres has no role {role!r}. Create it first: "
                f"CREATE ROLE {role} LOGIN PASSWORD '…'"
            )
        quoted = connection.dialect.identifier_preparer.quote_identifier(role)
        connection.execute(text(f"GRANT SELECT ON scaling TO {quoted}"))


def _apply(store: Store, upto: Sequence[Step], folder: Path) -> None:
    """Apply all steps up to the given one, in one transaction, as soon as its locks are free."""
    tries = Retrying(
        retry=retry_if_exception(_waited_for_lock),
        wait=wait_fixed(PAUSE_SECONDS),
        before_sleep=lambda _: log.warning(
            "A migration step could not get a lock that another query holds. Next try in %g s",
            PAUSE_SECONDS,
        ),
        reraise=True,
    )
    for step in upto:
        tries(_apply_once, store, step, folder)


def _apply_once(store: Store, step: Step, folder: Path) -> None:
    with transaction(store) as connection:
        connection.execute(NO_LIMIT)
        connection.execute(LOCK_TIMEOUT)
        config = _config(folder)
        config.attributes["connection"] = connection
        alembic.command.upgrade(config, step.revision)
        _write_floor(connection, steps(folder))
        if connection.execute(HAS_LANES).scalar_one():
            record(connection, FARM, "schema.upgrade", "schema", f"step {step.revision}", "")


def _waited_for_lock(error: BaseException) -> bool:
    cause = error.__cause__ if isinstance(error, Unavailable) else error
    state = getattr(getattr(cause, "orig", None), "sqlstate", None)
    return state in (LOCK_NOT_AVAILABLE, DEADLOCK)


def downgrade(store: Store, revision: str = "base", *, folder: Path = FOLDER) -> None:
    """Revert steps down to `revision`. Tables and data that they added are lost."""
    with _alone(store, folder) as (connection, config):
        alembic.command.downgrade(config, revision)
        _write_floor(connection, steps(folder))


def check(store: Store) -> None:
    """Compare the database with the tables of farm.store.schema.

    Raises:
        alembic.util.AutogenerateDiffsDetected: they differ.
    """
    with _alone(store, FOLDER) as (_, config):
        alembic.command.check(config)


def new_step(store: Store, message: str) -> None:
    """Write a migration from the database's tables to those of farm.store.schema."""
    with _alone(store, FOLDER) as (_, config):
        alembic.command.revision(config, message, autogenerate=True)


@contextmanager
def _alone(store: Store, folder: Path) -> Iterator[tuple[Connection, Config]]:
    """Run a block of alembic's commands in one transaction, while no other process migrates."""
    with transaction(store) as connection:
        connection.execute(NO_LIMIT)
        connection.execute(LOCK)
        config = _config(folder)
        config.attributes["connection"] = connection
        yield connection, config


def _config(folder: Path) -> Config:
    config = Config()
    config.set_main_option("script_location", str(folder))
    return config


def _place(connection: Connection) -> _Place:
    at = MigrationContext.configure(connection).get_current_revision()
    return _Place(at, connection.execute(FLOOR).scalar_one())


def _write_floor(connection: Connection, chain: Sequence[Step]) -> None:
    missing = _missing(chain, _place(connection))
    applied = chain[: len(chain) - len(missing)]
    floor = [step.revision for step in applied if step.stage is Stage.POST][-1:]
    table = Table("alembic_version", MetaData(), comment="".join(floor))
    connection.execute(SetTableComment(table) if floor else DropTableComment(table))


def _missing(chain: Sequence[Step], place: _Place) -> list[Step]:
    """List the steps that a database lacks. Empty if a newer version has applied more steps.

    Raises:
        SchemaRefused: that version applied a post step, or the database is older than the first
            step.
    """
    known = [step.revision for step in chain]
    # Revisions are numbers of four digits.
    if place.at is not None and place.at < known[0]:
        raise SchemaRefused(
            f"The database has step {place.at}, of a version before the first release, "
            "and cannot be upgraded. Use an empty database, or run the version that made this one."
        )
    if place.floor is not None and place.floor not in known:
        raise SchemaRefused(
            f"The database has step {place.floor}, which only newer versions of the farm support. "
            "Run one of them."
        )
    if place.at is None:
        return list(chain)
    return list(chain[known.index(place.at) + 1 :]) if place.at in known else []


def _older(missing: Sequence[Step]) -> str:
    lacks = f"The database lacks step {missing[-1].revision}, which this version of the farm needs"
    between = [step.revision for step in missing if step.stage is Stage.POST]
    if between:
        return (
            f"{lacks}. Older versions cannot use step {between[-1]} before it. "
            "Stop their processes, then run `farm migrate`."
        )
    return f"{lacks}. Run `farm migrate`, or `farm migrate --pre` while an older version runs."
