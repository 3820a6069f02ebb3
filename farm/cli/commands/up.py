"""`farm up`: run the whole farm on this machine until Ctrl-C."""

from __future__ import annotations

import shlex
import signal
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from farm.cli.terminal.console import program
from farm.cli.terminal.signals import interrupted_by_signals
from farm.client import DATA
from farm.errors import InvalidRequest

if TYPE_CHECKING:
    from farm.local.up import LocalFarm

console = Console(highlight=False, emoji=False, soft_wrap=True)


def up(
    data: Annotated[
        Path,
        typer.Option(
            help="Data folder of the farm. It is created if missing. Example: /tmp/farm.",
            envvar="FARM_DATA",
        ),
    ] = Path(DATA),
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the API. 0 picks a free one.")
    ] = 8000,
    pipelines: Annotated[
        Path | None,
        typer.Option(
            help="Catalog file. Example: pipelines.toml.", show_default="the demo's catalog"
        ),
    ] = None,
    workers: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=COUNT,…",
            help="Number of workers by pipeline; 0 for none. Example: sdxl=6,sd15=2.",
            show_default="1 for each pipeline; the first one also gets the remaining GPUs",
        ),
    ] = None,
) -> None:
    """Run the whole farm on this machine until Ctrl-C: servers, API, janitor and workers.

    Example: farm up --data /tmp/farm --pipelines pipelines.toml --workers sd15=2
    """
    from farm.local.up import running_farm

    words = ",".join(workers).split(",") if workers else []
    counts = dict(_count(word.strip()) for word in words)
    with suppress(KeyboardInterrupt), interrupted_by_signals():
        console.print("Starting Postgres, Valkey, SeaweedFS and the farm …", style="dim")
        with running_farm(data, port, pipelines, counts) as farm:
            _show(farm)
            while True:
                signal.pause()
    console.print("Farm is stopped.", style="dim")


def _count(word: str) -> tuple[str, int]:
    name, _, count = word.partition("=")
    if not (name and count.isdecimal()):
        raise InvalidRequest(
            f"--workers: {word!r} is not of the form NAME=COUNT. Example: --workers demo=2,sd15=1.",
            param="workers",
        )
    return name, int(count)


def _show(farm: LocalFarm) -> None:
    console.print(f"Farm is ready: {farm.url}", style="bold green")
    rows = {
        # The key is shown only on a terminal: standard output may go to a file.
        "page": f"{farm.url}/#key={farm.api_key}" if console.is_terminal else f"{farm.url}/",
        "data": farm.data,
        "key": farm.data / "api-key",
        "logs": farm.data / "logs",
        "elsewhere": f"FARM_DATA={shlex.quote(str(farm.data))} {program()} jobs",
        "stop": "Ctrl-C",
    }
    for name, value in rows.items():
        console.print(f"  {name:<10}{value}", markup=False)
    for name, reason in farm.left_out.items():
        console.print(f"  No worker for {name}: {reason}.", style="yellow")
    if farm.left_out:
        workers = [name.removeprefix("worker ") for name in farm.children if "worker " in name]
        choice = f"{next(iter(farm.left_out))}=1,{workers[0].rpartition('-')[0]}=0"
        console.print(f"  Choose with --workers, for example --workers {choice}", style="yellow")
