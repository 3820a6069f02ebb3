"""The one statement that changes a job's counters, settles its status and appends the event.

Every transition of frames ends here, in the same transaction. Locks are always taken in the same
order, leases, then jobs by id, then frames, then workers, so that no two transactions wait for each
other in a ring.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, text

LOCK_JOBS = text("SELECT id FROM jobs WHERE id = ANY(:ids) ORDER BY id FOR UPDATE")


@dataclass
class Delta:
    """What one transition does to one job's counters, and what its event tells."""

    running: int = 0
    succeeded: int = 0
    dead: int = 0
    cancelled: int = 0
    data: dict[str, Any] = field(default_factory=dict)


def lock_jobs(connection: Connection, job_ids: Iterable[uuid.UUID]) -> None:
    """Lock jobs in the order of their ids, before any of their frames is touched."""
    connection.execute(LOCK_JOBS, {"ids": sorted(set(job_ids))})


# A job settles when its last frame does: `states.settled`, said in SQL, where it is atomic.
TALLY = text("""
WITH delta AS (
    SELECT * FROM unnest(
        CAST(:ids AS uuid[]), CAST(:running AS bigint[]), CAST(:succeeded AS bigint[]),
        CAST(:dead AS bigint[]), CAST(:cancelled AS bigint[]), CAST(:data AS jsonb[])
    ) AS d (id, running, succeeded, dead, cancelled, data)
), counted AS (
    SELECT j.id, j.status AS before,
           j.running + d.running AS running, j.succeeded + d.succeeded AS succeeded,
           j.dead + d.dead AS dead, j.cancelled + d.cancelled AS cancelled, d.data,
           CASE
             WHEN j.status = 'queued' AND d.running > 0 THEN 'running'
             WHEN j.status <> 'running' THEN j.status
             WHEN j.succeeded + d.succeeded + j.dead + d.dead + j.cancelled + d.cancelled < j.total
               THEN 'running'
             WHEN j.succeeded + d.succeeded = j.total THEN 'succeeded'
             WHEN j.succeeded + d.succeeded > 0 THEN 'partial'
             ELSE 'failed'
           END AS status
    FROM delta d JOIN jobs j USING (id)
), written AS (
    UPDATE jobs j
    SET running = c.running, succeeded = c.succeeded, dead = c.dead, cancelled = c.cancelled,
        status = c.status,
        paused = j.paused AND c.status IN ('queued', 'running'),
        started_at = CASE WHEN c.status = 'running' THEN coalesce(j.started_at, clock_timestamp())
                          ELSE j.started_at END,
        finished_at = CASE WHEN c.status IN ('succeeded', 'partial', 'failed')
                           THEN coalesce(j.finished_at, clock_timestamp()) ELSE j.finished_at END
    FROM counted c WHERE j.id = c.id
    RETURNING j.id, j.tenant_id, j.status, c.before, c.data
)
INSERT INTO events (job_id, tenant_id, kind, data)
SELECT id, tenant_id, :kind, data FROM written
UNION ALL
SELECT id, tenant_id, 'job.' || status, '{}' FROM written WHERE status <> before
""")


def tally(connection: Connection, kind: str, deltas: Mapping[uuid.UUID, Delta]) -> None:
    """Apply each job's delta, settle it if that was its last frame, and append `kind` to events.

    The jobs must be locked. Postgres refuses, by constraint, counters that do not add up.
    """
    if not deltas:
        return
    columns = list(deltas.values())
    connection.execute(
        TALLY,
        {
            "kind": kind,
            "ids": list(deltas),
            "running": [delta.running for delta in columns],
            "succeeded": [delta.succeeded for delta in columns],
            "dead": [delta.dead for delta in columns],
            "cancelled": [delta.cancelled for delta in columns],
            "data": [json.dumps(delta.data) for delta in columns],
        },
    )
