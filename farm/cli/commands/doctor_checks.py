"""The checks of `farm doctor`. Each runs separately, so that one failure hides no other."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, partial
from importlib import metadata
from pathlib import Path

from farm.bells import Bells
from farm.cli.client.http import FarmClient
from farm.config import ENV_FILE, Settings
from farm.errors import CatalogError, FarmError, Unavailable
from farm.humanize import duration, plural, size
from farm.pipelines.catalog import Pipeline, load_catalog
from farm.pipelines.resolve import resolve_pipeline, uses_gpu
from farm.pipelines.runtime.devices import device_name, device_of
from farm.pipelines.runtime.gpus import Gpu, device_bytes, list_gpus
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
from farm.store.leadership import leadership
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
    """One check of `farm doctor`."""

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


def all_checks(settings: Settings, store: Store) -> Iterator[Check]:
    """Yield every check, including those for each pipeline of the catalog."""
    data = os.environ.get("FARM_DATA", "DIR")
    up = f"Start it with `farm up --data {data}`. If it runs elsewhere, set"
    aws = "FARM_S3_ENDPOINT_URL, FARM_S3_BUCKET and AWS_*"
    clocks = "Set this machine's clock by a time server (NTP)."
    yield Check("settings", _settings, f"Create the folder with `farm up --data {data}`.")
    yield Check("postgres", partial(_postgres, store), f"{up} FARM_DATABASE_URL.")
    yield Check("schema", partial(_schema, store), "Run `farm migrate`.", "postgres")
    yield Check("clock", partial(_clock, store), clocks, "postgres")
    yield Check("redis", partial(_redis, settings), f"{up} FARM_REDIS_URL.")
    yield Check("s3", partial(_s3, settings), f"{up} {aws}.")
    yield Check("api", partial(_api, settings), f"{up} FARM_API_URL and FARM_API_KEY.")
    yield Check("janitor", partial(_janitor, store), "Start one: `farm janitor`.", "postgres")
    yield Check("courier", partial(_courier, store), "Start one: `farm courier`.", "schema")
    yield Check("torch", _torch, "Install the farm again, with constraints.txt.")
    catalog = "Set FARM_PIPELINES to your catalog, for example pipelines.toml."
    yield Check("catalog", partial(_catalog, settings), catalog)
    yield from _pipeline_checks(settings, store)


def _pipeline_checks(settings: Settings, store: Store) -> Iterator[Check]:
    try:
        pipelines = load_catalog(settings.pipelines).pipelines
    except CatalogError:  # the catalog check reports it
        return
    devices = cache(partial(list_gpus, settings))
    yield Check("devices", partial(_devices, devices), "Check the driver: `nvidia-smi`.")
    for name, entry in pipelines.items():
        look = partial(_pipeline, name, entry, devices)
        yield Check(f"pipeline {name}", look, f"Correct its entry in {settings.pipelines}.")
        look = partial(_workers, store, settings, name)
        yield Check(f"workers {name}", look, f"Start one: `farm worker {name}`.", "schema")


def _settings() -> str:
    data = os.environ.get("FARM_DATA")
    if not data:
        return "FARM_* variables; FARM_DATA is not set"
    if not (Path(data) / ENV_FILE).is_file():
        raise FarmError(f"FARM_DATA is {data}, which has no file {ENV_FILE}.")
    return str(Path(data) / ENV_FILE)


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


def _api(settings: Settings) -> str:
    with FarmClient.of(settings) as client:
        client.check_ready()
        client.workers()
    return f"ready at {settings.api_url}, and accepts the key"


CLOSE_SECONDS = 10.0


def _janitor(store: Store) -> str:
    with leadership(store, CLOSE_SECONDS) as lead:
        if lead is not None:
            raise FarmError("No janitor is alive, so lost frames are not rendered again.")
    return "one is active"


COURIER_SECONDS = 60.0
"""Time after which work that waits for a courier shows that none is alive, in seconds."""


def _courier(store: Store) -> str:
    with reads(store) as connection:
        lag = webhooks.lag(connection)
    if lag > COURIER_SECONDS:
        raise FarmError(f"Messages to webhooks have waited {duration(lag)}: no courier is alive.")
    return "no message waits for one"


def _torch() -> str:
    device = device_of(Pipeline(source="any"))
    return f"{metadata.version('torch')} on {device_name(device)}"


def _catalog(settings: Settings) -> str:
    names = load_catalog(settings.pipelines).pipelines
    return f"{settings.pipelines}: {', '.join(names)}"


def _devices(devices: Callable[[], list[Gpu]]) -> str:
    found = [f"{n}: {gpu.name}, {size(gpu.bytes)}" for n, gpu in enumerate(devices())]
    return "; ".join(found) or "no CUDA device; pipelines render on the CPU"


def _pipeline(name: str, entry: Pipeline, devices: Callable[[], list[Gpu]]) -> str:
    resolved = resolve_pipeline(name, entry)
    found = f"{resolved.family.name} from {entry.checkpoint}"
    if not (uses_gpu(name, entry) and devices()):
        return found
    needed = device_bytes(entry)
    if needed is None:
        return f"{found}; its weights are not here yet, so their size is not known"
    fits = [str(number) for number, gpu in enumerate(devices()) if needed <= gpu.bytes]
    if not fits:
        largest = size(max(gpu.bytes for gpu in devices()))
        raise Wrong(
            f"It needs about {size(needed)}, and the largest device has {largest}.",
            "Set `offload`, or use a smaller dtype or a larger device.",
        )
    return f"{found}; needs about {size(needed)}, fits on device {', '.join(fits)}"


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
