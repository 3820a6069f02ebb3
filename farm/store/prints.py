"""Prints: perceptual hashes of a job's kept pictures, so that no two look alike."""

from __future__ import annotations

import uuid

from sqlalchemy import Connection, text

LOCK = text("SELECT pg_advisory_xact_lock(hashtextextended('prints ' || :job_id, 0))")

# Beside the frame's own earlier one, which it replaces.
NEAREST = text("""
SELECT ordinal, bit_count((print # CAST(:print AS bigint))::bit(64)) AS bits FROM prints
WHERE job_id = CAST(:job_id AS uuid) AND ordinal <> :ordinal ORDER BY bits, ordinal LIMIT 1
""")

KEEP = text("""
INSERT INTO prints (job_id, ordinal, print) VALUES (CAST(:job_id AS uuid), :ordinal, :print)
ON CONFLICT (job_id, ordinal) DO UPDATE SET print = excluded.print
""")


def keep_print(
    connection: Connection, job_id: uuid.UUID, ordinal: int, hashed: int, near: int
) -> tuple[int, int] | None:
    """Keep a picture's print, unless one of its job is near.

    One at a time for each job, so that of two alike one is kept. All of a job's prints are looked
    through: about 20 ms for a hundred thousand.

    Args:
        connection: in a transaction.
        job_id: the frame's.
        ordinal: the frame's.
        hashed: 64 bits, as a number from 0.
        near: bits in which two may differ, and are alike.

    Returns:
        The nearest frame's ordinal and the bits that differ, where it is near.
    """
    signed = hashed - 2**64 if hashed >= 2**63 else hashed
    values = {"job_id": str(job_id), "ordinal": ordinal, "print": signed}
    connection.execute(LOCK, values)
    found = connection.execute(NEAREST, values).first()
    if found is not None and found.bits <= near:
        return found.ordinal, found.bits
    connection.execute(KEEP, values)
    return None
