"""Calls that have no answer yet, and came without an idempotency key. See ADR 44.

Some clients repeat a call whose answer did not arrive. Each call gets a key of the farm, and the
repeated call gets the key of the call that it repeats. So both have the same job.
"""

from __future__ import annotations

import secrets

from sqlalchemy import Connection, text

KEPT_SECONDS = 900
"""Time for which a call is kept after it was given up, in seconds. No client repeats it later."""

# Of calls with the same content, rather one that was given up than one that still waits.
TAKE_OVER = text("""
UPDATE unanswered_calls SET repeats = :repeats, given_up = false, at = clock_timestamp()
WHERE key = (
    SELECT key FROM unanswered_calls
    WHERE digest = :digest AND repeats < :repeats
      AND at > clock_timestamp() - make_interval(secs => :seconds)
    ORDER BY given_up DESC, at DESC LIMIT 1 FOR UPDATE
)
RETURNING key
""")

# One after the other, or two repeated calls would take the same row.
LOCK = text("SELECT pg_advisory_xact_lock(hashtextextended(encode(:digest, 'hex'), 0))")

BEGIN = text("""
INSERT INTO unanswered_calls (key, digest, repeats) VALUES (:key, :digest, :repeats)
""")

GIVE_UP = text("""
UPDATE unanswered_calls SET given_up = true, at = clock_timestamp()
WHERE key = :key AND repeats = :repeats
""")

END = text("DELETE FROM unanswered_calls WHERE key = :key")

PRUNE = text("""
DELETE FROM unanswered_calls WHERE at < now() - make_interval(secs => :seconds)
""")


def begin(connection: Connection, digest: bytes, repeats: int) -> str:
    """Note a call, and return its idempotency key.

    Args:
        connection: in a transaction.
        digest: SHA-256 of the API key and the content of the call.
        repeats: how often the client has sent it before. If it has, and one of those calls has no
            answer, its key is returned.
    """
    values = {"digest": digest, "repeats": repeats, "seconds": KEPT_SECONDS}
    if repeats:
        connection.execute(LOCK, {"digest": digest})
        key: str | None = connection.execute(TAKE_OVER, values).scalar()
        if key is not None:
            return key
    key = f"call-{secrets.token_hex(16)}"
    connection.execute(BEGIN, {"key": key, "digest": digest, "repeats": repeats})
    return key


def give_up(connection: Connection, key: str, repeats: int) -> None:
    """Note that the caller has gone without an answer. A later call with its key is unaffected."""
    connection.execute(GIVE_UP, {"key": key, "repeats": repeats})


def end(connection: Connection, key: str) -> None:
    """Forget a call that was answered."""
    connection.execute(END, {"key": key})


def prune(connection: Connection) -> None:
    """Forget calls that nobody repeats any more."""
    connection.execute(PRUNE, {"seconds": KEPT_SECONDS})
