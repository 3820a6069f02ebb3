"""The farm's own processes: api, janitor, worker, and migrate.

What stands above the core is started by name, since farm never imports api or workers.
"""

from __future__ import annotations

import importlib
import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from farm.cli.terminal.exit_codes import ERROR
from farm.errors import FarmError, Unavailable
from farm.process import set_up_logs

if TYPE_CHECKING:
    from farm.config import Settings

log = logging.getLogger(__name__)


def api(
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen on.")] = 8000,
) -> None:
    """Serve the HTTP API and the dashboard."""
    import uvicorn

    with _process():
        uvicorn.run(
            "api.app:create_app",
            factory=True,
            host=host,
            port=port,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # the app decides whom it believes
            timeout_graceful_shutdown=10,
        )


def janitor() -> None:
    """Expire leases, ring lanes again, prune. Any number may run; one works."""
    from farm.context import open_farm

    stop = threading.Event()
    with _process() as settings:
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, lambda *_: stop.set())
        farm = open_farm(settings)
        try:
            importlib.import_module("workers.janitor.janitor").Janitor(farm).run(stop)
        finally:
            farm.close()


def worker(pipeline: Annotated[str, typer.Argument(help="A pipeline of the catalog.")]) -> None:
    """Render one pipeline's frames until SIGTERM, which lets it finish its batch."""
    with _process() as settings:
        code = importlib.import_module("workers.render.parent").run_worker(settings, pipeline)
    raise typer.Exit(code)


def exporter() -> None:
    """Write the datasets that are asked for, until SIGTERM."""
    with _process() as settings:
        code = importlib.import_module("workers.exporter").run_chores(settings)
    raise typer.Exit(code)


@contextmanager
def _process() -> Iterator[Settings]:
    """Start a process: its log, in which an unexpected end stands whole, and a schema it knows."""
    from farm.config import load_settings

    settings = load_settings()
    set_up_logs(settings.log_level)
    try:
        _require_schema(settings)
        yield settings
    except FarmError:
        raise
    except Exception as error:
        log.exception("It ended by an unexpected error")
        raise typer.Exit(ERROR) from error


def _require_schema(settings: Settings) -> None:
    """Refuse a schema that this version cannot work on; while Postgres is away, wait for it."""
    from farm.store.engine import open_store
    from farm.store.migrate import require_schema

    store = open_store(settings)
    try:
        while True:
            try:
                return require_schema(store)
            except Unavailable as error:
                log.warning("Waiting to see the database's schema: %s", error)
                time.sleep(settings.sweep_seconds)
    finally:
        store.dispose()


def migrate(
    pre: Annotated[
        bool, typer.Option("--pre", help="Only what an older version that still runs can bear.")
    ] = False,
) -> None:
    """Bring the database to the schema that this version knows."""
    from farm.config import load_settings
    from farm.store.engine import open_store
    from farm.store.migrate import require_schema, upgrade

    store = open_store(load_settings())
    try:
        done = upgrade(store, pre_only=pre)
        require_schema(store)
    finally:
        store.dispose()
    typer.echo(f"Applied: {', '.join(done.applied) or 'nothing'}.")
    if done.left:
        left = ", ".join(done.left)
        typer.echo(f"Left: {left}. Once no older version runs, run `farm migrate`.")
    else:
        typer.echo("The database is up to date.")
