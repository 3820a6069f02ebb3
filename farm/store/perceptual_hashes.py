"""Prints: perceptual hashes of a job's kept pictures, so that no two look alike."""

from __future__ import annotations

import itertools
import uuid

from sqlalchemy import Connection, text

LOCK = text("SELECT pg_advisory_xact_lock(hashtextextended('perceptual hashes ' || :job_id, 0))")

BY_INDEX = text("SET LOCAL enable_seqscan = off")
"""A job's prints may be a million before Postgres has counted any."""
BAND_BYTES = 2
FIRSTS = (1, 3, 5, 7)
"""The first byte of each band, as SQL counts them"""

# Of two prints that differ in few bits, one of four bands differs in a quarter of them at most: so
# each band is looked up by its own index, together with all values as near to it.
NEAREST = text(f"""
SELECT ordinal, bit_count((hash # CAST(:hash AS bigint))::bit(64)) AS bits FROM (
    {
    " UNION ALL ".join(
        f"SELECT ordinal, hash FROM perceptual_hashes WHERE job_id = CAST(:job_id AS uuid)"
        f" AND substring(int8send(hash), {first}, {BAND_BYTES}) = ANY(:band_{first})"
        for first in FIRSTS
    )
}
) candidate
WHERE ordinal <> :ordinal  -- its own earlier one, which it replaces
ORDER BY bits, ordinal LIMIT 1
""")  # noqa: S608 - constants only

KEEP = text("""
INSERT INTO perceptual_hashes (job_id, ordinal, hash)
VALUES (CAST(:job_id AS uuid), :ordinal, :hash)
ON CONFLICT (job_id, ordinal) DO UPDATE SET hash = excluded.hash
""")


def keep_print(
    connection: Connection, job_id: uuid.UUID, ordinal: int, hashed: int, near: int
) -> tuple[int, int] | None:
    """Keep a picture's hash, unless one of its job is near.

    One at a time for each job, so that of two alike one is kept. It takes milliseconds, also with a
    million prints.

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
    values = {"job_id": str(job_id), "ordinal": ordinal, "hash": signed}
    content = hashed.to_bytes(8)
    bands = {
        f"band_{first}": _around(content[first - 1 : first - 1 + BAND_BYTES], near // len(FIRSTS))
        for first in FIRSTS
    }
    connection.execute(LOCK, values)
    connection.execute(BY_INDEX)
    found = connection.execute(NEAREST, {**values, **bands}).first()
    if found is not None and found.bits <= near:
        return found.ordinal, found.bits
    connection.execute(KEEP, values)
    return None


def _around(band: bytes, bits: int) -> list[bytes]:
    """All that differs from a band in so many bits, at most."""
    number, places = int.from_bytes(band), range(8 * len(band))
    return [
        (number ^ sum(1 << place for place in flipped)).to_bytes(len(band))
        for count in range(bits + 1)
        for flipped in itertools.combinations(places, count)
    ]
