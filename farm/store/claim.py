"""Claiming: how a worker gets its next batch. The choice is made in sql/claim.sql."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, text

from farm.domain.spec import FrameSpec, FullSpec, Line, Priority, frame_spec
from farm.store import arrays
from farm.store.lines import Parts, lines_of

Fence = tuple[uuid.UUID, int, int]
"""(job, ordinal, attempt): the values that a write after a claim must match."""


@dataclass(frozen=True)
class ClaimedFrame:
    """A frame that a worker may render. Its fence is (job_id, ordinal, attempt)."""

    job_id: uuid.UUID
    tenant_id: uuid.UUID
    ordinal: int
    attempt: int
    spec: FrameSpec
    reuse: bool = False
    """True if a stored artifact may be reused, provided that its bytes would be the same."""
    waited: float | None = None
    """Seconds from its job's submission to this claim, if it is the job's first."""
    urgency: Priority = Priority.NORMAL
    """Priority of its job."""

    @property
    def fence(self) -> Fence:
        """Values that a write after the claim must match."""
        return self.job_id, self.ordinal, self.attempt

    def __str__(self) -> str:
        return f"job {self.job_id} frame {self.ordinal} attempt {self.attempt}"


@dataclass(frozen=True)
class Lease:
    """A worker's right to a batch, until it expires on Postgres's clock."""

    id: uuid.UUID
    worker_id: uuid.UUID
    pipeline: str
    priority: Priority
    """Priority of its most urgent frame."""
    frames: tuple[ClaimedFrame, ...]
    cost: float = 0.0
    """Bucket x steps x pixels: see ADR 34."""
    limited: bool = False
    """True if a tenant of its frames has a limit of running frames."""
    more: bool = False
    """True if the lane had more work after this claim, so that another worker should wake up."""

    @property
    def frame_cost(self) -> float:
        """Steps x pixels of each frame."""
        return self.cost / self.frames[0].spec.bucket


CLAIM = text("""
SELECT * FROM pg_temp.claim(
    :pipeline, CAST(:worker_id AS uuid), :worker, CAST(:pid AS int), CAST(:lease_id AS uuid),
    CAST(:seconds AS float), CAST(:priority AS smallint), CAST(:known AS uuid[]),
    CAST(:plans AS jsonb), CAST(:share AS float), CAST(:most AS float),
    CAST(:without AS uuid[]))
""")


def claim(
    connection: Connection,
    *,
    pipeline: str,
    worker_id: uuid.UUID,
    worker: str,
    pid: int,
    lease_seconds: float,
    priority: Priority = Priority.BULK,
    plans: str = "{}",
    less_urgent_share: float = 0.0,
    most_cost: float | None = None,
    without: Collection[uuid.UUID] = (),
    known: MutableMapping[uuid.UUID, FullSpec] | None = None,
    parts: Parts | None = None,
) -> Lease | None:
    """Claim the next batch of a lane. Return None if nothing may be claimed.

    A worker that is draining, tripped or unknown claims nothing.

    Args:
        connection: in a transaction or not: this is one statement.
        pipeline: the pipeline of the lane.
        worker_id: the owner of the lease.
        worker: the worker's name.
        pid: the ID of the process that renders.
        lease_seconds: the duration of the lease, unless it is renewed.
        priority: the least urgent priority to claim. With `INTERACTIVE` the batch is to interrupt
            another one.
        plans: JSON of the buckets to choose for 1, 2, … frames, by image size and `default`, for
            frames whose bucket is open: see farm.domain.ladder. Without one, the largest is chosen.
        less_urgent_share: smallest part of the device time for less urgent work, while it waits.
        most_cost: largest bucket x steps x pixels of an interactive batch whose bucket is open, and
            of one that interrupts. Default: no limit.
        without: tenants to leave out.
        known: a cache of job specs, to which new specs are added.
        parts: a cache of input parts, to which new parts are added.
    """
    specs: MutableMapping[uuid.UUID, FullSpec] = {} if known is None else known
    before = dict(specs)  # a copy, since a cache may drop entries during the query
    lease_id = uuid.uuid4()
    rows = connection.execute(
        CLAIM,
        {
            "pipeline": pipeline,
            "worker_id": worker_id,
            "worker": worker,
            "pid": pid,
            "lease_id": lease_id,
            "seconds": lease_seconds,
            "priority": priority,
            "plans": plans,
            "share": less_urgent_share,
            "most": most_cost,
            "without": [*without],
            "known": arrays.ids(before),
        },
    ).all()
    if not rows:
        return None
    found = {row.job_id: FullSpec.model_validate(row.spec) for row in rows if row.spec is not None}
    specs.update(found)
    jobs = before | found
    named = [(row.job_id, row.ordinal) for row in rows if jobs[row.job_id].input is not None]
    lines = lines_of(connection, jobs, named, parts) if named else {}
    frames = tuple(_claimed(row, jobs[row.job_id], lines) for row in rows)
    first = rows[0]
    return Lease(
        lease_id,
        worker_id,
        pipeline,
        Priority(first.priority),
        frames,
        cost=first.cost,
        limited=first.limited,
        more=first.more,
    )


def _claimed(
    row: Row[Any], job: FullSpec, lines: Mapping[tuple[uuid.UUID, int], Line]
) -> ClaimedFrame:
    place = row.job_id, job.prompt_index(row.ordinal)
    line = Line(row.prompt) if job.input is None else lines[place]
    # The bucket of the claim, not of the spec: it may have been halved since the submission.
    spec = frame_spec(job, row.ordinal, line, row.bucket, row.rerolls)
    return ClaimedFrame(
        row.job_id,
        row.tenant_id,
        row.ordinal,
        row.attempt,
        spec,
        job.reuse,
        row.waited,
        Priority(row.urgency),
    )
