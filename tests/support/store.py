"""Short functions for tests of the store: submit, claim, complete, and so on."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import text

from farm.context import Farm
from farm.domain.states import FrameState
from farm.services import jobs
from farm.store import frames, keys, leases, queries, workers
from farm.store.claim import ClaimedFrame, Fence, Lease, claim
from farm.store.engine import Connection, transaction
from farm.store.frames import CompletedFrame, FailedAttempt


def submit(farm: Farm, tenant: uuid.UUID, **fields: Any) -> uuid.UUID:
    body = {"pipeline": "demo", "prompts": ["a red star on a blue background"], **fields}
    job_id: uuid.UUID = jobs.submit(farm, tenant, body).id
    return job_id


def new_tenant(farm: Farm, name: str) -> uuid.UUID:
    with transaction(farm.store) as connection:
        return keys.ensure_tenant(connection, name)


def job_row(farm: Farm, tenant: uuid.UUID, job_id: uuid.UUID) -> Any:
    with transaction(farm.store) as connection:
        return queries.get_job(connection, tenant, job_id)


def frame_rows(farm: Farm, job_id: uuid.UUID) -> dict[int, Any]:
    with transaction(farm.store) as connection:
        return {row.ordinal: row for row in queries.list_frames(connection, job_id, limit=10_000)}


def state_of(farm: Farm, job_id: uuid.UUID, ordinal: int = 0) -> FrameState:
    rows = frame_rows(farm, job_id)
    return FrameState(rows[ordinal].state) if ordinal in rows else FrameState.WAITING


def attempts_of(farm: Farm, job_id: uuid.UUID, ordinal: int = 0) -> list[tuple[int, str]]:
    with transaction(farm.store) as connection:
        rows = queries.frame_attempts(connection, job_id, [ordinal])
    return [(row.attempt, row.reason) for row in rows]


def fence(frame: ClaimedFrame) -> Fence:
    return frame.job_id, frame.ordinal, frame.attempt


def sql(farm: Farm, statement: str, **values: Any) -> Any:
    with transaction(farm.store) as connection:
        result = connection.execute(text(statement), values)
        return result.all() if result.returns_rows else result.rowcount


@dataclass(frozen=True)
class FakeWorker:
    """A worker whose every action is a call by the test."""

    farm: Farm
    id: uuid.UUID
    name: str
    pid: int = 1
    plans: str = "{}"
    """Buckets of frames whose bucket is open, as JSON: see `farm.store.claim.claim`."""

    def claim(
        self, pipeline: str = "demo", lease_seconds: float = 60.0, **limits: Any
    ) -> Lease | None:
        with transaction(self.farm.store) as connection:
            return self.claim_in(connection, pipeline, lease_seconds, **limits)

    def claim_in(
        self,
        connection: Connection,
        pipeline: str = "demo",
        lease_seconds: float = 60.0,
        **limits: Any,
    ) -> Lease | None:
        return claim(
            connection,
            pipeline=pipeline,
            worker_id=self.id,
            worker=self.name,
            pid=self.pid,
            lease_seconds=lease_seconds,
            plans=self.plans,
            **{"less_urgent_share": self.farm.settings.less_urgent_share, **limits},
        )

    def must_claim(self) -> Lease:
        lease = self.claim()
        assert lease is not None
        return lease

    def complete(self, lease: Lease, fences: Sequence[Fence] | None = None) -> set[Fence]:
        with transaction(self.farm.store) as connection:
            return self.complete_in(connection, lease, fences)

    def complete_in(
        self, connection: Connection, lease: Lease, fences: Sequence[Fence] | None = None
    ) -> set[Fence]:
        wanted = [fence(frame) for frame in lease.frames] if fences is None else fences
        done = [
            CompletedFrame(item, hashlib.sha256(repr(item).encode()).digest(), 100 + slot, slot)
            for slot, item in enumerate(wanted)
        ]
        return frames.complete(connection, lease.id, done)

    def fail(
        self, lease: Lease, *, retryable: bool = True, fences: Sequence[Fence] | None = None
    ) -> dict[Fence, FrameState]:
        wanted = [fence(frame) for frame in lease.frames] if fences is None else fences
        failures = [FailedAttempt(item, "render_error", "It broke.", retryable) for item in wanted]
        with transaction(self.farm.store) as connection:
            return frames.fail(connection, lease.id, failures, 0.0)

    def lose(self, message: str = "The child ended.", log: str | None = None) -> None:
        """End the leases of this worker's child, as its parent does when the child has ended."""
        with transaction(self.farm.store) as connection:
            leases.end_child_leases(connection, self.id, self.pid, message, 0.0, log)

    def release(self, lease: Lease) -> set[Fence]:
        with transaction(self.farm.store) as connection:
            return frames.release(connection, lease.id, [fence(frame) for frame in lease.frames])


def register_worker(farm: Farm, name: str = "hand", pipeline: str = "demo") -> FakeWorker:
    worker = FakeWorker(farm, uuid.uuid4(), name)
    with transaction(farm.store) as connection:
        workers.register(connection, worker.id, name=name, pipeline=pipeline, host="here", pid=1)
    return worker


def let_leases_expire(farm: Farm) -> set[str]:
    """Move every lease's end into the past, then expire them."""
    sql(farm, "UPDATE leases SET expires_at = clock_timestamp() - interval '1 second'")
    with transaction(farm.store) as connection:
        return leases.expire(connection, 0.0)


def stored_keys(farm: Farm) -> list[str]:
    """List the keys of all objects in the storage, page by page."""
    page = farm.artifacts.list_page()
    keys = [each.key for each in page.objects]
    while page.last is not None:
        page = farm.artifacts.list_page(after=page.last)
        keys += [each.key for each in page.objects]
    return keys


def counts_add_up(farm: Farm, tenant: uuid.UUID, job_id: uuid.UUID) -> None:
    """Check conservation: compare the job's counters with its frames, counted one by one."""
    job = job_row(farm, tenant, job_id)
    states = [row.state for row in frame_rows(farm, job_id).values()]
    assert job.running == states.count("running")
    assert job.succeeded == states.count("succeeded")
    assert job.dead == states.count("dead")
    unclaimed = job.total - job.cursor
    if job.status == "cancelled":
        assert job.cancelled == states.count("cancelled") + unclaimed
    else:
        waiting = job.total - job.running - job.succeeded - job.dead - job.cancelled
        assert waiting == states.count("ready") + unclaimed
