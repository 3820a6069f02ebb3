"""Dashboard sessions: the browser keeps a random secret; the table, its hash, key and end."""

from __future__ import annotations

import secrets

from sqlalchemy import Connection, text

from farm.store.keys import Caller, digest_of

OPEN = text("""
INSERT INTO sessions (digest, key_id, ends_at)
VALUES (:digest, :key_id, clock_timestamp() + make_interval(secs => :seconds))
""")

FIND = text("""
SELECT k.id AS key_id, k.tenant_id, t.name AS tenant, k.role, k.name,
       t.requests_a_second, t.requests_burst, k.metadata, k.everywhere
FROM sessions s JOIN keys k ON k.id = s.key_id JOIN tenants t ON t.id = k.tenant_id
WHERE s.digest = :digest AND s.ends_at > clock_timestamp() AND k.revoked_at IS NULL
  AND t.removed_at IS NULL
""")

END = text("DELETE FROM sessions WHERE digest = :digest")

PRUNE = text("DELETE FROM sessions WHERE ends_at < now()")


def open_session(connection: Connection, caller: Caller, seconds: float) -> str:
    """Open a session of `seconds`. Return the secret for the browser; it is never shown again."""
    session = secrets.token_urlsafe(32)
    values = {"digest": digest_of(session), "key_id": caller.key_id, "seconds": seconds}
    connection.execute(OPEN, values)
    return session


def find_visitor(connection: Connection, session: str) -> Caller | None:
    """Find the owner of a session. None if it is unknown or ended, or its key was revoked."""
    row = connection.execute(FIND, {"digest": digest_of(session)}).first()
    return Caller(**row._mapping) if row else None


def end_session(connection: Connection, session: str) -> None:
    """End a session early."""
    connection.execute(END, {"digest": digest_of(session)})


def prune(connection: Connection) -> None:
    """Delete the sessions that have ended."""
    connection.execute(PRUNE)
