"""Perceptual hashes of a job's kept images, so that no two of them look alike."""

from __future__ import annotations

import itertools
import uuid

from sqlalchemy import Connection, text

LOCK = text("SELECT pg_advisory_xact_lock(hashtextextended('perceptual hashes ' || :job_id, 0))")

BY_INDEX = text("SET LOCAL enable_seqscan = off")
"""Use the indexes, though Postgres may not know yet that a job has a million hashes."""
BAND_BYTES = 2
FIRSTS = (1, 3, 5, 7)
"""Index of the first byte of each band, from 1, as SQL counts."""

# If two hashes differ in few bits, one of their four bands differs in a quarter of these at most.
# So each band is looked up in its own index, together with all values as near to it.
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
WHERE ordinal <> :ordinal  -- not the frame's own earlier hash, which is replaced
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
    """Store an image's hash, unless the job has a similar one.

    Calls of one job run one at a time, so one of two similar images is kept. A call takes
    milliseconds, even with a million hashes.

    Args:
        connection: in a transaction.
        job_id: the frame's job.
        ordinal: the frame's ordinal.
        hashed: the 64-bit hash, as an unsigned number.
        near: the most bits in which two similar hashes differ.

    Returns:
        The ordinal of the most similar frame and the number of bits that differ. None if no frame
        is similar.
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
    """List all values that differ from a band in `bits` bits at most."""
    number, places = int.from_bytes(band), range(8 * len(band))
    return [
        (number ^ sum(1 << place for place in flipped)).to_bytes(len(band))
        for count in range(bits + 1)
        for flipped in itertools.combinations(places, count)
    ]
