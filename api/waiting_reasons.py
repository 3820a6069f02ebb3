"""The reason why no frame of a job runs now: a code, a sentence, and the facts behind it.

The first reason of a fixed order that holds is given. It has no name from another tenant's work.
"""

from __future__ import annotations

import threading
import uuid
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from cachetools import TTLCache

from api.schemas import WaitingReason
from farm.domain.spec import Priority
from farm.domain.states import TERMINAL, JobStatus
from farm.errors import Unavailable
from farm.store import history, serving
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

    def reason(self, job: JobRow) -> WaitingReason | None:
        """Return the reason why no frame of a job runs; None if one runs or the job has ended."""
        if job.status in TERMINAL or job.running:
            return None
        if job.paused:
            return _reason("paused", "It is paused.")
        lane = self._lane(job)
        return (
            _held(job, lane)
            or lane_reason(job.pipeline, lane)
            or self._backing_off(job)
            or _limit(lane)
            or _busy(lane)
        )

    def explained(self, job: JobRow, everywhere: bool) -> WaitingReason | None:
        """Return the reason with what is ahead of a job. Of one job only: it reads more.

        Args:
            job: the job.
            everywhere: say also whose frames are ahead. Strangers get the sum only, as in quotes.
        """
        reason = self.reason(job)
        if reason is None or reason.code not in ("busy", "next") or not job.open:
            return reason
        ahead = serving.ahead_of(self.connection, job)
        speed = history.speed(self.connection, job.pipeline)
        evidence = {
            **reason.evidence,
            "frames_ahead": ahead.frames,
            "seconds_until_start": ahead.frames / speed if speed else None,
        }
        if everywhere:
            evidence |= {
                "own_earlier": ahead.own,
                "more_urgent": ahead.more_urgent,
                "other_tenants": ahead.others,
                "frames_per_second": speed,
            }
        return WaitingReason(code=reason.code, sentence=reason.sentence, evidence=evidence)

    def _lane(self, job: JobRow) -> LaneNow:
        key = job.pipeline, job.tenant_id
        if key not in self._facts:
            self._facts[key] = stored.lane_now(self.connection, *key)
        return self._facts[key]

    def _backing_off(self, job: JobRow) -> WaitingReason | None:
        if job.open:  # it has frames that were never claimed, which have no back-off
            return None
        until = stored.backing_off_until(self.connection, job.id)
        if until is None or until <= job.now:
            return None
        sentence = f"It is backing off until {until:%H:%M:%S} UTC, after a failed attempt."
        return _reason("backing_off", sentence, until=_time(until))


class RecentLanes:
    """Lanes as they were within the last second: for the answers to submissions."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._facts: TTLCache[tuple[uuid.UUID, str], LaneNow] = TTLCache(MAX_LANES, LANE_SECONDS)
        self._lock = threading.Lock()

    def reason(self, job: JobRow) -> WaitingReason | None:
        """Return what `Lanes.reason` does, mostly without a statement.

        None if Postgres does not answer now: the job is stored already.
        """
        try:
            return self._reason(job)
        except Unavailable:
            return None

    def _reason(self, job: JobRow) -> WaitingReason | None:
        if job.status != JobStatus.QUEUED or job.paused or not job.open:
            with reads(self._store) as connection:
                return Lanes(connection).reason(job)
        lane = self._lane(job)
        return _held(job, lane) or lane_reason(job.pipeline, lane) or _limit(lane) or _busy(lane)

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


def _reason(code: str, sentence: str, **evidence: Any) -> WaitingReason:
    return WaitingReason(code=code, sentence=sentence, evidence=evidence)


def _time(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()


def _held(job: JobRow, lane: LaneNow) -> WaitingReason | None:
    if lane.held_from is None or job.priority < lane.held_from:
        return None
    until = f", until {lane.held_until:%Y-%m-%d %H:%M:%S} UTC" if lane.held_until else ""
    return _reason(
        "lane_held",
        f"An operator holds pipeline {job.pipeline}{until}: {lane.held_why}",
        priority=Priority(lane.held_from).wire,
        why=lane.held_why,
        until=_time(lane.held_until),
    )


def lane_reason(pipeline: str, lane: LaneNow) -> WaitingReason | None:
    """Return the reason why a lane renders nothing; None if one of its workers can render."""
    if lane.workers == 0:
        return _reason("no_worker", f"No worker for pipeline {pipeline} is alive.")
    if lane.able:
        return None
    if lane.loading:
        sentence = f"The workers are loading pipeline {pipeline}."
        return _reason("loading", sentence, workers=lane.loading)
    if lane.failed:
        problem = lane.problem or "no reason given"
        return _reason(
            "workers_failed",
            f"The workers cannot render pipeline {pipeline}: {problem}",
            workers=lane.failed,
            problem=problem,
        )
    sentence = f"Every worker of pipeline {pipeline} is draining."
    return _reason("draining", sentence, workers=lane.draining)


def _limit(lane: LaneNow) -> WaitingReason | None:
    limit = lane.running_limit
    if limit is None:
        return None
    sentence = (
        f"As many frames run as this tenant may have: max_running_frames is {limit}."
        if limit
        else "max_running_frames of this tenant is 0, so nothing of it runs."
    )
    return _reason("tenant_limit", sentence, max_running_frames=limit)


def _busy(lane: LaneNow) -> WaitingReason:
    if lane.busy_priority is None:
        return _reason("next", "A worker is about to take it.")
    work = f"{Priority(lane.busy_priority).wire} jobs"
    return _reason(
        "busy",
        f"The workers are busy with {f'your other {work}' if lane.busy_own else f'other {work}'}.",
        priority=Priority(lane.busy_priority).wire,
        own=bool(lane.busy_own),
        workers=lane.able,
    )
