"""Commands that start processes: api, janitor, worker, exporter, courier; and migrate."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from farm.cli.terminal.exit_codes import ERROR
from farm.errors import FarmError, Unavailable
from farm.process import (
    beat,
    collect_usually,
    limit_spinning,
    set_up_logs,
    signs_of_life,
    switch_often,
)

if TYPE_CHECKING:
    from tenacity import Retrying

    from farm.config import Settings

log = logging.getLogger(__name__)


def api(
    host: Annotated[
        str, typer.Option(help="Address to listen on. Example for all interfaces: 0.0.0.0.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on. 0 picks a free one.")
    ] = 8000,
) -> None:
    """Serve the HTTP API and the dashboard."""
    import uvicorn

    from api.app import create_app
    from api.server import ApiServer

    # uvicorn ends its requests, then raises the signal again: this end is no failure.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with _process("api") as settings:
        app = create_app(settings)
        collect_usually()
        switch_often()
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # the app decides which proxies it trusts
            timeout_graceful_shutdown=10,
        )
        server = ApiServer(app, config)
        server.run()
        if not server.started:
            sys.exit(ERROR)


def janitor(
    host: Annotated[
        str, typer.Option(help="Address to listen on, with --port. For all interfaces: 0.0.0.0.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            help="Port of /healthz and /metrics. 0 picks a free one. Without it there is none.",
        ),
    ] = None,
) -> None:
    """Expire leases, ring lanes again, and delete old data. Several may run; one works."""
    from farm.context import open_farm
    from workers.janitor.health_port import health_port
    from workers.janitor.janitor import Janitor

    stop = threading.Event()
    with _process("janitor") as settings:
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, lambda *_: stop.set())
        farm = open_farm(settings)
        try:
            janitor = Janitor(farm)
            with health_port(farm, janitor.status, host, port):
                janitor.run(stop)
        finally:
            farm.close()


def worker(
    pipeline: Annotated[
        str, typer.Argument(help="Name of a pipeline of the catalog, for example sd15.")
    ],
    device: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Number of its CUDA device, as `farm doctor` lists them.",
            show_default="the one with the fewest workers",
        ),
    ] = None,
) -> None:
    """Render the frames of one pipeline until SIGTERM. It finishes its batch first."""
    from workers.render.parent import run_worker

    limit_spinning()
    with _process("worker") as settings:
        code = run_worker(settings, pipeline, device)
    raise typer.Exit(code)


def exporter() -> None:
    """Write the requested dataset exports until SIGTERM."""
    from workers.exporter import run_exporter

    with _process("exporter") as settings:
        code = run_exporter(settings)
    raise typer.Exit(code)


def courier() -> None:
    """Deliver webhooks until SIGTERM. Several may run."""
    from workers.courier import run_courier

    with _process("courier") as settings:
        code = run_courier(settings)
    raise typer.Exit(code)


@contextmanager
def _process(program: str) -> Iterator[Settings]:
    """Set up the log, check the database schema, and log an unexpected error with its traceback."""
    from farm.config import load_settings

    settings = load_settings()
    set_up_logs(settings.log_level)
    try:
        with signs_of_life(settings.run_dir):
            _require_schema(settings, program)
            yield settings
    except FarmError:
        raise
    except Exception as error:
        log.exception("The process ended with an unexpected error")
        raise typer.Exit(ERROR) from error


def _require_schema(settings: Settings, program: str) -> None:
    """Refuse a schema that this version cannot use. Wait while Postgres does not answer."""
    from farm.store.actions import note_version
    from farm.store.engine import open_store, transaction
    from farm.store.migrate import require_schema

    store = open_store(settings)
    try:
        while True:
            try:
                require_schema(store)
                with transaction(store) as connection:
                    note_version(connection, program)
            except Unavailable as error:
                log.warning("Waiting to read the database schema: %s", error)
                beat(settings.run_dir)
                time.sleep(settings.sweep_seconds)
            else:
                return
    finally:
        store.dispose()


def _while_away(seconds: float) -> Retrying:
    """Try again while Postgres does not answer, for this time."""
    from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay
    from tenacity.wait import wait_fixed

    def tell(state: RetryCallState) -> None:
        if state.attempt_number == 1:
            typer.echo("Postgres does not answer. The command waits for it.", err=True)

    return Retrying(
        retry=retry_if_exception_type(Unavailable),
        stop=stop_after_delay(seconds),
        wait=wait_fixed(min(1.0, seconds)),
        before_sleep=tell,
        reraise=True,
    )


def migrate(
    pre: Annotated[
        bool,
        typer.Option(
            "--pre",
            help="Apply only the migrations that an older version, still running, can work with.",
        ),
    ] = False,
    wait_database: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="SECONDS",
            help="Time to wait for a Postgres or a storage that does not answer yet.",
        ),
    ] = 0.0,
    scaling_role: Annotated[
        str | None,
        typer.Option(
            "--grant-scaling",
            metavar="ROLE",
            help="Role of Postgres that may read the view `scaling`, for a scaler such as KEDA.",
        ),
    ] = None,
    create_bucket: Annotated[
        bool, typer.Option("--create-bucket", help="Also create the bucket, if it is missing.")
    ] = False,
) -> None:
    """Migrate the database to the schema of this version."""
    from farm.config import load_settings
    from farm.store.engine import open_store
    from farm.store.migrate import grant_scaling, require_schema, upgrade

    settings = load_settings()
    store = open_store(settings)
    try:
        if create_bucket:
            from farm.storage import Artifacts

            for attempt in _while_away(wait_database):
                with attempt:
                    Artifacts(settings).create_bucket()
        for attempt in _while_away(wait_database):
            with attempt:
                done = upgrade(store, pre_only=pre)
                require_schema(store)
        if scaling_role is not None:
            grant_scaling(store, scaling_role)
    finally:
        store.dispose()
    typer.echo(f"Applied: {', '.join(done.applied) or 'nothing'}.")
    if done.left:
        left = ", ".join(done.left)
        typer.echo(f"Left: {left}. Run `farm migrate` once no older version runs.")
    else:
        typer.echo("The database is up to date.")
