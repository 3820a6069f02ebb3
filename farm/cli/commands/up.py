"""`farm up`: the whole farm on this machine, until Ctrl-C."""

from __future__ import annotations

import shlex
import signal
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from farm.cli.terminal.console import program
from farm.cli.terminal.signals import interrupted_by_signals
from farm.errors import InvalidRequest
from farm.local.up import LocalFarm, running_farm

console = Console(highlight=False, emoji=False, soft_wrap=True)


def up(
    data: Annotated[
        Path,
        typer.Option(help="Folder that everything is kept in.", envvar="FARM_DATA"),
    ] = Path("farm-data"),
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="The API's port; 0: any free one.")
    ] = 8000,
    pipelines: Annotated[
        Path | None, typer.Option(help="The catalog, pipelines.toml; by default the demo's.")
    ] = None,
    workers: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=COUNT", help="Workers for a pipeline, 1 by default."),
    ] = None,
) -> None:
    """Run the whole farm on this machine until Ctrl-C: servers, API, janitor and workers."""
    counts = dict(_count(word) for word in workers or [])
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
            f"--workers takes NAME=COUNT, such as demo=2, and not {word!r}.", param="workers"
        )
    return name, int(count)


def _show(farm: LocalFarm) -> None:
    console.print(f"Farm is ready: {farm.url}", style="bold green")
    rows = {
        # With the key only where a person looks: standard output may go to a file.
        "page": f"{farm.url}/#key={farm.api_key}" if console.is_terminal else f"{farm.url}/",
        "data": farm.data,
        "key": farm.data / "api-key",
        "logs": farm.data / "logs",
        "elsewhere": f"FARM_DATA={shlex.quote(str(farm.data))} {program()} jobs",
        "stop": "Ctrl-C",
    }
    for name, value in rows.items():
        console.print(f"  {name:<10}{value}", markup=False)
