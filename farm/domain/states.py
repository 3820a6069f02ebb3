"""The complete state machine: the allowed transitions of jobs and frames. Pure functions.

Frame                                      Job
-----                                      ---
(waiting) --claim-----> running            queued  --start--> running
ready     --claim-----> running            queued  --cancel-> cancelled
running   --complete--> succeeded          running --settle-> succeeded | partial | failed
running   --fail------> ready | dead       running --cancel-> cancelled
running   --expire----> ready | dead       partial --retry--> running
running   --release---> ready              failed  --retry--> running
running   --cancel----> cancelled
ready     --cancel----> cancelled
dead      --retry-----> ready

A frame that was never claimed has no row: it is `waiting`. A frame that is requeued for another
attempt is `ready`. `paused` is a separate flag of a job, not a status.
"""

from __future__ import annotations

from enum import StrEnum

FLAGGED = "flagged"
"""Reason of an attempt whose image the pipeline's safety checker removed from the result."""
REJECTED = "rejected"
"""Reason of an attempt whose image a filter rejected."""


class FrameState(StrEnum):
    """State of a frame. WAITING means that the frame has no row."""

    WAITING = "waiting"
    RUNNING = "running"
    READY = "ready"
    SUCCEEDED = "succeeded"
    DEAD = "dead"
    CANCELLED = "cancelled"


class JobStatus(StrEnum):
    """Status of a job."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    PARTIAL = "partial"
    FAILED = "failed"
    CANCELLED = "cancelled"


F, J = FrameState, JobStatus

FRAME_TRANSITIONS: dict[str, dict[FrameState, frozenset[FrameState]]] = {
    "claim": {F.WAITING: frozenset({F.RUNNING}), F.READY: frozenset({F.RUNNING})},
    "complete": {F.RUNNING: frozenset({F.SUCCEEDED})},
    "fail": {F.RUNNING: frozenset({F.READY, F.DEAD})},
    "expire": {F.RUNNING: frozenset({F.READY, F.DEAD})},
    "release": {F.RUNNING: frozenset({F.READY})},
    "cancel": {F.RUNNING: frozenset({F.CANCELLED}), F.READY: frozenset({F.CANCELLED})},
    "retry": {F.DEAD: frozenset({F.READY})},
}

JOB_TRANSITIONS: dict[str, dict[JobStatus, frozenset[JobStatus]]] = {
    "start": {J.QUEUED: frozenset({J.RUNNING})},
    "settle": {J.RUNNING: frozenset({J.SUCCEEDED, J.PARTIAL, J.FAILED})},
    "cancel": {J.QUEUED: frozenset({J.CANCELLED}), J.RUNNING: frozenset({J.CANCELLED})},
    "retry": {J.PARTIAL: frozenset({J.RUNNING}), J.FAILED: frozenset({J.RUNNING})},
}

TERMINAL: frozenset[JobStatus] = frozenset({J.SUCCEEDED, J.PARTIAL, J.FAILED, J.CANCELLED})


def settled(total: int, succeeded: int, dead: int, cancelled: int) -> JobStatus | None:
    """Return the final status of a running job. None while a frame of it waits or runs."""
    if succeeded + dead + cancelled < total:
        return None
    if succeeded == total:
        return J.SUCCEEDED
    return J.PARTIAL if succeeded else J.FAILED


def after_failure(retryable: bool, charged: int, max_attempts: int) -> FrameState:
    """Return the state of a frame after a failed attempt. `charged` includes this attempt."""
    return F.READY if retryable and charged < max_attempts else F.DEAD


def retry_delay(attempt: int, base_seconds: float) -> float:
    """Return the delay before the next attempt, in seconds. It doubles, up to a minute."""
    return min(base_seconds * 2.0 ** min(attempt - 1, 30), 60.0)
