"""The farm that `farm demo` renders on: one that runs already, else one of its own."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from farm.cli.terminal.console import duration, note, out
from farm.cli.terminal.progress import busy
from farm.errors import Unavailable

if TYPE_CHECKING:
    from farm.cli.client.http import FarmClient

DATA = "farm-data"
"""The folder that `farm up` and `farm demo` use where none is named."""

PORT = 8000
STARTING_SECONDS = 120.0
"""How long a farm that somebody else is starting may take."""


@dataclass(frozen=True)
class FarmHandle:
    """A farm that answers."""

    client: FarmClient
    url: str
    data: Path | None
    """Its data folder, where it is known."""
    own: bool
    """Whether it was started here, and ends here."""


@contextmanager
def running_or_started_farm(data: Path) -> Iterator[FarmHandle]:
    """Give a farm: FARM_API_URL's, else the one running on `data`, else one started on it."""
    if os.environ.get("FARM_API_URL"):
        with _running(None) as host:
            yield host
    elif is_held(data):
        with _running(data) as host:
            yield host
    else:
        with _started(data) as host:
            yield host


def is_held(data: Path) -> bool:
    """Whether a farm runs on this data folder, or is being started or stopped."""
    try:
        with (data / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


@contextmanager
def _running(data: Path | None) -> Iterator[FarmHandle]:
    """Wait until the farm that somebody else runs answers, and use it."""
    started = time.monotonic()
    with busy("Waiting for the farm to answer" if data is None else f"Using the farm on {data}"):
        while True:
            try:
                client = _open(data)
                client.get("/v1/pipelines")
                break
            except Unavailable:
                if data is None or time.monotonic() - started > STARTING_SECONDS:
                    raise
                time.sleep(0.5)
    out.print(f"Using the farm that runs already: [bold]{client.address.url}[/]")
    with client:
        yield FarmHandle(client, client.address.url, data, own=False)


def _open(data: Path | None) -> FarmClient:
    from farm.cli.client.http import FarmClient
    from farm.config import load_env, load_settings

    if data is None:
        return FarmClient.of(load_settings())
    url, key = load_env(data).get("FARM_API_URL"), data / "api-key"
    if url is None or not key.is_file():
        raise Unavailable(f"The farm on {data} is still being started.")
    return FarmClient(url, key.read_text().strip())


@contextmanager
def _started(data: Path) -> Iterator[FarmHandle]:
    """Start the whole farm on a data folder, and stop it at the end."""
    from farm.cli.client.http import FarmClient
    from farm.local import running_farm
    from farm.local.ports import is_free

    note(f"No farm runs on {data}: starting one. Everything it keeps stays in that folder.", None)
    started = time.monotonic()
    with ExitStack() as stack:
        with busy("Starting Postgres, Valkey, SeaweedFS, the API, the janitor and a worker"):
            farm = stack.enter_context(running_farm(data, PORT if is_free(PORT) else 0))
        took = duration(time.monotonic() - started)
        out.print(f"[bold green]Farm is ready:[/] [bold]{farm.url}/[/] [dim]({took})[/]")
        client = stack.enter_context(FarmClient(farm.url, farm.api_key))
        yield FarmHandle(client, farm.url, farm.data, own=True)
        note("Stopping the farm …", None)
