"""Checks of the servers and processes that the farm depends on. Each runs separately.

`farm doctor` and the page of the system show them.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

from farm.bells import Bells
from farm.config import Settings
from farm.errors import FarmError, Unavailable
from farm.humanize import duration, plural
from farm.storage import Artifacts
from farm.store import webhooks, workers
from farm.store.engine import (
    Store,
    reads,
    require_sessions,
    server_clock,
    server_place,
    transaction,
)
from farm.store.leadership import is_led
from farm.store.migrate import require_schema

SKEW_SECONDS = 5.0
"""Maximum difference of the clocks, in seconds.

Leases use Postgres's clock. Signatures and times shown to people use this machine's.
"""


@dataclass(frozen=True)
class Finding:
    """Result of a check."""

    name: str
    ok: bool | None
    """True if passed, False if failed, None if skipped because a check that it needs failed."""
    detail: str
    remedy: str = ""
    """Advice for a failure, or empty."""


class Wrong(FarmError):
    """A failure whose remedy differs from the check's own."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message)
        self.remedy = remedy


@dataclass(frozen=True)
class Check:
    """One check."""

    name: str
    look: Callable[[], str]
    """Function that returns a description of what it found, or raises what is wrong."""
    remedy: str
    needs: str = ""
    """Name of the check that must pass before this one can run."""

    def run(self, passed: Collection[str]) -> Finding:
        """Run the check, or skip it if the check that it needs is not in `passed`."""
        if self.needs and self.needs not in passed:
            return Finding(self.name, ok=None, detail=f"skipped: it needs {self.needs}")
        try:
            return Finding(self.name, ok=True, detail=self.look())
        except Exception as error:
            message = error.message if isinstance(error, FarmError) else f"{error}"
            detail = " ".join(message.split()) or type(error).__name__
            remedy = error.remedy if isinstance(error, Wrong) else self.remedy
            return Finding(self.name, ok=False, detail=detail, remedy=remedy)


def server_checks(settings: Settings, store: Store) -> Iterator[Check]:
    """Yield the checks of the servers, the janitor and the courier."""
    up, aws = elsewhere(), "FARM_S3_ENDPOINT_URL, FARM_S3_BUCKET and AWS_*"
    clocks = "Set this machine's clock by a time server (NTP)."
    yield Check("postgres", partial(_postgres, store), f"{up} FARM_DATABASE_URL.")
    yield Check("schema", partial(_schema, store), "Run `farm migrate`.", "postgres")
    yield Check("clock", partial(_clock, store), clocks, "postgres")
    yield Check("redis", partial(_redis, settings), f"{up} FARM_REDIS_URL.")
    yield Check("s3", partial(_s3, settings), f"{up} {aws}.")
    yield Check("janitor", partial(_janitor, store), "Start one: `farm janitor`.", "postgres")
    yield Check("courier", partial(_courier, store), "Start one: `farm courier`.", "schema")


def elsewhere() -> str:
    """Return the beginning of the remedy for a server that does not answer."""
    data = os.environ.get("FARM_DATA", "DIR")
    return f"Start it with `farm up --data {data}`. If it runs elsewhere, set"


def workers_check(settings: Settings, store: Store, pipeline: str) -> Check:
    """Return the check of a pipeline's workers."""
    look = partial(_workers, store, settings, pipeline)
    return Check(f"workers {pipeline}", look, f"Start one: `farm worker {pipeline}`.", "schema")


def findings(
    checks: Iterator[Check],
    during: Callable[[str], AbstractContextManager[object]] = lambda _name: nullcontext(),
) -> Iterator[Finding]:
    """Run checks, in their order. Those that need one that failed are skipped.

    Args:
        checks: the checks.
        during: returns what surrounds a check of this name, such as a spinner.
    """
    passed: set[str] = set()
    for check in checks:
        with during(check.name):
            finding = check.run(passed)
        if finding.ok:
            passed.add(finding.name)
        yield finding


def _postgres(store: Store) -> str:
    try:
        place = server_place(store)
    except Unavailable as error:
        # The message of libpq or a pooler names hosts and users: only operators see it.
        cause = str(getattr(error.__cause__, "orig", None) or "").strip().partition("\n")[0]
        raise Unavailable(f"{error.message} {cause}".strip()) from error
    require_sessions(store)
    return f"answers at {place}"


def _schema(store: Store) -> str:
    require_schema(store)
    return "matches this version"


def _clock(store: Store) -> str:
    before = datetime.now(UTC)
    there = server_clock(store)
    middle = before + (datetime.now(UTC) - before) / 2
    skew = abs((there - middle).total_seconds())
    if skew > SKEW_SECONDS:
        raise FarmError(f"This machine's clock and Postgres's differ by {duration(skew)}.")
    return f"{duration(skew)} from Postgres's"


def _redis(settings: Settings) -> str:
    with closing(Bells(settings)) as bells:
        if not bells.answers():
            raise Unavailable("It does not answer, or refuses the password.")
    return "answers"


def _s3(settings: Settings) -> str:
    key, content = f"doctor/{secrets.token_hex(8)}", secrets.token_bytes(16)
    with closing(Artifacts(settings)) as artifacts:
        artifacts.put(key, content)
        try:
            if artifacts.get(key) != content:
                raise FarmError("The bytes read back differ from the bytes written.")
        finally:
            artifacts.delete_all([key])  # the call that the janitor uses
    return f"bucket {settings.s3_bucket} can be written, read and deleted from"


def _janitor(store: Store) -> str:
    with reads(store) as connection:
        led = is_led(connection)
    if not led:
        raise FarmError("No janitor is alive, so lost frames are not rendered again.")
    return "one is active"


COURIER_SECONDS = 60.0
"""Time after which work that waits for a courier shows that none is alive, in seconds."""


def _courier(store: Store) -> str:
    with reads(store) as connection:
        lag = webhooks.lag(connection)
    if lag > COURIER_SECONDS:
        raise FarmError(f"Messages to webhooks have waited {duration(lag)}: no courier is alive.")
    return "nothing waits to be delivered"


def _workers(store: Store, settings: Settings, name: str) -> str:
    now = server_clock(store)
    with transaction(store) as connection:
        found = [row for row in workers.list_workers(connection) if row.pipeline == name]
    alive = [
        row
        for row in found
        if (now - row.seen_at).total_seconds() < settings.worker_timeout_seconds
    ]
    if not alive:
        raise FarmError(f"No worker for pipeline {name} is alive.")
    able = [row for row in alive if row.state != "failed"]
    if not able:
        raise Wrong(
            f"{plural(len(alive), 'worker')} failed to load it: {alive[0].problem}",
            "Correct that problem. The workers then try again by themselves.",
        )
    return ", ".join(f"{row.name} {row.state}" for row in able)
