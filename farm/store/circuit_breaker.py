"""Circuit breaker, one per worker: a worker on which different frames fail in a row is tripped.

After TRIP_AFTER_FRAMES it claims nothing for a while. If all failed frames belong to one tenant, it
leaves out this tenant only and serves the others. Then it is half-open and claims one batch. A
success closes the breaker (workers.account); a failure doubles the pause. A worker claims frames
that failed on it last (sql/claim.sql), so the trial batch has other frames if there are any.
"""

from __future__ import annotations

import uuid
from datetime import datetime

from sqlalchemy import Connection, text

TRIP_AFTER_FRAMES = 3
MAX_SECONDS = 300.0
REMEMBERED = 100
"""Failed frames to remember per worker. It may claim older ones like any other frame."""

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
    """Record that a frame, or the batch that begins with it, failed on a worker.

    Args:
        connection: in the transaction in which the frame's attempt was ended before.
        worker_id: the worker on which it failed.
        job_id: the frame's job.
        ordinal: the frame's ordinal in this job.
        trip_seconds: the length of the first pause.

    Returns:
        The time until which the worker is tripped, for one tenant or for all. None if it is not.
    """
    row = connection.execute(FAILING, {"id": worker_id}).first()
    if row is None:
        return None
    failing = [*dict.fromkeys([*row.failing, f"{job_id}/{ordinal}"])][-REMEMBERED:]
    if len(failing) < TRIP_AFTER_FRAMES:
        connection.execute(NOTE, {"id": worker_id, "failing": failing})
        return None
    seconds = min(trip_seconds * 2.0 ** min(row.trips, 30), MAX_SECONDS)
    values = {"id": worker_id, "failing": failing, "seconds": seconds}
    until: datetime = connection.execute(REST, values).scalar_one()
    return until
