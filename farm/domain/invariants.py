"""Invariants of jobs and frames, as pure functions of the rows of one snapshot."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from datetime import datetime
from enum import StrEnum
from typing import NamedTuple

from pydantic import BaseModel

from farm.domain.image_formats import Format
from farm.domain.states import TERMINAL, FrameState, JobStatus, settled


class Invariant(StrEnum):
    """An invariant that an audit checks."""

    DURABILITY = "durability"
    """An accepted job exists until it is removed."""
    CONSERVATION = "conservation"
    """A job's counters and status, its frames, requeued frames, leases and share agree."""
    LEDGER = "ledger"
    """Attempts are numbered without a gap, up to max_attempts. Each ended one has a reason."""
    SINGLE_WINNER = "single_winner"
    """At most one attempt of a frame succeeds, and it is the one recorded in the frame."""
    ARTIFACT_TRUTH = "artifact_truth"
    """The stored bytes of a succeeded frame are those that its row describes."""


class Finding(BaseModel, frozen=True):
    """A violation of an invariant."""

    invariant: Invariant
    job_id: uuid.UUID | None = None
    """None if the finding is about all jobs of a tenant on a lane. The detail names them."""
    ordinal: int | None = None
    attempt: int | None = None
    detail: str

    @property
    def where(self) -> str:
        """The job, the frame and the attempt of the finding, as text."""
        if self.job_id is None:
            return "a tenant's share of a lane"
        frame = "" if self.ordinal is None else f" frame {self.ordinal}"
        attempt = "" if self.attempt is None else f" attempt {self.attempt}"
        return f"job {self.job_id}{frame}{attempt}"


class AuditedJob(NamedTuple):
    """A job's row, and counts of its rows in other tables, in one snapshot."""

    id: uuid.UUID
    status: str
    paused: bool
    open: bool
    total: int
    cursor: int
    running: int
    succeeded: int
    dead: int
    cancelled: int
    finished_at: datetime | None
    behind_from: int | None
    rows: int
    """Number of its frames that have a row."""
    last: int
    """Highest ordinal of them; -1 if there is none."""
    stretch: int
    """Frames of a stretch, which are claimed in any order. 1 in a job without groups."""
    rows_of_whole: int
    """Number of its frames that have a row, in stretches that are claimed whole."""
    rows_running: int
    rows_ready: int
    rows_succeeded: int
    rows_dead: int
    rows_cancelled: int
    requeued: int
    queued: int
    """Number of its events `job.queued`."""
    maybe_pruned: bool
    """True if its events may have been deleted by age."""


class AuditedFrame(NamedTuple):
    """A frame's row, and what other tables say of it, in one snapshot."""

    job_id: uuid.UUID
    ordinal: int
    state: str
    attempt: int
    uncharged: int
    sha256: bytes | None
    bytes: int | None
    format: Format
    tenant_id: uuid.UUID
    max_attempts: int
    removed: bool
    earlier: int
    """Number of recorded attempts before the latest one."""
    latest: int
    outside: int
    without_reason: int
    leases: int
    requeued: bool


def check_job(job: AuditedJob) -> Iterator[Finding]:
    """Check a job."""
    for detail in [*_counters(job), *_status(job)]:
        yield Finding(invariant=Invariant.CONSERVATION, job_id=job.id, detail=detail)
    if job.queued > 1 or (job.queued == 0 and not job.maybe_pruned):
        detail = f"{job.queued} events record its submission, not 1"
        yield Finding(invariant=Invariant.DURABILITY, job_id=job.id, detail=detail)


def _counters(job: AuditedJob) -> Iterator[str]:
    unclaimed = job.total - job.cursor
    is_cancelled = job.status == JobStatus.CANCELLED
    counted = {
        FrameState.RUNNING: job.rows_running,
        FrameState.SUCCEEDED: job.rows_succeeded,
        FrameState.DEAD: job.rows_dead,
        # requeued frames are cancelled some time after the job's end
        FrameState.CANCELLED: job.rows_cancelled
        + (unclaimed + job.rows_ready if is_cancelled else 0),
    }
    for state, frames in counted.items():
        if (counter := getattr(job, state)) != frames:
            yield f"its counter says {counter} {state}, but {frames} frames are"
    waiting = job.total - job.running - job.succeeded - job.dead - job.cancelled
    frames = 0 if is_cancelled else job.rows_ready + unclaimed
    if waiting != frames:
        yield f"its counters leave {waiting} waiting, but {frames} frames are"
    whole = job.cursor - job.cursor % job.stretch
    begun = min(-(-job.cursor // job.stretch) * job.stretch, job.total)
    if (job.rows, job.rows_of_whole) != (job.cursor, whole) or job.last >= begun:
        yield f"{job.rows} frames have a row, the last at {job.last}; its cursor is {job.cursor}"
    if job.requeued != job.rows_ready:
        yield f"{job.rows_ready} frames are ready, but {job.requeued} are in requeued_frames"
    if is_cancelled and job.rows_ready and job.behind_from is None:
        yield f"{job.rows_ready} frames are ready, but it is cancelled"


def _status(job: AuditedJob) -> Iterator[str]:
    ended = job.status in TERMINAL
    end = settled(job.total, job.succeeded, job.dead, job.cancelled)
    agrees: dict[str, bool] = {
        JobStatus.QUEUED: job.cursor == 0,
        JobStatus.RUNNING: end is None,
        JobStatus.CANCELLED: end is not None,
    }
    if not agrees.get(job.status, end == job.status):
        yield f"it is {job.status}, but its counters say {end or 'that it has not ended'}"
    if ended != (job.finished_at is not None):
        yield f"it is {job.status}, but its end is {job.finished_at}"
    claimable = job.cursor < job.total and not job.paused and not ended
    if job.open != claimable:
        yield f"it is {'open' if job.open else 'closed'} to claims, and should not be"


def check_frame(frame: AuditedFrame) -> Iterator[Finding]:
    """Check a frame."""
    found = [
        *((Invariant.LEDGER, detail) for detail in _ledger(frame)),
        *((Invariant.CONSERVATION, detail) for detail in _place(frame)),
    ]
    if frame.state == FrameState.SUCCEEDED and frame.latest:
        found.append((Invariant.SINGLE_WINNER, "the attempt that succeeded is recorded as failed"))
    for invariant, detail in found:
        yield Finding(
            invariant=invariant,
            job_id=frame.job_id,
            ordinal=frame.ordinal,
            attempt=frame.attempt,
            detail=detail,
        )


def _ledger(frame: AuditedFrame) -> Iterator[str]:
    if frame.earlier != frame.attempt - 1:
        yield f"{frame.earlier} earlier attempts are recorded, not {frame.attempt - 1}"
    if frame.outside:
        yield f"{frame.outside} attempts are recorded that it never had"
    if frame.state == FrameState.RUNNING and frame.latest:
        yield "it is running, but recorded as ended"
    over = frame.state not in {FrameState.RUNNING, FrameState.SUCCEEDED}
    if over and not frame.latest:
        yield f"it is {frame.state}, but its latest attempt is not recorded"
    charged = frame.attempt - frame.uncharged
    if not 0 <= charged <= frame.max_attempts:
        yield f"{charged} attempts are charged; the maximum is {frame.max_attempts}"
    if frame.without_reason:
        yield f"{frame.without_reason} attempts ended without a reason"


def _place(frame: AuditedFrame) -> Iterator[str]:
    is_ready, is_running = frame.state == FrameState.READY, frame.state == FrameState.RUNNING
    if is_ready != frame.requeued:
        yield f"it is {frame.state}, but {'' if frame.requeued else 'not '}among the requeued"
    if is_running and frame.leases != 1:
        yield f"it is running, but held by {frame.leases} leases"
