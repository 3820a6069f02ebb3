"""The command line: assembles the commands, which have one module for each group.

Commands import heavy modules only when they run, so that `farm --help` is fast.
"""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer
from rich.text import Text

from farm import __version__
from farm.cli.commands import (
    audit,
    calibrate,
    compare,
    demo,
    doctor,
    export,
    fetch,
    get,
    images,
    jobs,
    keys,
    lanes,
    operating,
    operations,
    processes,
    replay,
    steering,
    submit,
    top,
    up,
    usage,
    workers,
)
from farm.cli.terminal.console import clean, err
from farm.cli.terminal.exit_codes import EPILOG, ERROR
from farm.errors import FarmError
from farm.process import collect_rarely

app = typer.Typer(
    name="farm",
    help="A distributed render farm for text-to-image diffusion.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
EXTRAS = {
    "submit": "files",
    "compare": "files",
    "export": "files",
    "api": "server",
    "janitor": "server",
    "exporter": "server",
    "courier": "server",
    "migrate": "server",
    "keys": "server",
    "audit": "server",
    "doctor": "server",
    "worker": "worker",
    "calibrate": "worker",
    "fetch": "worker",
    "replay": "worker",
    "up": "local",
    "demo": "local",
}
"""The extra of the package `farm` that each command needs, in full or for some options."""
EXTRA_MODULES = {
    "PIL", "accelerate", "alembic", "anyio", "boto3", "cachetools", "celery", "compel",
    "diffusers", "dynamicprompts", "fastapi", "imagehash", "jinja2", "numpy", "prometheus_client",
    "psycopg", "pyarrow", "pyparsing", "redis", "safetensors", "scipy", "sqlalchemy", "starlette",
    "tenacity", "tomlkit", "torch", "transformers", "uvicorn", "zlib_ng",
}  # fmt: skip
"""Modules that the extras install."""

START, RENDER, LOOK, RUN = "Start here", "Jobs", "Inspect", "Processes and maintenance"
OPERATE = "For operators"

app.command("demo", rich_help_panel=START)(demo.demo)
app.command("up", rich_help_panel=START)(up.up)
app.command("doctor", rich_help_panel=START)(doctor.doctor)
app.command("submit", rich_help_panel=RENDER, epilog=submit.EXAMPLES)(submit.submit)
app.command("compare", rich_help_panel=RENDER)(compare.compare)
app.command("images", rich_help_panel=RENDER)(images.images)
app.command("watch", rich_help_panel=RENDER)(jobs.watch)
app.command("get", rich_help_panel=RENDER)(get.get)
app.command("export", rich_help_panel=RENDER)(export.export)
app.command("cancel", rich_help_panel=RENDER)(steering.cancel)
app.command("pause", rich_help_panel=RENDER)(steering.pause)
app.command("resume", rich_help_panel=RENDER)(steering.resume)
app.command("retry", rich_help_panel=RENDER)(steering.retry)
app.command("change", rich_help_panel=RENDER)(steering.change)
app.command("remove", rich_help_panel=RENDER)(steering.remove)
app.add_typer(operations.app, name="operations", rich_help_panel=RENDER)
app.command("jobs", rich_help_panel=LOOK)(jobs.jobs)
app.command("job", rich_help_panel=LOOK)(jobs.job)
app.command("usage", rich_help_panel=LOOK)(usage.usage)
app.add_typer(workers.app, name="workers", rich_help_panel=LOOK)
app.command("replay", rich_help_panel=LOOK)(replay.replay)
app.command("api", rich_help_panel=RUN)(processes.api)
app.command("worker", rich_help_panel=RUN)(processes.worker)
app.command("janitor", rich_help_panel=RUN)(processes.janitor)
app.command("exporter", rich_help_panel=RUN)(processes.exporter)
app.command("courier", rich_help_panel=RUN)(processes.courier)
app.command("migrate", rich_help_panel=RUN)(processes.migrate)
app.command("fetch", rich_help_panel=RUN)(fetch.fetch)
app.command("calibrate", rich_help_panel=RUN)(calibrate.calibrate)
app.command("audit", rich_help_panel=RUN)(audit.audit)
app.command("top", rich_help_panel=OPERATE)(top.top)
app.add_typer(keys.app, name="keys", rich_help_panel=OPERATE)
app.add_typer(operating.tenants_app, name="tenants", rich_help_panel=OPERATE)
app.add_typer(operating.destinations_app, name="destinations", rich_help_panel=OPERATE)
app.add_typer(lanes.app, name="lanes", rich_help_panel=OPERATE)
app.command("actions", rich_help_panel=OPERATE)(operating.actions)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"farm {__version__}")
        raise typer.Exit


@app.callback()
def farm(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", callback=_show_version, is_eager=True
        ),
    ] = False,
) -> None:
    """A distributed render farm for text-to-image diffusion."""


def main() -> None:
    """Run a command. On an error, print one line to standard error and exit with code 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # prompts may hold characters it cannot show
    collect_rarely()
    try:
        app(prog_name="farm")
    except FarmError as error:
        _fail(error.message)
    except ModuleNotFoundError as error:
        _fail(_missing(error))
    except Exception as error:
        _fail(_unexpected(error))


def _fail(message: str) -> None:
    err.print(Text.assemble(("Error:", "bold red"), " ", clean(message)), soft_wrap=True)
    sys.exit(ERROR)


def _missing(error: ModuleNotFoundError) -> str:
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    extra = EXTRAS.get(command)
    if extra is None or (error.name or "").split(".")[0] not in EXTRA_MODULES:
        return _unexpected(error)
    return (
        f"`farm {command}` needs the package {error.name}, which is not installed. "
        f"Run: pip install 'farm[{extra}]'"
    )


def _unexpected(error: Exception) -> str:
    from pydantic import ValidationError

    if isinstance(error, ValidationError) and error.title == "Settings":
        first = error.errors()[0]
        name = "_".join(["farm", *(str(part) for part in first["loc"])]).upper()
        return f"{name}: {first['msg']}."
    return f"The farm failed unexpectedly: {type(error).__name__}: {error}"
