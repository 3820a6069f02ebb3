"""Saved views: addresses of the page of jobs, by the key that saved them and a name."""

from __future__ import annotations

import uuid
from typing import NamedTuple

from sqlalchemy import Connection, text

from farm.errors import InvalidRequest
from farm.store.rows import rows_of

MOST = 50
"""Views of a key."""

LIST = text(
    "SELECT name, address FROM saved_views WHERE key_id = :key_id ORDER BY lower(name), name"
)
SAVE = text("""
INSERT INTO saved_views (key_id, name, address)
SELECT :key_id, :name, :address
WHERE (SELECT count(*) FROM saved_views WHERE key_id = :key_id AND name <> :name) < :most
ON CONFLICT (key_id, name) DO UPDATE SET address = excluded.address
""")
DELETE = text("DELETE FROM saved_views WHERE key_id = :key_id AND name = :name")


class SavedView(NamedTuple):
    """A list of jobs that a key has saved."""

    name: str
    address: str


def of_key(connection: Connection, key_id: uuid.UUID) -> list[SavedView]:
    """Read a key's views, by name."""
    return rows_of(connection.execute(LIST, {"key_id": key_id}), SavedView)


def save(connection: Connection, key_id: uuid.UUID, view: SavedView) -> None:
    """Save a view, in place of one with the same name.

    Raises:
        InvalidRequest: the key has MOST views already.
    """
    values = {"key_id": key_id, "most": MOST, **view._asdict()}
    if not connection.execute(SAVE, values).rowcount:
        raise InvalidRequest(f"name: you have {MOST} views. Delete one first.", param="name")


def delete(connection: Connection, key_id: uuid.UUID, name: str) -> None:
    """Delete a view, if it is there."""
    connection.execute(DELETE, {"key_id": key_id, "name": name})
