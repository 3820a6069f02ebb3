"""The reason why no frame of a job runs now, in one sentence.

It never has a name from another tenant's work.
"""

from __future__ import annotations

import threading
import uuid
from dataclasses import dataclass, field

from cachetools import TTLCache

from farm.domain.spec import Priority
from farm.domain.states import TERMINAL, JobStatus
from farm.errors import Unavailable
from farm.store import lanes as stored
from farm.store.engine import Store, Transaction, reads
from farm.store.lanes import LaneNow
from farm.store.queries import JobRow

LANE_SECONDS = 1.0
MAX_LANES = 10_000
"""Maximum number of lanes of tenants that a process remembers."""


@dataclass
class Lanes:
    """Lanes of one request. Each is read once for a tenant, even if several of its jobs wait."""

    connection: Transaction
    _facts: dict[tuple[str, uuid.UUID], LaneNow] = field(default_factory=dict)

    def waiting_because(self, job: JobRow) -> str | None:
        """Return the reason why no frame of a job runs; None if one runs or the job has ended."""
        if job.status in TERMINAL or job.running:
            return None
        if job.paused:
            return "It is paused."
        lane = self._lane(job)
        return (
            _held_sentence(job, lane)
            or lane_sentence(job.pipeline, lane)
            or self._backing_off(job)
            or _limit_sentence(lane)
            or _busy_sentence(lane)
        )

    def _lane(self, job: JobRow) -> LaneNow:
        key = job.pipeline, job.tenant_id
        if key not in self._facts:
            self._facts[key] = stored.lane_now(self.connection, *key)
        return self._facts[key]

    def _backing_off(self, job: JobRow) -> str | None:
        if job.open:  # it has frames that were never claimed, which have no back-off
            return None
        until = stored.backing_off_until(self.connection, job.id)
        if until is None or until <= job.now:
            return None
        return f"It is backing off until {until:%H:%M:%S} UTC, after a failed attempt."


class RecentLanes:
    """Lanes as they were within the last second: for the answers to submissions."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._facts: TTLCache[tuple[uuid.UUID, str], LaneNow] = TTLCache(MAX_LANES, LANE_SECONDS)
        self._lock = threading.Lock()

    def waiting_because(self, job: JobRow) -> str | None:
        """Return what `Lanes.waiting_because` does, mostly without a statement.

        None if Postgres does not answer now: the job is stored already.
        """
        try:
            return self._reason(job)
        except Unavailable:
            return None

    def _reason(self, job: JobRow) -> str | None:
        if job.status != JobStatus.QUEUED or job.paused or not job.open:
            with reads(self._store) as connection:
                return Lanes(connection).waiting_because(job)
        lane = self._lane(job)
        return (
            _held_sentence(job, lane)
            or lane_sentence(job.pipeline, lane)
            or _limit_sentence(lane)
            or _busy_sentence(lane)
        )

    def _lane(self, job: JobRow) -> LaneNow:
        key = job.tenant_id, job.pipeline
        with self._lock:
            lane = self._facts.get(key)
        if lane is None:
            with reads(self._store) as connection:
                lane = stored.lane_now(connection, job.pipeline, job.tenant_id)
            with self._lock:
                self._facts[key] = lane
        return lane


def _held_sentence(job: JobRow, lane: LaneNow) -> str | None:
    if lane.held_from is None or job.priority < lane.held_from:
        return None
    until = f", until {lane.held_until:%Y-%m-%d %H:%M:%S} UTC" if lane.held_until else ""
    return f"An operator holds pipeline {job.pipeline}{until}: {lane.held_why}"


def lane_sentence(pipeline: str, lane: LaneNow) -> str | None:
    """Return the reason why a lane renders nothing; None if one of its workers can render."""
    if lane.workers == 0:
        return f"No worker for pipeline {pipeline} is alive."
    if lane.able:
        return None
    if lane.loading:
        return f"The workers are loading pipeline {pipeline}."
    if lane.failed:
        return f"The workers cannot render pipeline {pipeline}: {lane.problem or 'no reason given'}"
    return f"Every worker of pipeline {pipeline} is draining."


def _limit_sentence(lane: LaneNow) -> str | None:
    if lane.running_limit is None:
        return None
    return (
        f"As many frames run as this tenant may have: max_running_frames is {lane.running_limit}."
        if lane.running_limit
        else "max_running_frames of this tenant is 0, so nothing of it runs."
    )


def _busy_sentence(lane: LaneNow) -> str:
    if lane.busy_priority is None:
        return "A worker is about to take it."
    work = f"{Priority(lane.busy_priority).wire} jobs"
    return (
        f"The workers are busy with {f'your other {work}' if lane.busy_own else f'other {work}'}."
    )
