"""The reason why no frame of a job runs now, in one sentence.

It never has a name from another tenant's work.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field

from farm.domain.spec import Priority
from farm.domain.states import TERMINAL
from farm.store import lanes as stored
from farm.store.engine import Transaction
from farm.store.lanes import LaneNow
from farm.store.queries import JobRow


@dataclass
class Lanes:
    """Lanes of one request. Each is read once, even if several jobs wait on it."""

    connection: Transaction
    tenant_id: uuid.UUID
    _facts: dict[str, LaneNow] = field(default_factory=dict)

    def waiting_because(self, job: JobRow) -> str | None:
        """Return the reason why no frame of a job runs; None if one runs or the job has ended."""
        if job.status in TERMINAL or job.running:
            return None
        if job.paused:
            return "It is paused."
        lane = self._lane(job.pipeline)
        return lane_sentence(job.pipeline, lane) or self._backing_off(job) or _busy_sentence(lane)

    def _lane(self, pipeline: str) -> LaneNow:
        if pipeline not in self._facts:
            self._facts[pipeline] = stored.lane_now(self.connection, pipeline, self.tenant_id)
        return self._facts[pipeline]

    def _backing_off(self, job: JobRow) -> str | None:
        if job.open:  # it has frames that were never claimed, which have no back-off
            return None
        until = stored.backing_off_until(self.connection, job.id)
        if until is None or until <= job.now:
            return None
        return f"It is backing off until {until:%H:%M:%S} UTC, after a failed attempt."


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


def _busy_sentence(lane: LaneNow) -> str:
    if lane.busy_priority is None:
        return "A worker is about to take it."
    work = f"{Priority(lane.busy_priority).wire} jobs"
    return (
        f"The workers are busy with {f'your other {work}' if lane.busy_own else f'other {work}'}."
    )
