"""API keys: create, list, revoke; and the end of signed addresses.

These commands connect to the database, not to the API.
"""

from __future__ import annotations

import getpass
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC
from typing import TYPE_CHECKING, Annotated

import typer

from farm.cli.terminal.console import Json, Why, columns, emit, note, say, show_table
from farm.errors import InvalidRequest

if TYPE_CHECKING:
    from farm.domain.spec import Metadata
    from farm.store.actions import Actor
    from farm.store.engine import Connection

app = typer.Typer(
    help="Create, list and revoke API keys, and end signed addresses.", no_args_is_help=True
)


@app.command()
def create(
    tenant: Annotated[
        str, typer.Option(help="Tenant that owns the key. It is created if it does not exist.")
    ] = "default",
    role: Annotated[
        str,
        typer.Option(
            help="client (submits jobs), operator (also manages tenants and workers) or viewer "
            "(read-only)."
        ),
    ] = "client",
    everywhere: Annotated[
        bool,
        typer.Option(
            "--everywhere",
            help="A viewer's key that sees every tenant, for example for a screen on the wall.",
        ),
    ] = False,
    name: Annotated[
        str, typer.Option(help="Note that says what the key is for. Example: backend.")
    ] = "",
    without_metadata: Annotated[
        bool,
        typer.Option(
            "--without-metadata",
            help="Image files of its jobs hold no prompt, seed, settings or names, unless a job "
            "asks for them.",
        ),
    ] = False,
    why: Why = "",
    as_json: Json = False,
) -> None:
    """Create an API key and print it. It is printed only once.

    Example: farm keys create --tenant shop --role client --name backend
    """
    from farm.services.keys import create_key

    with _connection() as connection:
        metadata: Metadata | None = "none" if without_metadata else None
        row, key = create_key(
            connection, _actor(why), tenant, role, name, metadata, everywhere=everywhere
        )
    if as_json:
        emit({"id": row.id, "tenant": tenant, "role": role, "key": key})
    else:
        typer.echo(key)
        note(f"Save this {role} key of tenant {tenant} now. It is not shown again.")


@app.command("list")
def list_keys(as_json: Json = False) -> None:
    """List the API keys by ID, tenant, role and note. The keys themselves are not stored."""
    from farm.store import keys

    with _connection() as connection:
        rows = keys.list_keys(connection)
    if as_json:
        emit([row._asdict() for row in rows])
        return
    names = ("id", "begins with", "tenant", "role", "note", "created, UTC", "revoked, UTC")
    table = columns(*names)
    for row in rows:
        moments = [
            f"{moment.astimezone(UTC):%Y-%m-%d %H:%M}" if moment else ""
            for moment in (row.created_at, row.revoked_at)
        ]
        table.add_row(str(row.id), row.prefix, row.tenant, row.sees, row.name, *moments)
    show_table(table)


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="ID of the key, from `farm keys list`.")],
    why: Why = "",
) -> None:
    """Revoke an API key. It takes effect within seconds and cannot be undone.

    Operations that the key started on many jobs are stopped.
    """
    from farm.services.keys import revoke_key

    try:
        wanted = uuid.UUID(key_id)
    except ValueError as error:
        raise InvalidRequest(
            f"{key_id!r} is not the ID of a key. `farm keys list` lists the IDs.", param="key_id"
        ) from error
    with _connection() as connection:
        revoke_key(connection, _actor(why), wanted)
    say(f"Key {key_id} is revoked.")


@app.command()
def end_addresses(
    why: Why = "",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
) -> None:
    """End all signed addresses of images that were given so far. It cannot be undone.

    Each API process notices it within ten seconds. Frames have new addresses after that.
    """
    from farm.store import signing_secrets
    from farm.store.actions import record

    if not yes:
        note("Images of all tenants that are shown by these addresses will be missing.")
        typer.confirm("End all signed addresses?", abort=True, err=True)
    with _connection() as connection:
        signing_secrets.replace(connection)
        record(connection, _actor(why), "addresses.end", "signed addresses", "all ended")
    say("All signed addresses end within ten seconds. Frames have new ones after that.")


def _actor(why: str) -> Actor:
    """Return the user of this shell, for the log of actions."""
    from farm.store.actions import Actor

    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user has no name
        user = f"user {os.getuid()}"
    return Actor(uuid.UUID(int=0), user, "", "", "shell", socket.gethostname(), why)


@contextmanager
def _connection() -> Iterator[Connection]:
    from farm.config import load_settings
    from farm.store.engine import open_store, transaction

    store = open_store(load_settings())
    try:
        with transaction(store) as connection:
            yield connection
    finally:
        store.dispose()
