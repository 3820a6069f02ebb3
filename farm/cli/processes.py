"""The farm's own processes: api, janitor, worker, and migrate.

What stands above the core is started by name, since farm never imports api or workers.
"""

from __future__ import annotations

import importlib
import signal
import threading
from typing import Annotated

import typer

from farm.config import load_settings
from farm.logs import set_up_logs


def api(
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen on.")] = 8000,
) -> None:
    """Serve the HTTP API and the dashboard."""
    import uvicorn

    settings = load_settings()
    set_up_logs(settings.log_level)
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

    settings = load_settings()
    set_up_logs(settings.log_level)
    stop = threading.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: stop.set())
    farm = open_farm(settings)
    try:
        importlib.import_module("workers.janitor").Janitor(farm).run(stop)
    finally:
        farm.close()


def worker(pipeline: Annotated[str, typer.Argument(help="A pipeline of the catalog.")]) -> None:
    """Render one pipeline's frames until SIGTERM, which lets it finish its batch."""
    settings = load_settings()
    set_up_logs(settings.log_level)
    code = importlib.import_module("workers.parent").run_worker(settings, pipeline)
    raise typer.Exit(code)


def migrate() -> None:
    """Bring the database to the schema that this version knows."""
    from farm.store import migrate as steps
    from farm.store.engine import open_store

    store = open_store(load_settings())
    try:
        steps.upgrade(store)
    finally:
        store.dispose()
    typer.echo("The database is up to date.")
