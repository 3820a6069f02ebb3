"""A worker whose different frames fail in a row rests: a circuit breaker, one a worker.

After THREE_FRAMES it claims nothing for a while; where all that failed is one tenant's, nothing of
this tenant, and it serves the others. Then it claims one batch;
a success ends the matter (workers.account), a failure lets it rest twice as long. What failed on it
is what it claims last (sql/claim.sql), so that this batch is another frame's where there is one.
"""

from __future__ import annotations

import uuid
from datetime import datetime

from sqlalchemy import Connection, text

THREE_FRAMES = 3
MAX_SECONDS = 300.0
REMEMBERED = 100
"""Frames that failed on a worker; older ones it may claim again like any other."""

FAILING = text("SELECT failing, trips FROM workers WHERE id = :id")

NOTE = text("UPDATE workers SET failing = :failing WHERE id = :id")

REST = text("""
WITH tenant AS (
    SELECT DISTINCT j.tenant_id
    FROM unnest(CAST(:failing AS text[])) AS f (frame)
    JOIN jobs j ON j.id = split_part(f.frame, '/', 1)::uuid
)
UPDATE workers SET failing = :failing, trips = trips + 1,
                   avoids = CASE WHEN (SELECT count(*) FROM tenant) = 1
                                 THEN (SELECT tenant_id FROM tenant) END,
                   tripped_until = clock_timestamp() + make_interval(secs => :seconds)
WHERE id = :id RETURNING tripped_until
""")


def note_failure(
    connection: Connection,
    worker_id: uuid.UUID,
    job_id: uuid.UUID,
    ordinal: int,
    trip_seconds: float,
) -> datetime | None:
    """Note that a frame, or the batch that it was the first of, failed on a worker.

    Args:
        connection: where the frame's attempt was ended, before this.
        worker_id: whose it was.
        job_id: the frame's job.
        ordinal: its place there.
        trip_seconds: how long the first rest is.

    Returns:
        Until when the worker rests, for one tenant or for all; None where it goes on.
    """
    row = connection.execute(FAILING, {"id": worker_id}).first()
    if row is None:
        return None
    failing = [*dict.fromkeys([*row.failing, f"{job_id}/{ordinal}"])][-REMEMBERED:]
    if len(failing) < THREE_FRAMES:
        connection.execute(NOTE, {"id": worker_id, "failing": failing})
        return None
    seconds = min(trip_seconds * 2.0 ** min(row.trips, 30), MAX_SECONDS)
    values = {"id": worker_id, "failing": failing, "seconds": seconds}
    until: datetime = connection.execute(REST, values).scalar_one()
    return until
