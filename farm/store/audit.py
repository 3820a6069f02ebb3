"""Queries of an audit. Each is one statement, and so one snapshot of the running farm.

Jobs and frames are read in the order of their primary keys, and events in the order of their ids.
A job that is being removed is left out, since its rows are deleted in pieces.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal
from typing import NamedTuple

from sqlalchemy import Connection, text

from farm.domain.invariants import AuditedFrame, AuditedJob
from farm.store.rows import row_of, rows_of

STATEMENT_MILLISECONDS = 900_000
"""Time limit in milliseconds: one statement counts a job of ten million frames."""

ONLY_READ = text("SET TRANSACTION READ ONLY")

TAKE_LONG = text(f"SET LOCAL statement_timeout = {STATEMENT_MILLISECONDS}")

SIZES = text("""
SELECT (SELECT count(*) FROM jobs) AS jobs, (SELECT count(*) FROM frames) AS frames,
       (SELECT count(*) FROM events) AS events,
       (SELECT coalesce(max(id), 0) FROM events) AS last_event
""")

# Events are pruned oldest first. A job older than the oldest event may have lost its events.
JOBS = text("""
SELECT j.id, j.status, j.paused, j.open, j.total, j.cursor, j.running, j.succeeded, j.dead,
       j.cancelled, j.finished_at, j.behind_from, f.rows, f.last, coalesce(j.stretch, 1) AS stretch,
       f.rows_of_whole, f.rows_running, f.rows_ready,
       f.rows_succeeded, f.rows_dead, f.rows_cancelled, r.requeued, q.queued,
       j.created_at < coalesce((SELECT min(at) FROM events), clock_timestamp()) AS maybe_pruned
FROM (SELECT * FROM jobs WHERE id > :after AND removed_at IS NULL ORDER BY id LIMIT :limit) j
CROSS JOIN LATERAL (
    SELECT count(*) AS rows, coalesce(max(ordinal), -1) AS last,
           count(*) FILTER (
               WHERE ordinal < j.cursor - j.cursor % coalesce(j.stretch, 1)) AS rows_of_whole,
           count(*) FILTER (WHERE state = 'running') AS rows_running,
           count(*) FILTER (WHERE state = 'ready') AS rows_ready,
           count(*) FILTER (WHERE state = 'succeeded') AS rows_succeeded,
           count(*) FILTER (WHERE state = 'dead') AS rows_dead,
           count(*) FILTER (WHERE state = 'cancelled') AS rows_cancelled
    FROM frames WHERE job_id = j.id
) f
CROSS JOIN LATERAL (SELECT count(*) AS requeued FROM requeued_frames WHERE job_id = j.id) r
CROSS JOIN LATERAL (
    SELECT count(*) AS queued FROM events WHERE job_id = j.id AND kind = 'job.queued'
) q
ORDER BY j.id
""")

# A succeeded frame stays succeeded, so its event must agree with its row.
WINNERS = text("""
SELECT t.job_id, t.ordinal, t.attempts, f.state, f.attempt
FROM (
    SELECT e.job_id, (fence ->> 0)::bigint AS ordinal,
           array_agg((fence ->> 1)::int ORDER BY e.id) AS attempts
    FROM events e CROSS JOIN LATERAL jsonb_array_elements(e.data -> 'frames') AS d (fence)
    WHERE e.job_id = ANY(:ids) AND e.kind = 'frames.succeeded'
    GROUP BY 1, 2
) t
JOIN jobs j ON j.id = t.job_id AND j.removed_at IS NULL
LEFT JOIN frames f ON f.job_id = t.job_id AND f.ordinal = t.ordinal
WHERE cardinality(t.attempts) > 1
   OR f.state IS DISTINCT FROM 'succeeded' OR f.attempt <> t.attempts[1]
ORDER BY t.job_id, t.ordinal LIMIT :limit
""")

LEASES = text("""
SELECT l.id AS lease_id, d.job_id, d.ordinal, d.attempt, f.attempt AS latest
FROM leases l
CROSS JOIN LATERAL unnest(l.job_ids, l.ordinals, l.attempts) AS d (job_id, ordinal, attempt)
JOIN jobs j ON j.id = d.job_id AND j.removed_at IS NULL
LEFT JOIN frames f ON f.job_id = d.job_id AND f.ordinal = d.ordinal
WHERE f.attempt IS NULL OR f.attempt < d.attempt
ORDER BY d.job_id, d.ordinal LIMIT :limit
""")

# The sums of a share must be exact. Its bounds may be lower than the truth, and never higher: work
# above them would not be claimed.
SHARES = text("""
SELECT s.pipeline, s.tenant_id, s.waiting, s.requeued, s.priority, s.retry_at,
       w.waiting AS really_waiting, r.requeued AS really_requeued, s.waiting_cost,
       c.cost AS really_waiting_cost, hidden.job_id AS hidden
FROM shares s
CROSS JOIN LATERAL (
    SELECT array_agg(n.frames ORDER BY p.priority) AS waiting
    FROM generate_series(0, 2) AS p (priority) CROSS JOIN LATERAL (
        SELECT coalesce(sum(j.total - j.cursor), 0)::bigint AS frames FROM jobs j
        WHERE j.open AND j.pipeline = s.pipeline AND j.tenant_id = s.tenant_id
          AND j.priority = p.priority
    ) n
) w
CROSS JOIN LATERAL (
    SELECT array_agg(n.frames ORDER BY p.priority) AS requeued
    FROM generate_series(0, 2) AS p (priority) CROSS JOIN LATERAL (
        SELECT count(*) AS frames FROM requeued_frames f
        WHERE NOT f.paused AND f.pipeline = s.pipeline AND f.tenant_id = s.tenant_id
          AND f.priority = p.priority
    ) n
) r
CROSS JOIN LATERAL (
    SELECT coalesce((
        SELECT sum(job_cost(j.id, j.runs, j.cursor, j.stretch)) FROM jobs j
        WHERE j.open AND j.pipeline = s.pipeline AND j.tenant_id = s.tenant_id
    ), 0) + coalesce((
        SELECT sum(frame_cost(f.batch_key)) FROM requeued_frames f
        WHERE NOT f.paused AND f.pipeline = s.pipeline AND f.tenant_id = s.tenant_id
    ), 0) AS cost
) c
LEFT JOIN LATERAL (
    (SELECT j.id AS job_id FROM jobs j
     WHERE j.open AND j.pipeline = s.pipeline AND j.tenant_id = s.tenant_id
       AND j.priority < coalesce(s.priority, 3)
     LIMIT 1)
    UNION ALL
    (SELECT f.job_id FROM requeued_frames f JOIN jobs j ON j.id = f.job_id
     WHERE NOT f.paused AND f.pipeline = s.pipeline AND f.tenant_id = s.tenant_id
       AND f.priority < coalesce(s.priority, 3)
       AND f.not_before < coalesce(s.retry_at, 'infinity')
       AND NOT j.paused AND j.status <> 'cancelled'
     LIMIT 1)
    LIMIT 1
) hidden ON true
WHERE s.waiting <> w.waiting OR s.requeued <> r.requeued OR s.waiting_cost <> c.cost
   OR hidden.job_id IS NOT NULL
ORDER BY s.pipeline, s.tenant_id LIMIT :limit
""")

FRAMES = text("""
WITH chunk AS MATERIALIZED (
    SELECT * FROM frames WHERE (job_id, ordinal) > (:job_id, :ordinal)
    ORDER BY job_id, ordinal LIMIT :limit
), held AS MATERIALIZED (
    SELECT d.job_id, d.ordinal, d.attempt, count(*) AS leases
    FROM leases l
    CROSS JOIN LATERAL unnest(l.job_ids, l.ordinals, l.attempts) AS d (job_id, ordinal, attempt)
    GROUP BY 1, 2, 3
), formats AS MATERIALIZED (
    -- once per job, since a spec may be long; one without a format is older than formats
    SELECT id, coalesce(spec ->> 'format', 'png') AS format
    FROM jobs WHERE id IN (SELECT job_id FROM chunk)
)
SELECT c.job_id, c.ordinal, c.state, c.attempt, c.uncharged, c.sha256, c.bytes, s.format,
       j.tenant_id, j.max_attempts, j.removed_at IS NOT NULL AS removed,
       a.earlier, a.latest, a.outside, a.without_reason,
       coalesce(h.leases, 0) AS leases, r.job_id IS NOT NULL AS requeued
FROM chunk c
JOIN jobs j ON j.id = c.job_id
JOIN formats s ON s.id = c.job_id
CROSS JOIN LATERAL (
    SELECT count(*) FILTER (WHERE attempt < c.attempt AND attempt > 0) AS earlier,
           count(*) FILTER (WHERE attempt = c.attempt) AS latest,
           count(*) FILTER (WHERE attempt > c.attempt OR attempt < 1) AS outside,
           count(*) FILTER (WHERE reason = '') AS without_reason
    FROM attempts WHERE job_id = c.job_id AND ordinal = c.ordinal
) a
LEFT JOIN held h ON h.job_id = c.job_id AND h.ordinal = c.ordinal AND h.attempt = c.attempt
LEFT JOIN requeued_frames r ON r.job_id = c.job_id AND r.ordinal = c.ordinal
ORDER BY c.job_id, c.ordinal
""")

SUCCEEDED = text("""
SELECT f.sha256, f.bytes FROM frames f JOIN jobs j ON j.id = f.job_id
WHERE f.job_id = :job_id AND f.ordinal = :ordinal AND f.state = 'succeeded'
  AND j.removed_at IS NULL
""")

# A removed job has an event `job.removed`, so its event `job.queued` may outlive its row.
QUEUED = text("""
WITH chunk AS MATERIALIZED (
    SELECT id, job_id, kind FROM events WHERE id > :after AND id <= :last
    ORDER BY id LIMIT :limit
)
SELECT count(*) AS read, max(id) AS last, count(*) FILTER (WHERE c.kind = 'job.queued') AS queued,
       array_agg(c.job_id) FILTER (
           WHERE c.kind = 'job.queued'
             AND NOT EXISTS (SELECT FROM jobs j WHERE j.id = c.job_id)
             AND NOT EXISTS (SELECT FROM events e
                             WHERE e.job_id = c.job_id AND e.kind = 'job.removed')
       ) AS lost
FROM chunk c
""")


class Sizes(NamedTuple):
    """Numbers of rows, and the id of the last event."""

    jobs: int
    frames: int
    events: int
    last_event: int


class WrongWinner(NamedTuple):
    """A frame whose success events do not agree with its row."""

    job_id: uuid.UUID
    ordinal: int
    attempts: list[int]
    """Attempts that its events call successful."""
    state: str | None
    attempt: int | None


class WrongLease(NamedTuple):
    """An entry of a lease that is not an attempt of any frame."""

    lease_id: uuid.UUID
    job_id: uuid.UUID
    ordinal: int
    attempt: int
    latest: int | None
    """Latest attempt of the frame. None if it has no row."""


class WrongShare(NamedTuple):
    """A share of a tenant whose sums or bounds are wrong."""

    pipeline: str
    tenant_id: uuid.UUID
    waiting: list[int]
    requeued: list[int]
    priority: int | None
    retry_at: datetime | None
    really_waiting: list[int]
    really_requeued: list[int]
    waiting_cost: Decimal
    really_waiting_cost: Decimal
    hidden: uuid.UUID | None
    """A job with frames that no claim would find."""


class SucceededFrame(NamedTuple):
    """Properties that the artifact of a succeeded frame must have."""

    sha256: bytes
    bytes: int


class QueuedEvents(NamedTuple):
    """A slice of the events."""

    read: int
    last: int | None
    queued: int
    lost: list[uuid.UUID] | None
    """Jobs that were queued, and have no row and no event of a removal."""


def only_read(connection: Connection) -> None:
    """Make a transaction that has just begun read-only, with a long time limit."""
    connection.execute(ONLY_READ)
    connection.execute(TAKE_LONG)


def sizes(connection: Connection) -> Sizes:
    """Count jobs, frames and events, and read the id of the last event."""
    [found] = rows_of(connection.execute(SIZES), Sizes)
    return found


def jobs_after(connection: Connection, after: uuid.UUID, limit: int) -> list[AuditedJob]:
    """Read the next jobs: counters, and counts of frames, requeued frames and `job.queued`."""
    return rows_of(connection.execute(JOBS, {"after": after, "limit": limit}), AuditedJob)


def wrong_winners(
    connection: Connection, job_ids: Sequence[uuid.UUID], limit: int
) -> list[WrongWinner]:
    """Find frames of some jobs whose success events do not agree with their rows."""
    values = {"ids": list(job_ids), "limit": limit}
    return rows_of(connection.execute(WINNERS, values), WrongWinner)


def wrong_leases(connection: Connection, limit: int) -> list[WrongLease]:
    """Find entries of leases that are not an attempt of any frame."""
    return rows_of(connection.execute(LEASES, {"limit": limit}), WrongLease)


def wrong_shares(connection: Connection, limit: int) -> list[WrongShare]:
    """Find shares whose sums are wrong, or whose bounds hide work from the claims."""
    return rows_of(connection.execute(SHARES, {"limit": limit}), WrongShare)


def frames_after(
    connection: Connection, job_id: uuid.UUID, ordinal: int, limit: int
) -> list[AuditedFrame]:
    """Read the next frames: numbers of attempts and of leases, and True if requeued."""
    values = {"job_id": job_id, "ordinal": ordinal, "limit": limit}
    return rows_of(connection.execute(FRAMES, values), AuditedFrame)


def succeeded_frame(
    connection: Connection, job_id: uuid.UUID, ordinal: int
) -> SucceededFrame | None:
    """Read the sha256 and size that a frame's artifact must have. None if it has none now."""
    values = {"job_id": job_id, "ordinal": ordinal}
    return row_of(connection.execute(SUCCEEDED, values), SucceededFrame)


def queued_after(connection: Connection, after: int, last: int, limit: int) -> QueuedEvents:
    """Read the next events up to `last`. Return the jobs that they queued and that are lost."""
    values = {"after": after, "last": last, "limit": limit}
    [found] = rows_of(connection.execute(QUEUED, values), QueuedEvents)
    return found
