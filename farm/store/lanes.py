"""Lanes: the waiting work of each, and the reasons why a job does not run."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
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
    held_from: int | None
    """Priority from which on an operator holds the lane."""
    held_why: str | None
    held_until: datetime | None


class Lane(NamedTuple):
    """A lane: what waits, its workers, and its hold."""

    pipeline: str
    waiting: list[int]
    """Frames that wait, by priority."""
    workers: int
    able: int
    rendering: int
    loading: int
    failed: int
    draining: int
    problem: str | None
    """Reason why one of the failed workers failed."""
    held_from: int | None
    """Priority from which on frames are held. 0: all. None: the lane is not held."""
    held_why: str | None
    held_by: str | None
    """Name of the operator's key."""
    held_at: datetime | None
    held_until: datetime | None
    """None: until it is released."""


CLAIMABLE = text("""
WITH RECURSIVE lane AS (  -- the first share of each lane, by index
    SELECT min(pipeline) AS pipeline FROM shares
    UNION ALL
    SELECT (SELECT min(s.pipeline) FROM shares s WHERE s.pipeline > lane.pipeline)
    FROM lane WHERE lane.pipeline IS NOT NULL
)
SELECT pipeline FROM lane, (SELECT pg_temp.full_tenants() AS ids OFFSET 0) full_now
WHERE EXISTS (SELECT FROM pg_temp.leader(
    lane.pipeline, '{}', pg_temp.served_priority(lane.pipeline), full_now.ids))
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

HELD_NOW = "l.held_from IS NOT NULL AND coalesce(l.held_until > statement_timestamp(), true)"
LANE_STATES = "lane.workers, lane.draining, lane.able, lane.loading, lane.failed, lane.problem"

LANE_NOW = text(f"""
SELECT {LANE_STATES}, busy.priority AS busy_priority, busy.own AS busy_own, (
    SELECT t.max_running_frames FROM tenants t
    WHERE t.id = CAST(:tenant_id AS uuid)
      -- The leases are counted only for a tenant with this limit.
      AND CASE WHEN t.max_running_frames IS NOT NULL THEN t.max_running_frames <= coalesce((
          SELECT r.frames FROM pg_temp.running_frames(ARRAY[t.id]) r), 0) END
) AS running_limit, held.held_from, held.held_why, held.held_until
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
) lane LEFT JOIN LATERAL (
    SELECT l.held_from, l.held_why, l.held_until FROM lanes l
    WHERE l.pipeline = :pipeline AND {HELD_NOW}
) held ON true LEFT JOIN (
    SELECT j.priority, j.tenant_id = :tenant_id AS own
    FROM leases l CROSS JOIN LATERAL (SELECT DISTINCT unnest(l.job_ids) AS job_id) d
    JOIN jobs j ON j.id = d.job_id
    WHERE l.pipeline = :pipeline ORDER BY j.priority, own LIMIT 1
) busy ON true
""")  # noqa: S608 - constants only

LANES = text(f"""
WITH named AS (
    SELECT unnest(CAST(:catalog AS text[])) AS pipeline
    UNION SELECT pipeline FROM workers WHERE NOT gone
    UNION SELECT pipeline FROM shares WHERE priority IS NOT NULL OR retry_at IS NOT NULL
    UNION SELECT l.pipeline FROM lanes l WHERE {HELD_NOW}
), waiting AS (
    SELECT pipeline, pg_temp.array_total(waiting) AS waiting,
           pg_temp.array_total(requeued) AS requeued
    FROM shares WHERE priority IS NOT NULL OR retry_at IS NOT NULL GROUP BY pipeline
), alive AS (
    SELECT pipeline, count(*) AS workers,
           count(*) FILTER (WHERE state IN ('idle', 'rendering') AND NOT draining) AS able,
           count(*) FILTER (WHERE state = 'rendering') AS rendering,
           count(*) FILTER (WHERE state = 'loading') AS loading,
           count(*) FILTER (WHERE state = 'failed') AS failed,
           count(*) FILTER (WHERE draining) AS draining,
           min(problem) FILTER (WHERE state = 'failed') AS problem
    FROM (SELECT w.pipeline, w.draining, {STATE_NOW} AS state, {PROBLEM_NOW} AS problem
          FROM workers w WHERE NOT w.gone) w GROUP BY pipeline
)
SELECT n.pipeline, pg_temp.array_sum(coalesce(w.waiting, '{{0,0,0}}'), w.requeued) AS waiting,
       coalesce(a.workers, 0) AS workers, coalesce(a.able, 0) AS able,
       coalesce(a.rendering, 0) AS rendering, coalesce(a.loading, 0) AS loading,
       coalesce(a.failed, 0) AS failed, coalesce(a.draining, 0) AS draining, a.problem,
       l.held_from, l.held_why, l.held_by, l.held_at, l.held_until
FROM named n LEFT JOIN waiting w ON w.pipeline = n.pipeline
LEFT JOIN alive a ON a.pipeline = n.pipeline
LEFT JOIN lanes l ON l.pipeline = n.pipeline AND {HELD_NOW}
ORDER BY n.pipeline
""")  # noqa: S608 - constants only

KNOWN = text("""
SELECT EXISTS (SELECT FROM shares WHERE pipeline = :pipeline)
    OR EXISTS (SELECT FROM workers WHERE pipeline = :pipeline AND NOT gone)
""")

# Claims of the lane wait for no more than this row.
HOLD = text("""
INSERT INTO lanes (pipeline, owed, held_from, held_why, held_by, held_at, held_until)
VALUES (:pipeline, '{0,0}', :held_from, :why, :by, clock_timestamp(), :until)
ON CONFLICT (pipeline) DO UPDATE
SET held_from = excluded.held_from, held_why = excluded.held_why, held_by = excluded.held_by,
    held_at = excluded.held_at, held_until = excluded.held_until
""")

RELEASE = text(f"""
UPDATE lanes l SET held_from = NULL, held_why = NULL, held_by = NULL, held_at = NULL,
                   held_until = NULL
WHERE l.pipeline = :pipeline AND {HELD_NOW}
""")  # noqa: S608 - constants only

BACKING_OFF = text("""
SELECT least((SELECT min(not_before) FROM requeued_frames WHERE job_id = :job_id AND isolated),
             (SELECT min(not_before) FROM requeued_frames WHERE job_id = :job_id AND NOT isolated))
""")


def claimable_lanes(connection: Connection) -> list[str]:
    """List the pipelines on which something may be claimed now."""
    return list(connection.execute(CLAIMABLE).scalars())


def depths(connection: Connection) -> list[LaneDepth]:
    """Count the waiting frames of each lane, by priority."""
    return rows_of(connection.execute(DEPTH), LaneDepth)


def lane_now(connection: Connection, pipeline: str, tenant_id: uuid.UUID | None = None) -> LaneNow:
    """Count a lane's workers: all, able, draining, loading and failed. Add why one failed."""
    values = {"pipeline": pipeline, "tenant_id": tenant_id}
    [lane] = rows_of(connection.execute(LANE_NOW, values), LaneNow)
    return lane


def list_lanes(connection: Connection, catalog: Iterable[str] = ()) -> list[Lane]:
    """Read the lanes that have work, workers or a hold, and those of these pipelines."""
    values = {"catalog": list(catalog), "tenant_id": None}
    return rows_of(connection.execute(LANES, values), Lane)


def is_known(connection: Connection, pipeline: str) -> bool:
    """Return True if a lane ever had a job, or has a worker."""
    return bool(connection.execute(KNOWN, {"pipeline": pipeline}).scalar_one())


def hold(
    connection: Connection,
    pipeline: str,
    *,
    held_from: Priority,
    why: str,
    by: str,
    until: datetime | None,
) -> None:
    """Hold a lane, in place of the hold that it may have.

    Args:
        connection: in a transaction.
        pipeline: the lane.
        held_from: frames of this priority, and of less urgent ones, are not claimed.
        why: the reason. Every tenant whose jobs wait may read it.
        by: name of the operator's key.
        until: end of the hold. None: until `release`.
    """
    values = {"pipeline": pipeline, "held_from": held_from, "why": why, "by": by, "until": until}
    connection.execute(HOLD, values)


def release(connection: Connection, pipeline: str) -> bool:
    """End the hold of a lane. Return False if it has none."""
    return connection.execute(RELEASE, {"pipeline": pipeline}).rowcount > 0


def backing_off_until(connection: Connection, job_id: uuid.UUID) -> datetime | None:
    """Return the time at which the first of a job's requeued frames is due again."""
    due: datetime | None = connection.execute(BACKING_OFF, {"job_id": job_id}).scalar_one()
    return due
