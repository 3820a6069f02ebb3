"""What must hold of a job and of a frame, said as pure functions of what one snapshot shows."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from enum import StrEnum
from typing import Any

from pydantic import BaseModel

from farm.domain.states import TERMINAL, FrameState, JobStatus, settled


class Invariant(StrEnum):
    """What an audit checks."""

    DURABILITY = "durability"
    """A job that was accepted is there until it is removed."""
    CONSERVATION = "conservation"
    """A job's counters and status, its frames, requeued frames and leases agree."""
    LEDGER = "ledger"
    """Attempts are counted without a gap, up to max_attempts, and each that ended has a reason."""
    SINGLE_WINNER = "single_winner"
    """One attempt of a frame succeeds at most, and it is the one that the frame names."""
    ARTIFACT_TRUTH = "artifact_truth"
    """What is stored of a succeeded frame are the bytes that its row names."""


class Finding(BaseModel, frozen=True):
    """Something that does not hold."""

    invariant: Invariant
    job_id: uuid.UUID
    ordinal: int | None = None
    attempt: int | None = None
    detail: str

    @property
    def where(self) -> str:
        """The job, the frame and the attempt that it is about, in words."""
        frame = "" if self.ordinal is None else f" frame {self.ordinal}"
        attempt = "" if self.attempt is None else f" attempt {self.attempt}"
        return f"job {self.job_id}{frame}{attempt}"


def check_job(job: Any) -> Iterator[Finding]:
    """Check a row of `auditing.jobs_after`."""
    for detail in [*_counters(job), *_status(job)]:
        yield Finding(invariant=Invariant.CONSERVATION, job_id=job.id, detail=detail)
    if job.queued > 1 or (job.queued == 0 and not job.maybe_pruned):
        detail = f"{job.queued} events tell that it was submitted, not 1"
        yield Finding(invariant=Invariant.DURABILITY, job_id=job.id, detail=detail)


def _counters(job: Any) -> Iterator[str]:
    unclaimed = job.total - job.cursor
    is_cancelled = job.status == JobStatus.CANCELLED
    counted = {
        FrameState.RUNNING: job.rows_running,
        FrameState.SUCCEEDED: job.rows_succeeded,
        FrameState.DEAD: job.rows_dead,
        # what was requeued follows the job's end later
        FrameState.CANCELLED: job.rows_cancelled
        + (unclaimed + job.rows_ready if is_cancelled else 0),
    }
    for state, frames in counted.items():
        if (counter := getattr(job, state)) != frames:
            yield f"its counter says {counter} {state}, and {frames} frames are"
    waiting = job.total - job.running - job.succeeded - job.dead - job.cancelled
    frames = 0 if is_cancelled else job.rows_ready + unclaimed
    if waiting != frames:
        yield f"its counters leave {waiting} waiting, and {frames} frames are"
    if (job.rows, job.last) != (job.cursor, job.cursor - 1):
        yield f"{job.rows} frames have a row, the last at {job.last}; its cursor is {job.cursor}"
    if job.requeued != job.rows_ready:
        yield f"{job.rows_ready} frames are ready, and {job.requeued} stand in requeued_frames"
    if is_cancelled and job.rows_ready and job.behind_from is None:
        yield f"{job.rows_ready} frames are ready, and it is cancelled"


def _status(job: Any) -> Iterator[str]:
    ended = job.status in TERMINAL
    end = settled(job.total, job.succeeded, job.dead, job.cancelled)
    agrees = {
        JobStatus.QUEUED: job.cursor == 0,
        JobStatus.RUNNING: end is None,
        JobStatus.CANCELLED: end is not None,
    }
    if not agrees.get(job.status, end == job.status):
        yield f"it is {job.status}, and its counters say {end or 'that it goes on'}"
    if ended != (job.finished_at is not None):
        yield f"it is {job.status}, and its end is {job.finished_at}"
    claimable = job.cursor < job.total and not job.paused and not ended
    if job.open != claimable:
        yield f"it is {'open' if job.open else 'closed'} to claims, and should not be"


def check_frame(frame: Any) -> Iterator[Finding]:
    """Check a row of `auditing.frames_after`."""
    found = [
        *((Invariant.LEDGER, detail) for detail in _ledger(frame)),
        *((Invariant.CONSERVATION, detail) for detail in _place(frame)),
    ]
    if frame.state == FrameState.SUCCEEDED and frame.latest:
        found.append((Invariant.SINGLE_WINNER, "the attempt that succeeded is on record as failed"))
    for invariant, detail in found:
        yield Finding(
            invariant=invariant,
            job_id=frame.job_id,
            ordinal=frame.ordinal,
            attempt=frame.attempt,
            detail=detail,
        )


def _ledger(frame: Any) -> Iterator[str]:
    if frame.earlier != frame.attempt - 1:
        yield f"{frame.earlier} earlier attempts are on record, not {frame.attempt - 1}"
    if frame.outside:
        yield f"{frame.outside} attempts are on record that it never had"
    if frame.state == FrameState.RUNNING and frame.latest:
        yield "it is running, and on record as ended"
    over = frame.state not in {FrameState.RUNNING, FrameState.SUCCEEDED}
    if over and not frame.latest:
        yield f"it is {frame.state}, and its latest attempt is not on record"
    charged = frame.attempt - frame.uncharged
    if not 0 <= charged <= frame.max_attempts:
        yield f"{charged} attempts are charged, of {frame.max_attempts} at most"
    if frame.without_reason:
        yield f"{frame.without_reason} attempts ended without a reason"


def _place(frame: Any) -> Iterator[str]:
    is_ready, is_running = frame.state == FrameState.READY, frame.state == FrameState.RUNNING
    if is_ready != frame.requeued:
        yield f"it is {frame.state}, and {'' if frame.requeued else 'not '}among the requeued"
    if is_running and frame.leases != 1:
        yield f"it is running, and held by {frame.leases} leases"
