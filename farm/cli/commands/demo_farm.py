"""The farm that `farm demo` renders on: a running one, or else one that it starts."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from farm.cli.terminal.console import note, out
from farm.cli.terminal.progress import busy
from farm.errors import Unavailable
from farm.humanize import duration

if TYPE_CHECKING:
    from farm.cli.client.http import FarmClient

PORT = 8000
STARTING_SECONDS = 120.0
"""Maximum time to wait for a farm that another process is starting, in seconds."""


@dataclass(frozen=True)
class FarmHandle:
    """A running farm and a client for it."""

    client: FarmClient
    url: str
    data: Path | None
    """Data folder, or None if unknown."""
    own: bool
    """True if this process started the farm, and stops it at the end."""


@contextmanager
def running_or_started_farm(data: Path) -> Iterator[FarmHandle]:
    """Yield the farm at FARM_API_URL, else the one running on `data`, else start one on `data`."""
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
    """Return True if a farm on this data folder runs, starts or stops."""
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
    """Wait until a farm of another process answers, and yield it."""
    started = time.monotonic()
    with busy("Waiting for the farm to answer" if data is None else f"Using the farm on {data}"):
        while True:
            try:
                client = _open(data)
                client.pipelines()
                break
            except Unavailable:
                if data is None or time.monotonic() - started > STARTING_SECONDS:
                    raise
                time.sleep(0.5)
    out.print(f"Using the running farm: [bold]{client.farm.server.address.url}[/]")
    with client:
        yield FarmHandle(client, client.farm.server.address.url, data, own=False)


def _open(data: Path | None) -> FarmClient:
    from farm.cli.client.http import FarmClient
    from farm.config import load_env, load_settings

    if data is None:
        return FarmClient.of(load_settings())
    url, key = load_env(data).get("FARM_API_URL"), data / "api-key"
    if url is None or not key.is_file():
        raise Unavailable(f"The farm on {data} is still starting. Try again in a minute.")
    return FarmClient(url, key.read_text().strip())


@contextmanager
def _started(data: Path) -> Iterator[FarmHandle]:
    """Start the whole farm on a data folder, yield it, and stop it at the end."""
    from farm.cli.client.http import FarmClient
    from farm.local import running_farm
    from farm.local.ports import is_free

    note(f"No farm runs on {data}. Starting one. All its data is stored in that folder.", None)
    started = time.monotonic()
    with ExitStack() as stack:
        with busy("Starting Postgres, Valkey, SeaweedFS, and the farm's processes"):
            farm = stack.enter_context(running_farm(data, PORT if is_free(PORT) else 0))
        took = duration(time.monotonic() - started)
        out.print(f"[bold green]Farm is ready:[/] [bold]{farm.url}/[/] [dim]({took})[/]")
        client = stack.enter_context(FarmClient(farm.url, farm.api_key))
        yield FarmHandle(client, farm.url, farm.data, own=True)
        note("Stopping the farm …", None)
