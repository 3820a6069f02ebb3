"""Lanes: the waiting work of each, and the reasons why a job does not run."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, text

from farm.domain.spec import Priority
from farm.store.workers import PROBLEM_NOW, STATE_NOW

CLAIMABLE = text("""
SELECT pipeline FROM (SELECT DISTINCT pipeline FROM shares) lane
WHERE EXISTS (SELECT FROM pg_temp.leader(lane.pipeline, '{}', CAST(:least AS smallint)))
ORDER BY pipeline
""")

DEPTH = text("""
SELECT pipeline, priority, sum(waiting)::bigint AS waiting FROM (
    SELECT pipeline, priority, total - cursor AS waiting FROM jobs WHERE open
    UNION ALL
    SELECT pipeline, priority, 1 FROM requeued_frames
) lane GROUP BY pipeline, priority ORDER BY pipeline, priority
""")

LANE_NOW = text(f"""
SELECT lane.*, busy.priority AS busy_priority, busy.own AS busy_own
FROM (
    SELECT count(*) AS workers,
           count(*) FILTER (WHERE draining) AS draining,
           count(*) FILTER (WHERE state IN ('idle', 'rendering') AND NOT draining) AS able,
           count(*) FILTER (WHERE state = 'loading') AS loading,
           count(*) FILTER (WHERE state = 'failed') AS failed,
           min(problem) FILTER (WHERE state = 'failed') AS problem
    FROM (
        SELECT w.draining, {STATE_NOW} AS state, {PROBLEM_NOW} AS problem
        FROM workers w WHERE w.pipeline = :pipeline AND NOT w.gone
    ) worker
) lane LEFT JOIN (
    SELECT j.priority, j.tenant_id = :tenant_id AS own
    FROM leases l CROSS JOIN LATERAL (SELECT DISTINCT unnest(l.job_ids) AS job_id) d
    JOIN jobs j ON j.id = d.job_id
    WHERE l.pipeline = :pipeline ORDER BY j.priority, own LIMIT 1
) busy ON true
""")  # noqa: S608 - constants only

BACKING_OFF = text("SELECT min(not_before) FROM requeued_frames WHERE job_id = :job_id")


def claimable_lanes(connection: Connection) -> list[str]:
    """List the pipelines on which something may be claimed now."""
    return list(connection.execute(CLAIMABLE, {"least": Priority.BULK}).scalars())


def depths(connection: Connection) -> Sequence[Row[Any]]:
    """Count the waiting frames of each lane, by priority."""
    return connection.execute(DEPTH).all()


def lane_now(connection: Connection, pipeline: str, tenant_id: uuid.UUID | None = None) -> Row[Any]:
    """Count a lane's workers: all, able, draining, loading and failed. Add why one failed.

    `busy_priority` is the priority of the most urgent work that they render, or None. `busy_own`
    is True if that work belongs to the tenant.
    """
    return connection.execute(LANE_NOW, {"pipeline": pipeline, "tenant_id": tenant_id}).one()


def backing_off_until(connection: Connection, job_id: uuid.UUID) -> Any | None:
    """Return the time at which the first of a job's requeued frames is due again."""
    return connection.execute(BACKING_OFF, {"job_id": job_id}).scalar_one()
