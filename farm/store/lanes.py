"""Lanes: the waiting work of each, and the reasons why a job does not run."""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import Connection, text

from farm.domain.spec import Priority
from farm.store.rows import rows_of
from farm.store.workers import PROBLEM_NOW, STATE_NOW


class LaneDepth(NamedTuple):
    """Frames of one priority that wait on a lane."""

    pipeline: str
    priority: int
    waiting: int
    oldest: float
    """Age of the oldest job with frames that were never claimed, in seconds. 0 if there is none."""


class LaneNow(NamedTuple):
    """The workers of a lane, and the work that they render."""

    workers: int
    draining: int
    able: int
    loading: int
    failed: int
    problem: str | None
    """Reason why one of the failed workers failed."""
    busy_priority: int | None
    """Priority of the most urgent work that they render."""
    busy_own: bool | None
    """True if that work belongs to the tenant."""
    running_limit: int | None
    """Limit of the tenant's running frames, if it is reached."""


CLAIMABLE = text("""
WITH RECURSIVE lane AS (  -- the first share of each lane, by index
    SELECT min(pipeline) AS pipeline FROM shares
    UNION ALL
    SELECT (SELECT min(s.pipeline) FROM shares s WHERE s.pipeline > lane.pipeline)
    FROM lane WHERE lane.pipeline IS NOT NULL
)
SELECT pipeline FROM lane, (SELECT pg_temp.full_tenants() AS ids OFFSET 0) full_now
WHERE EXISTS (SELECT FROM pg_temp.leader(
    lane.pipeline, '{}', CAST(:least AS smallint), full_now.ids))
ORDER BY pipeline
""")

DEPTH = text("""
SELECT lane.*, coalesce(extract(epoch FROM statement_timestamp() - (
    SELECT j.created_at FROM jobs j
    WHERE j.open AND j.pipeline = lane.pipeline AND j.priority = lane.priority
    ORDER BY j.created_at LIMIT 1
)), 0)::float8 AS oldest
FROM (
    SELECT s.pipeline, p.priority,
           sum(s.waiting[p.priority + 1] + s.requeued[p.priority + 1])::bigint AS waiting
    FROM shares s CROSS JOIN (VALUES (0), (1), (2)) AS p (priority)
    WHERE (s.priority IS NOT NULL OR s.retry_at IS NOT NULL)
      AND (s.waiting[p.priority + 1] > 0 OR s.requeued[p.priority + 1] > 0)
    GROUP BY s.pipeline, p.priority
) lane ORDER BY lane.pipeline, lane.priority
""")

LANE_NOW = text(f"""
SELECT lane.*, busy.priority AS busy_priority, busy.own AS busy_own, (
    SELECT t.max_running_frames FROM tenants t
    WHERE t.id = CAST(:tenant_id AS uuid)
      -- The leases are counted only for a tenant with this limit.
      AND CASE WHEN t.max_running_frames IS NOT NULL THEN t.max_running_frames <= coalesce((
          SELECT r.frames FROM pg_temp.running_frames(ARRAY[t.id]) r), 0) END
) AS running_limit
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

BACKING_OFF = text("""
SELECT least((SELECT min(not_before) FROM requeued_frames WHERE job_id = :job_id AND isolated),
             (SELECT min(not_before) FROM requeued_frames WHERE job_id = :job_id AND NOT isolated))
""")


def claimable_lanes(connection: Connection) -> list[str]:
    """List the pipelines on which something may be claimed now."""
    return list(connection.execute(CLAIMABLE, {"least": Priority.BULK}).scalars())


def depths(connection: Connection) -> list[LaneDepth]:
    """Count the waiting frames of each lane, by priority."""
    return rows_of(connection.execute(DEPTH), LaneDepth)


def lane_now(connection: Connection, pipeline: str, tenant_id: uuid.UUID | None = None) -> LaneNow:
    """Count a lane's workers: all, able, draining, loading and failed. Add why one failed."""
    values = {"pipeline": pipeline, "tenant_id": tenant_id}
    [lane] = rows_of(connection.execute(LANE_NOW, values), LaneNow)
    return lane


def backing_off_until(connection: Connection, job_id: uuid.UUID) -> datetime | None:
    """Return the time at which the first of a job's requeued frames is due again."""
    due: datetime | None = connection.execute(BACKING_OFF, {"job_id": job_id}).scalar_one()
    return due
