"""API keys: create, list, revoke. These speak with the database itself, as an operator may."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC
from typing import TYPE_CHECKING, Annotated

import typer

from farm.cli.terminal.console import Json, columns, emit, note, say, show_table
from farm.errors import InvalidRequest, NotFound

if TYPE_CHECKING:
    from farm.store.engine import Connection

app = typer.Typer(help="API keys: create, list, revoke.", no_args_is_help=True)


@app.command()
def create(
    tenant: Annotated[str, typer.Option(help="Whose key; made if it is new.")] = "default",
    role: Annotated[str, typer.Option(help="client, operator or viewer")] = "client",
    name: Annotated[str, typer.Option(help="A note, to know the key by.")] = "",
    as_json: Json = False,
) -> None:
    """Make a key and show it, once."""
    from farm.store import keys

    if role not in keys.ROLES:
        raise InvalidRequest(f"--role: {role!r} is none of {', '.join(keys.ROLES)}.", param="role")
    with _connection() as connection:
        key_id, key = keys.create_key(connection, tenant, role, name)
    if as_json:
        emit({"id": key_id, "tenant": tenant, "role": role, "key": key})
    else:
        typer.echo(key)
        note(f"This {role} key of tenant {tenant} is not shown again.")


@app.command("list")
def list_keys(as_json: Json = False) -> None:
    """Show every key's description; the keys themselves are not stored."""
    from farm.store import keys

    with _connection() as connection:
        rows = [dict(row._mapping) for row in keys.list_keys(connection)]
    if as_json:
        emit(rows)
        return
    table = columns("id", "begins with", "tenant", "role", "note", "created, UTC", "revoked, UTC")
    for row in rows:
        moments = [
            f"{moment.astimezone(UTC):%Y-%m-%d %H:%M}" if moment else ""
            for moment in (row["created_at"], row["revoked_at"])
        ]
        table.add_row(
            str(row["id"]), row["prefix"], row["tenant"], row["role"], row["name"], *moments
        )
    show_table(table)


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="The key's id, as `list` shows it.")],
) -> None:
    """Revoke a key, at once and for good."""
    from farm.store import keys

    try:
        wanted = uuid.UUID(key_id)
    except ValueError as error:
        raise InvalidRequest(f"{key_id!r} is not a key's id.", param="key_id") from error
    with _connection() as connection:
        if not keys.revoke_key(connection, wanted):
            raise NotFound(f"There is no key {key_id}.")
    say(f"Key {key_id} is revoked.")


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
