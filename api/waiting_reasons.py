"""Why nothing of a job runs now: one sentence, and never a name from another tenant's work."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any

from farm.domain.spec import Priority
from farm.domain.states import TERMINAL
from farm.store import lanes as stored
from farm.store.engine import Transaction

JobRow = Any
"""A row of store.reading.get_job or list_jobs."""


@dataclass
class Lanes:
    """What one request knows of the lanes; each is asked after once, however many jobs wait."""

    connection: Transaction
    tenant_id: uuid.UUID
    _facts: dict[str, Any] = field(default_factory=dict)

    def waiting_because(self, job: JobRow) -> str | None:
        """Say why nothing of a job runs; None where something does, or where it is over."""
        if job.status in TERMINAL or job.running:
            return None
        if job.paused:
            return "It is paused."
        lane = self._lane(job.pipeline)
        return lane_sentence(job.pipeline, lane) or self._backing_off(job) or _busy_sentence(lane)

    def _lane(self, pipeline: str) -> Any:
        if pipeline not in self._facts:
            self._facts[pipeline] = stored.lane_now(self.connection, pipeline, self.tenant_id)
        return self._facts[pipeline]

    def _backing_off(self, job: JobRow) -> str | None:
        if job.open:  # it has frames that were never claimed: they wait for no back-off
            return None
        until = stored.backing_off_until(self.connection, job.id)
        if until is None or until <= job.now:
            return None
        return f"It is backing off until {until:%H:%M:%S} UTC, after a failed attempt."


def lane_sentence(pipeline: str, lane: Any) -> str | None:
    """Say why a lane renders nothing at all; None where a worker of it can."""
    if lane.workers == 0:
        return f"No worker for pipeline {pipeline} is alive."
    if lane.able:
        return None
    if lane.loading:
        return f"The workers are loading pipeline {pipeline}."
    if lane.failed:
        return f"The workers cannot render pipeline {pipeline}: {lane.problem or 'no reason given'}"
    return f"Every worker of pipeline {pipeline} is draining."


def _busy_sentence(lane: Any) -> str:
    if lane.busy_priority is None:
        return "A worker is about to take it."
    work = f"{Priority(lane.busy_priority).wire} jobs"
    return (
        f"The workers are busy with {f'your other {work}' if lane.busy_own else f'other {work}'}."
    )
