"""The command line: one module a group of commands, assembled here."""

from __future__ import annotations

import sys

import typer
from rich.console import Console

from farm.cli import keys, processes, up
from farm.errors import FarmError

app = typer.Typer(
    name="farm",
    help="A distributed render farm for text-to-image diffusion.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("up")(up.up)
app.command("api")(processes.api)
app.command("janitor")(processes.janitor)
app.command("worker")(processes.worker)
app.command("migrate")(processes.migrate)
app.add_typer(keys.app, name="keys")


def main() -> None:
    """Run a command; an error of the farm is one line on standard error, and exit code 1."""
    try:
        app()
    except FarmError as error:
        Console(stderr=True).print(f"[bold red]Error:[/] {error.message}", highlight=False)
        sys.exit(1)
