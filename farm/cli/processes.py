"""The farm's own processes: api, janitor, worker, and migrate.

What stands above the core is started by name, since farm never imports api or workers.
"""

from __future__ import annotations

import importlib
import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from farm.cli.exits import ERROR
from farm.errors import FarmError
from farm.logs import set_up_logs

if TYPE_CHECKING:
    from farm.config import Settings

log = logging.getLogger(__name__)


def api(
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen on.")] = 8000,
) -> None:
    """Serve the HTTP API and the dashboard."""
    import uvicorn

    with _logged():
        uvicorn.run(
            "api.app:create_app",
            factory=True,
            host=host,
            port=port,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=10,
        )


def janitor() -> None:
    """Expire leases, ring lanes again, prune. Any number may run; one works."""
    from farm.context import open_farm

    stop = threading.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: stop.set())
    with _logged() as settings:
        farm = open_farm(settings)
        try:
            importlib.import_module("workers.janitor").Janitor(farm).run(stop)
        finally:
            farm.close()


def worker(pipeline: Annotated[str, typer.Argument(help="A pipeline of the catalog.")]) -> None:
    """Render one pipeline's frames until SIGTERM, which lets it finish its batch."""
    with _logged() as settings:
        code = importlib.import_module("workers.parent").run_worker(settings, pipeline)
    raise typer.Exit(code)


@contextmanager
def _logged() -> Iterator[Settings]:
    """Set up the log of a process; what ends it unexpectedly stands there whole."""
    from farm.config import load_settings

    settings = load_settings()
    set_up_logs(settings.log_level)
    try:
        yield settings
    except FarmError:
        raise
    except Exception as error:
        log.exception("It ended by an unexpected error")
        raise typer.Exit(ERROR) from error


def migrate() -> None:
    """Bring the database to the schema that this version knows."""
    from farm.config import load_settings
    from farm.store import migrate as steps
    from farm.store.engine import open_store

    store = open_store(load_settings())
    try:
        steps.upgrade(store)
    finally:
        store.dispose()
    typer.echo("The database is up to date.")
