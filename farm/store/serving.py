"""Serving of lanes: which tenants use a lane, which jobs are next, and what is ahead of a job."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import Connection, text

from farm.store.queries import JobRow
from farm.store.rows import rows_of

MOST_USERS = 500
TENANTS, JOBS_OF_TENANT = 50, 20
"""Tenants whose jobs are looked at for the order of serving, and jobs of each."""
PICKS = 5000
"""Batches that are looked ahead."""

USERS = text("""
WITH running AS (
    SELECT l.pipeline, f.tenant_id, count(*) AS frames
    FROM leases l CROSS JOIN LATERAL unnest(coalesce(l.tenant_ids, ARRAY(
        SELECT j.tenant_id FROM unnest(l.job_ids) AS u (id) JOIN jobs j ON j.id = u.id
    ))) AS f (tenant_id) GROUP BY l.pipeline, f.tenant_id
), waiting AS (
    SELECT s.pipeline, s.tenant_id,
           s.waiting[1] + s.waiting[2] + s.waiting[3]
           + s.requeued[1] + s.requeued[2] + s.requeued[3] AS frames
    FROM shares s WHERE s.priority IS NOT NULL OR s.retry_at IS NOT NULL
)
SELECT pipeline, t.name AS tenant, coalesce(r.frames, 0) AS running,
       coalesce(w.frames, 0)::bigint AS waiting, t.max_running_frames
FROM running r FULL JOIN waiting w USING (pipeline, tenant_id)
JOIN tenants t ON t.id = tenant_id
WHERE t.removed_at IS NULL AND pipeline = coalesce(CAST(:pipeline AS text), pipeline)
ORDER BY running DESC, waiting DESC, t.name LIMIT :limit
""")

# The beginning of an index of open jobs.
INTERACTIVE_WAITS = text("""
SELECT j.pipeline, extract(epoch FROM clock_timestamp() - min(j.created_at))::float AS seconds
FROM jobs j WHERE j.open AND j.priority = 0 AND j.started_at IS NULL GROUP BY j.pipeline
""")

HEADS = text("""
SELECT s.tenant_id, t.name AS tenant, t.weight, s.used, j.*
FROM (
    SELECT s.tenant_id, s.used FROM shares s
    WHERE s.pipeline = :pipeline AND s.priority IS NOT NULL
    ORDER BY s.priority, s.used, s.tenant_id LIMIT :tenants
) s JOIN tenants t ON t.id = s.tenant_id CROSS JOIN LATERAL (
    SELECT j.id, j.priority, j.total - j.cursor AS frames, j.bucket,
           frame_cost(j.batch_key) AS cost, j.created_at,
           left(j.spec -> 'prompts' ->> 0, 200) AS prompt
    FROM jobs j WHERE j.open AND j.pipeline = :pipeline AND j.tenant_id = s.tenant_id
    ORDER BY j.priority, j.created_at, j.id LIMIT :jobs
) j
""")

AHEAD = text("""
WITH own AS (
    SELECT coalesce(sum(j.total - j.cursor), 0)::bigint AS frames FROM jobs j
    WHERE j.open AND j.pipeline = :pipeline AND j.tenant_id = :tenant_id AND j.priority = :priority
      AND (j.created_at, j.id) < (:created_at, :id)
)
SELECT (SELECT frames FROM own) AS own,
       coalesce(sum((SELECT sum(n) FROM unnest(s.waiting[1:CAST(:priority AS int)]) n)), 0)::bigint
           AS more_urgent,
       coalesce(sum(least(s.waiting[CAST(:priority AS int) + 1],
                          (SELECT frames FROM own) + (SELECT bucket FROM jobs WHERE id = :id)))
                FILTER (WHERE s.tenant_id <> :tenant_id), 0)::bigint AS others
FROM shares s
WHERE s.pipeline = :pipeline AND (s.priority IS NOT NULL OR s.retry_at IS NOT NULL)
""")


class LaneUser(NamedTuple):
    """A tenant with frames on a lane."""

    pipeline: str
    tenant: str
    running: int
    """Frames that are claimed and whose batch has not ended."""
    waiting: int
    max_running_frames: int | None
    """Limit of the tenant on all lanes together."""


class Head(NamedTuple):
    """A job that waits, with the share of its tenant."""

    tenant_id: uuid.UUID
    tenant: str
    weight: float
    used: float
    id: uuid.UUID
    priority: int
    frames: int
    bucket: int
    cost: int
    created_at: datetime
    prompt: str | None
    """Begin of its first prompt."""


@dataclass(frozen=True)
class Turn:
    """A job in the order in which a lane will probably serve it."""

    job: Head
    frames_before: int | None
    """Frames that are claimed before its first one. None: too many to look ahead."""


class Ahead(NamedTuple):
    """Frames that will probably be claimed before a job's first one."""

    own: int
    """Of earlier jobs of its tenant with the same priority."""
    more_urgent: int
    others: int
    """Of other tenants with the same priority, as far as their shares let them go first."""

    @property
    def frames(self) -> int:
        """The sum."""
        return self.own + self.more_urgent + self.others


def users(connection: Connection, pipeline: str | None = None) -> list[LaneUser]:
    """List the tenants with frames on a lane, or on all: those with most running frames first."""
    values = {"pipeline": pipeline, "limit": MOST_USERS}
    return rows_of(connection.execute(USERS, values), LaneUser)


def interactive_waits(connection: Connection) -> dict[str, float]:
    """Return how long the oldest interactive job of each lane has waited to start, in seconds."""
    rows = connection.execute(INTERACTIVE_WAITS).all()
    return {pipeline: float(seconds) for pipeline, seconds in rows}


def order(connection: Connection, pipeline: str, limit: int) -> list[Turn]:
    """Return the jobs of a lane in the order in which they will probably be served.

    Claims choose by priority, then the tenant with the smallest share, then the oldest job. The
    order changes with each job that is submitted. Frames that wait again are left out.
    """
    values = {"pipeline": pipeline, "tenants": TENANTS, "jobs": JOBS_OF_TENANT}
    return turns_of(rows_of(connection.execute(HEADS, values), Head), limit)


def turns_of(heads: Sequence[Head], limit: int) -> list[Turn]:
    """Order jobs as claims would choose them, one batch after another."""
    queues: dict[uuid.UUID, list[Head]] = {}
    for head in sorted(heads, key=lambda each: (each.priority, each.created_at, each.id)):
        queues.setdefault(head.tenant_id, []).append(head)
    used = {head.tenant_id: head.used for head in heads}
    left = {head.id: head.frames for head in heads}
    turns: dict[uuid.UUID, Turn] = {}
    served = 0
    for _ in range(PICKS):
        if not queues or len(turns) >= limit:
            break
        tenant = min(queues, key=lambda each: (queues[each][0].priority, used[each], each))
        job = queues[tenant][0]
        turns.setdefault(job.id, Turn(job, served))
        batch = min(job.bucket, left[job.id])
        used[tenant] += job.bucket * job.cost / job.weight
        served += batch
        left[job.id] -= batch
        if left[job.id] <= 0:
            queues[tenant].pop(0)
            if not queues[tenant]:
                del queues[tenant]
    later = (head for queue in queues.values() for head in queue if head.id not in turns)
    rest = sorted(later, key=lambda each: (each.priority, each.created_at, each.id))
    return [*turns.values(), *(Turn(head, None) for head in rest)][:limit]


def ahead_of(connection: Connection, job: JobRow) -> Ahead:
    """Estimate what is claimed before the first frame of a job that waits."""
    values = {
        "pipeline": job.pipeline,
        "tenant_id": job.tenant_id,
        "priority": job.priority,
        "created_at": job.created_at,
        "id": job.id,
    }
    return Ahead(*connection.execute(AHEAD, values).one())
