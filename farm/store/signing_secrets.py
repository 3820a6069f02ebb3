"""Secrets that sign addresses of images. All API processes share them, so none is configured."""

from __future__ import annotations

import secrets

from sqlalchemy import Connection, text

SECRET_BYTES = 32
LAST = 255
"""Largest number of a secret: a token has one byte for it."""

LOAD = text("SELECT number, secret FROM signing_secrets ORDER BY number")

ADD = text("""
INSERT INTO signing_secrets (number, secret) VALUES (:number, :secret)
ON CONFLICT (number) DO NOTHING
""")

# Two callers take turns: the second one must see the secret of the first.
LOCK = text("LOCK TABLE signing_secrets IN SHARE ROW EXCLUSIVE MODE")

FORGET = text("DELETE FROM signing_secrets RETURNING number")


def load(connection: Connection) -> dict[int, bytes]:
    """Read the secrets by number. The first call ever makes one."""
    found = _read(connection)
    if not found:
        _add(connection, 0)
        found = _read(connection)
    return found


def replace(connection: Connection) -> None:
    """Replace all secrets by a new one, so that every address that was signed before ends."""
    connection.execute(LOCK)
    last = max(connection.execute(FORGET).scalars(), default=-1)
    _add(connection, 0 if last == LAST else last + 1)


def _read(connection: Connection) -> dict[int, bytes]:
    return {row.number: bytes(row.secret) for row in connection.execute(LOAD)}


def _add(connection: Connection, number: int) -> None:
    connection.execute(ADD, {"number": number, "secret": secrets.token_bytes(SECRET_BYTES)})
