"""What `farm doctor` looks at: each check on its own, so that one failure hides no other."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path

from farm.bells import Bells
from farm.cli.client.http import FarmClient
from farm.cli.terminal.console import duration, plural
from farm.config import ENV_FILE, Settings
from farm.errors import CatalogError, FarmError, Unavailable
from farm.pipelines.catalog import Pipeline, load_catalog
from farm.pipelines.resolve import resolve_pipeline
from farm.pipelines.runtime.devices import device_name, device_of
from farm.storage import Artifacts
from farm.store import workers
from farm.store.engine import Store, require_sessions, server_clock, server_place, transaction
from farm.store.leadership import leadership
from farm.store.migrate import require_schema

SKEW_SECONDS = 5.0
"""How far the clocks may differ: leases run on Postgres's, signatures and people on this one."""


@dataclass(frozen=True)
class Finding:
    """What a check found."""

    name: str
    ok: bool | None
    """None: it could not be looked at, since what it needs failed"""
    detail: str
    mend: str = ""
    """What to do where something is wrong"""


class Wrong(FarmError):
    """Something is wrong that the check's own advice does not mend."""

    def __init__(self, message: str, mend: str) -> None:
        super().__init__(message)
        self.mend = mend


@dataclass(frozen=True)
class Check:
    """One thing to look at."""

    name: str
    look: Callable[[], str]
    """Returns what is there; whatever it raises says what is wrong"""
    mend: str
    needs: str = ""
    """The check that must have passed for this one to mean anything"""

    def run(self, passed: Collection[str]) -> Finding:
        """Look, unless what it needs is not among the checks that `passed`."""
        if self.needs and self.needs not in passed:
            return Finding(self.name, ok=None, detail=f"not looked at: it needs {self.needs}")
        try:
            return Finding(self.name, ok=True, detail=self.look())
        except Exception as error:
            message = error.message if isinstance(error, FarmError) else f"{error}"
            detail = " ".join(message.split()) or type(error).__name__
            mend = error.mend if isinstance(error, Wrong) else self.mend
            return Finding(self.name, ok=False, detail=detail, mend=mend)


def all_checks(settings: Settings, store: Store) -> Iterator[Check]:
    """Yield every check; those of the pipelines follow from what stands in the catalog."""
    data = os.environ.get("FARM_DATA", "DIR")
    up = f"`farm up --data {data}` starts it; elsewhere, see"
    aws = "FARM_S3_ENDPOINT_URL, FARM_S3_BUCKET and AWS_*"
    clocks = "Let this machine follow a time server (NTP)."
    yield Check("settings", _settings, f"`farm up --data {data}` makes the folder.")
    yield Check("postgres", partial(_postgres, store), f"{up} FARM_DATABASE_URL.")
    yield Check("schema", partial(_schema, store), "Run `farm migrate`.", "postgres")
    yield Check("clock", partial(_clock, store), clocks, "postgres")
    yield Check("redis", partial(_redis, settings), f"{up} FARM_REDIS_URL.")
    yield Check("s3", partial(_s3, settings), f"{up} {aws}.")
    yield Check("api", partial(_api, settings), f"{up} FARM_API_URL and FARM_API_KEY.")
    yield Check("janitor", partial(_janitor, store), "Start one: `farm janitor`.", "postgres")
    yield Check("torch", _torch, "Install the farm again, with constraints.txt.")
    yield Check("catalog", partial(_catalog, settings), "FARM_PIPELINES names pipelines.toml.")
    yield from _pipeline_checks(settings, store)


def _pipeline_checks(settings: Settings, store: Store) -> Iterator[Check]:
    try:
        pipelines = load_catalog(settings.pipelines).pipelines
    except CatalogError:  # its own check says so
        return
    for name, entry in pipelines.items():
        look = partial(_pipeline, name, entry)
        yield Check(f"pipeline {name}", look, f"See its entry in {settings.pipelines}.")
        look = partial(_workers, store, settings, name)
        yield Check(f"workers {name}", look, f"Start one: `farm worker {name}`.", "schema")


def _settings() -> str:
    data = os.environ.get("FARM_DATA")
    if not data:
        return "FARM_* variables; FARM_DATA is not set"
    if not (Path(data) / ENV_FILE).is_file():
        raise FarmError(f"FARM_DATA is {data}, which holds no {ENV_FILE}.")
    return str(Path(data) / ENV_FILE)


def _postgres(store: Store) -> str:
    try:
        place = server_place(store)
    except Unavailable as error:
        # What libpq or a pooler says is for operators: it names hosts and users.
        cause = str(getattr(error.__cause__, "orig", None) or "").strip().partition("\n")[0]
        raise Unavailable(f"{error.message} {cause}".strip()) from error
    require_sessions(store)
    return f"answers at {place}"


def _schema(store: Store) -> str:
    require_schema(store)
    return "at this version's"


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
                raise FarmError("It gives back other bytes than it was given.")
        finally:
            artifacts.delete_all([key])  # as the janitor deletes
    return f"bucket {settings.s3_bucket} stores, gives and deletes"


def _api(settings: Settings) -> str:
    with FarmClient.of(settings) as client:
        client.get("/readyz")
        client.get("/v1/workers")
    return f"ready at {settings.api_url}, and takes the key"


CLOSE_SECONDS = 10.0


def _janitor(store: Store) -> str:
    with leadership(store, CLOSE_SECONDS) as lead:
        if lead is not None:
            raise FarmError("No janitor is alive: lost work is not taken up again.")
    return "one leads"


def _torch() -> str:
    device = device_of(Pipeline(source="any"))
    return f"{metadata.version('torch')} on {device_name(device)}"


def _catalog(settings: Settings) -> str:
    names = load_catalog(settings.pipelines).pipelines
    return f"{settings.pipelines}: {', '.join(names)}"


def _pipeline(name: str, entry: Pipeline) -> str:
    resolved = resolve_pipeline(name, entry)
    return f"{resolved.family.name} from {entry.checkpoint}"


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
            "Mend what it says. Its workers try again by themselves.",
        )
    return ", ".join(f"{row.name} {row.state}" for row in able)
