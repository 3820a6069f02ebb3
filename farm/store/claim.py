"""Claiming: the one place where a frame starts to run.

Claims of a lane happen one at a time (an advisory lock), so that order and fairness are exact:

1. the leader: highest priority, then the tenant served least, then a returned frame before a new
   one, then the oldest job;
2. the fill: the leader's own frames, returned ones first, then other jobs' with the same batch_key
   in the same order, until the bucket is full; but a frame whose attempt failed goes alone, so that
   it takes no neighbour down with it again;
3. the writes: cursors advance, frames come into being as `running`, a lease holds them.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, RowMapping, text

from farm.spec import FrameSpec
from farm.store.specs import frame_specs
from farm.store.tally import Delta, lock_jobs, tally


@dataclass(frozen=True)
class ClaimedFrame:
    """A frame that a worker may render: its fence is (job_id, ordinal, attempt)."""

    job_id: uuid.UUID
    tenant_id: uuid.UUID
    ordinal: int
    attempt: int
    spec: FrameSpec

    def __str__(self) -> str:
        return f"job {self.job_id} frame {self.ordinal} attempt {self.attempt}"


@dataclass(frozen=True)
class Lease:
    """A worker's right to a batch, until `expires_at` on Postgres's clock."""

    id: uuid.UUID
    worker_id: uuid.UUID
    pipeline: str
    expires_at: datetime
    frames: tuple[ClaimedFrame, ...]


CHOICES = 5

LOCK_LANE = text("SELECT pg_advisory_xact_lock(hashtextextended('lane ' || :pipeline, 0))")

MAY_CLAIM = text("""
SELECT failing FROM workers
WHERE id = :worker_id AND NOT draining AND coalesce(resting_until <= clock_timestamp(), true)
""")

LEADER = text("""
SELECT head.job_id, head.ordinal, head.alone, head.batch_key, head.bucket
FROM shares s CROSS JOIN LATERAL (
    -- the tenant's first open job: one probe of jobs_claim
    (SELECT j.id AS job_id, NULL::bigint AS ordinal, false AS alone,
            j.batch_key, j.bucket, j.priority, j.created_at, 1 AS kind
     FROM jobs j
     WHERE j.open AND j.pipeline = s.pipeline AND j.tenant_id = s.tenant_id
     ORDER BY j.priority, j.created_at, j.id LIMIT 1)
    UNION ALL
    -- the tenant's first frame that is due again: one probe of returns_claim
    (SELECT r.job_id, r.ordinal, r.alone,
            r.batch_key, r.bucket, r.priority, r.job_created_at, 0
     FROM returns r
     WHERE r.pipeline = s.pipeline AND r.tenant_id = s.tenant_id
       AND NOT r.paused AND r.not_before <= clock_timestamp()
       AND format('%s/%s', r.job_id, r.ordinal) <> ALL(:but)
     ORDER BY r.priority, r.job_created_at, r.job_id, r.ordinal LIMIT 1)
) head
WHERE s.pipeline = :pipeline
ORDER BY head.priority, s.served, head.kind, head.created_at, head.job_id
LIMIT 1
""")

RETURNED = """
SELECT r.job_id, r.ordinal
FROM returns r
WHERE r.pipeline = :pipeline AND r.batch_key = :batch_key
  AND NOT r.paused AND NOT r.alone AND r.not_before <= clock_timestamp()
  AND format('%s/%s', r.job_id, r.ordinal) <> ALL(:but)
"""

OWN_RETURNED = text(f"{RETURNED} AND r.job_id = :leader ORDER BY r.ordinal LIMIT :free")

OTHER_RETURNED = text(f"""{RETURNED} AND r.job_id <> :leader
ORDER BY r.priority, r.job_created_at, r.job_id, r.ordinal LIMIT :free
""")

OWN_ROOM = text("""
SELECT id, run_end - cursor AS room FROM jobs
WHERE id = :leader AND open AND batch_key = :batch_key
""")

OTHER_JOBS = text("""
SELECT id, run_end - cursor AS room FROM jobs
WHERE open AND pipeline = :pipeline AND batch_key = :batch_key AND id <> :leader
ORDER BY priority, created_at, id LIMIT :free
""")

# The cursor moves only here, under the lane's lock; a cancel or a pause in between closes the job.
ADVANCE = text("""
WITH take AS (
    SELECT * FROM unnest(CAST(:ids AS uuid[]), CAST(:counts AS bigint[])) AS t (id, n)
), advanced AS (
    UPDATE jobs j
    SET cursor = j.cursor + t.n,
        open = j.cursor + t.n < j.total,
        run = j.run + ended.by_one,
        run_end = coalesce((j.runs -> (j.run + ended.by_one) ->> 0)::bigint, j.run_end),
        batch_key = coalesce(j.runs -> (j.run + ended.by_one) ->> 1, j.batch_key),
        bucket = coalesce((j.runs -> (j.run + ended.by_one) ->> 2)::smallint, j.bucket)
    FROM take t CROSS JOIN LATERAL (
        SELECT (b.cursor + t.n = b.run_end)::int AS by_one FROM jobs b WHERE b.id = t.id
    ) ended
    WHERE j.id = t.id AND j.open
    RETURNING j.id, j.cursor - t.n AS first, j.cursor AS stop
)
INSERT INTO frames (job_id, ordinal, state, attempt, worker, bucket, started_at)
SELECT id, ordinal, 'running', 1, :worker, :bucket, clock_timestamp()
FROM advanced CROSS JOIN generate_series(first, stop - 1) AS ordinal
RETURNING job_id, ordinal, attempt
""")

TAKE_BACK = text("""
WITH taken AS (
    DELETE FROM returns r
    USING unnest(CAST(:ids AS uuid[]), CAST(:ordinals AS bigint[])) AS t (id, ordinal)
    WHERE r.job_id = t.id AND r.ordinal = t.ordinal AND NOT r.paused
    RETURNING r.job_id, r.ordinal
)
UPDATE frames f
SET state = 'running', attempt = f.attempt + 1, worker = :worker, bucket = :bucket, error = NULL,
    started_at = clock_timestamp(), finished_at = NULL
FROM taken t
WHERE f.job_id = t.job_id AND f.ordinal = t.ordinal AND f.state = 'ready'
RETURNING f.job_id, f.ordinal, f.attempt
""")

OPEN_LEASE = text("""
INSERT INTO leases (id, worker_id, pid, pipeline, expires_at, job_ids, ordinals, attempts)
VALUES (:id, :worker_id, :pid, :pipeline,
        clock_timestamp() + make_interval(secs => :seconds), :job_ids, :ordinals, :attempts)
RETURNING expires_at
""")

SERVE = text("""
UPDATE shares s SET served = s.served + t.n
FROM (SELECT j.tenant_id, count(*) AS n
      FROM unnest(CAST(:job_ids AS uuid[])) AS f (job_id) JOIN jobs j ON j.id = f.job_id
      GROUP BY j.tenant_id) t
WHERE s.pipeline = :pipeline AND s.tenant_id = t.tenant_id
""")

Fence = tuple[uuid.UUID, int, int]
"""(job, ordinal, attempt): what a write after a claim must match."""


def claim(
    connection: Connection,
    *,
    pipeline: str,
    worker_id: uuid.UUID,
    worker: str,
    pid: int,
    lease_seconds: float,
) -> Lease | None:
    """Claim the next batch of a lane, or None where nothing may be claimed.

    A worker that drains or rests, or is unknown, claims nothing.
    """
    connection.execute(LOCK_LANE, {"pipeline": pipeline})
    may_claim = connection.execute(MAY_CLAIM, {"worker_id": worker_id}).first()
    if may_claim is None:
        return None
    # What was chosen may be cancelled or paused before it is locked: then choose again.
    for _ in range(CHOICES):
        leader, but = _leader(connection, pipeline, may_claim.failing)
        if leader is None:
            return None
        fill = _fill(connection, pipeline, leader, but)
        lock_jobs(connection, [job_id for job_id, _ in fill.returned] + list(fill.new))
        by = {"worker": worker, "bucket": leader["bucket"]}
        fences = _take_back(connection, fill.returned, by) + _advance(connection, fill.new, by)
        if fences:
            holder = _Holder(pipeline, worker_id, pid, lease_seconds)
            return _open_lease(connection, holder, leader["bucket"], sorted(fences))
    return None


def _leader(
    connection: Connection, pipeline: str, failing: list[str]
) -> tuple[RowMapping | None, list[str]]:
    """Choose the first frame of a batch, and say which frames are left out of it.

    Those that failed on this very worker are, unless nothing else is there.
    """
    for but in (failing, []) if failing else ([],):
        found = connection.execute(LEADER, {"pipeline": pipeline, "but": but}).mappings().first()
        if found is not None:
            return found, but
    return None, []


@dataclass
class _Fill:
    """What a batch will hold: returned frames, and how many new ones of which job."""

    free: int
    returned: list[tuple[uuid.UUID, int]]
    new: dict[uuid.UUID, int]

    def take_returned(self, rows: Iterable[Row[Any]]) -> None:
        found = [(row.job_id, row.ordinal) for row in rows]
        self.returned += found
        self.free -= len(found)

    def take_new(self, rows: Iterable[Row[Any]]) -> None:
        for row in rows:
            if self.free > 0:
                self.new[row.id] = min(self.free, row.room)
                self.free -= self.new[row.id]


def _fill(connection: Connection, pipeline: str, leader: RowMapping, but: list[str]) -> _Fill:
    if leader["alone"]:
        return _Fill(0, [(leader["job_id"], leader["ordinal"])], {})
    fill = _Fill(leader["bucket"], [], {})
    job_id = leader["job_id"]
    where = {"pipeline": pipeline, "batch_key": leader["batch_key"], "leader": job_id, "but": but}
    fill.take_returned(connection.execute(OWN_RETURNED, {**where, "free": fill.free}))
    fill.take_new(connection.execute(OWN_ROOM, where))
    if fill.free > 0:
        fill.take_returned(connection.execute(OTHER_RETURNED, {**where, "free": fill.free}))
    if fill.free > 0:
        fill.take_new(connection.execute(OTHER_JOBS, {**where, "free": fill.free}))
    return fill


def _take_back(
    connection: Connection, returned: list[tuple[uuid.UUID, int]], by: dict[str, Any]
) -> list[Fence]:
    if not returned:
        return []
    ids, ordinals = [job_id for job_id, _ in returned], [ordinal for _, ordinal in returned]
    rows = connection.execute(TAKE_BACK, {"ids": ids, "ordinals": ordinals, **by})
    return [(row.job_id, row.ordinal, row.attempt) for row in rows]


def _advance(
    connection: Connection, counts: dict[uuid.UUID, int], by: dict[str, Any]
) -> list[Fence]:
    if not counts:
        return []
    rows = connection.execute(ADVANCE, {"ids": list(counts), "counts": list(counts.values()), **by})
    return [(row.job_id, row.ordinal, row.attempt) for row in rows]


@dataclass(frozen=True)
class _Holder:
    """Who a lease is for, and how long."""

    pipeline: str
    worker_id: uuid.UUID
    pid: int
    seconds: float


def _open_lease(connection: Connection, holder: _Holder, bucket: int, fences: list[Fence]) -> Lease:
    lease_id = uuid.uuid4()
    job_ids = [job_id for job_id, _, _ in fences]
    expires_at = connection.execute(
        OPEN_LEASE,
        {
            "id": lease_id,
            "worker_id": holder.worker_id,
            "pid": holder.pid,
            "pipeline": holder.pipeline,
            "seconds": holder.seconds,
            "job_ids": job_ids,
            "ordinals": [ordinal for _, ordinal, _ in fences],
            "attempts": [attempt for _, _, attempt in fences],
        },
    ).scalar_one()
    connection.execute(SERVE, {"pipeline": holder.pipeline, "job_ids": job_ids})
    deltas: dict[uuid.UUID, Delta] = {}
    for job_id, ordinal, attempt in fences:
        delta = deltas.setdefault(job_id, Delta(data={"frames": []}))
        delta.running += 1
        delta.data["frames"].append([ordinal, attempt])
    tally(connection, "frames.claimed", deltas)
    frames = tuple(_with_specs(connection, bucket, fences))
    return Lease(lease_id, holder.worker_id, holder.pipeline, expires_at, frames)


def _with_specs(connection: Connection, bucket: int, fences: list[Fence]) -> list[ClaimedFrame]:
    specs = frame_specs(connection, [(job_id, ordinal) for job_id, ordinal, _ in fences])
    # The bucket is what the frame was claimed in: it may have been halved since it was submitted.
    here = {"bucket": bucket}
    return [
        ClaimedFrame(job_id, tenant_id, ordinal, attempt, spec.model_copy(update=here))
        for (job_id, ordinal, attempt), (tenant_id, spec) in zip(fences, specs, strict=True)
    ]
