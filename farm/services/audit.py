"""The audit: checks the invariants on a running farm, and compares its database with its storage.

It reads only, and repairs nothing. Rows that must agree are read in one snapshot, so a row that
has just changed is not reported. The audit reads leases, jobs, frames and events in chunks, with
constant memory. After each chunk the report holds the position, so that an audit can be resumed.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from pydantic import BaseModel, Field
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential_jitter

from farm.context import Farm
from farm.domain.invariants import AuditedFrame, Finding, Invariant, check_frame, check_job
from farm.domain.states import FrameState
from farm.errors import Unavailable
from farm.storage import NotStored, artifact_key
from farm.store import audit as stored
from farm.store.engine import Transaction, transaction

JOBS_PER_CHUNK = 100
FRAMES_PER_CHUNK = 1000
EVENTS_PER_CHUNK = 10_000
MAX_CONCURRENT_READS = 8
"""Artifacts that are read at the same time."""

FINDINGS_KEPT = 1000
"""Findings that a report describes. It counts the others."""

TRIES = 5
"""Tries per query while a server does not answer. They take about eight seconds."""

FIRST = uuid.UUID(int=0)
T = TypeVar("T")


class Phase(StrEnum):
    """Phases of an audit, in their order."""

    LEASES = "leases"
    JOBS = "jobs"
    FRAMES = "frames"
    EVENTS = "events"
    DONE = "done"


class Place(BaseModel, frozen=True):
    """Position of an audit: after this job, frame or event."""

    phase: Phase = Phase.LEASES
    job_id: uuid.UUID = FIRST
    ordinal: int = -1
    event: int = 0

    def behind(self) -> Place:
        """Return the start of the next phase."""
        phases = list(Phase)
        return Place(phase=phases[phases.index(self.phase) + 1])


class Report(BaseModel):
    """Results and position of an audit."""

    checked: dict[Invariant, int] = Field(default_factory=lambda: dict.fromkeys(Invariant, 0))
    """Number of checks: jobs for durability and conservation, frames for the others."""
    wrong: dict[Invariant, int] = Field(default_factory=lambda: dict.fromkeys(Invariant, 0))
    """Number of findings, by invariant."""
    findings: list[Finding] = []
    """The first findings, at most FINDINGS_KEPT."""
    place: Place = Place()
    walked: dict[Phase, int] = Field(default_factory=lambda: dict.fromkeys(Phase, 0))

    @property
    def ok(self) -> bool:
        """True if nothing was found."""
        return not any(self.wrong.values())

    @property
    def finished(self) -> bool:
        """True if every phase is done."""
        return self.place.phase is Phase.DONE


@dataclass(frozen=True)
class Progress:
    """Progress within a phase. The total was counted when the audit began."""

    phase: Phase
    done: int
    total: int


@dataclass(frozen=True)
class _Chunk:
    """Result of one step."""

    walked: int
    place: Place
    checked: dict[Invariant, int]
    findings: list[Finding]


def audited(farm: Farm, *, sample: float = 1.0) -> Report:
    """Run a whole audit; see `audit`."""
    report = Report()
    for _ in audit(farm, report, sample=sample):
        pass
    return report


def audit(farm: Farm, report: Report, *, sample: float = 1.0) -> Iterator[Finding | Progress]:
    """Check the invariants from the report's position on, and add the results to the report.

    At each yield the report may be stored. A later audit can resume with it.

    Args:
        farm: the farm to check; only its database and its storage are read.
        report: the report to fill in: a new one, or that of an interrupted audit.
        sample: the share of succeeded frames whose artifacts are read, chosen at random:
            1 reads all of them, 0 none.

    Yields:
        Each finding, and after each chunk the progress.

    Raises:
        Unavailable: Postgres or the storage did not answer after several tries.
    """
    sizes = _read(farm, stored.sizes)
    totals = {Phase.JOBS: sizes.jobs, Phase.FRAMES: sizes.frames, Phase.EVENTS: sizes.events}
    steps: dict[Phase, Callable[[Place], _Chunk]] = {
        Phase.LEASES: lambda place: _leases(farm, place),
        Phase.JOBS: lambda place: _jobs(farm, place),
        Phase.FRAMES: lambda place: _frames(farm, place, sample),
        Phase.EVENTS: lambda place: _events(farm, place, sizes.last_event),
    }
    while not report.finished:
        phase = report.place.phase
        chunk = steps[phase](report.place)
        _take(report, chunk)
        yield from chunk.findings
        done = report.walked[phase]
        yield Progress(phase, done, max(done, totals.get(phase, 0)))


def _take(report: Report, chunk: _Chunk) -> None:
    report.walked[report.place.phase] += chunk.walked
    report.place = chunk.place
    for invariant, number in chunk.checked.items():
        report.checked[invariant] += number
    for finding in chunk.findings:
        report.wrong[finding.invariant] += 1
    room = FINDINGS_KEPT - len(report.findings)
    report.findings = [*report.findings, *chunk.findings[:room]]


def _leases(farm: Farm, place: Place) -> _Chunk:
    rows = _read(farm, lambda connection: stored.wrong_leases(connection, FINDINGS_KEPT))
    findings = [
        Finding(
            invariant=Invariant.CONSERVATION,
            job_id=row.job_id,
            ordinal=row.ordinal,
            attempt=row.attempt,
            detail=f"lease {row.lease_id} holds it, but its attempt is {row.latest or 'none'}",
        )
        for row in rows
    ]
    return _Chunk(0, place.behind(), {}, [*findings, *_wrong_shares(farm)])


def _wrong_shares(farm: Farm) -> Iterator[Finding]:
    for row in _read(farm, lambda connection: stored.wrong_shares(connection, FINDINGS_KEPT)):
        whose = f"tenant {row.tenant_id} on lane {row.pipeline}"
        if row.hidden is not None:
            yield Finding(
                invariant=Invariant.CONSERVATION,
                job_id=row.hidden,
                detail=f"it may be claimed, but the share of {whose} says priority "
                f"{row.priority} and retry at {row.retry_at}, so no claim would find it",
            )
        told, real = (row.waiting, row.requeued), (row.really_waiting, row.really_requeued)
        if told != real:
            yield Finding(
                invariant=Invariant.CONSERVATION,
                detail=f"{whose}: waiting {row.waiting} and requeued {row.requeued} frames of "
                f"each priority, but really {row.really_waiting} and {row.really_requeued}",
            )
        if row.waiting_cost != row.really_waiting_cost:
            yield Finding(
                invariant=Invariant.CONSERVATION,
                detail=f"{whose}: the frames that wait cost {row.waiting_cost}, but really "
                f"{row.really_waiting_cost}",
            )


def _jobs(farm: Farm, place: Place) -> _Chunk:
    rows = _read(farm, lambda c: stored.jobs_after(c, place.job_id, JOBS_PER_CHUNK))
    findings = [finding for row in rows for finding in check_job(row)]
    findings += _winners(farm, [row.id for row in rows])
    checked = {Invariant.DURABILITY: len(rows), Invariant.CONSERVATION: len(rows)}
    last = len(rows) < JOBS_PER_CHUNK
    there = place.behind() if last else Place(phase=place.phase, job_id=rows[-1].id)
    return _Chunk(len(rows), there, checked, findings)


def _winners(farm: Farm, job_ids: list[uuid.UUID]) -> Iterator[Finding]:
    rows = _read(farm, lambda c: stored.wrong_winners(c, job_ids, FINDINGS_KEPT))
    for row in rows:
        told = ", ".join(map(str, row.attempts))
        now = f"{row.state} at attempt {row.attempt}" if row.state else "missing"
        yield Finding(
            invariant=Invariant.SINGLE_WINNER,
            job_id=row.job_id,
            ordinal=row.ordinal,
            attempt=row.attempts[0],
            detail=f"events say that attempt {told} succeeded, but the frame is {now}",
        )


def _frames(farm: Farm, place: Place, sample: float) -> _Chunk:
    rows = _read(
        farm, lambda c: stored.frames_after(c, place.job_id, place.ordinal, FRAMES_PER_CHUNK)
    )
    kept = [row for row in rows if not row.removed]
    succeeded = [row for row in kept if row.state == FrameState.SUCCEEDED]
    chosen = [row for row in succeeded if random.random() < sample]  # noqa: S311 - no secret
    findings = [finding for row in kept for finding in check_frame(row)]
    findings += _wrong_artifacts(farm, chosen)
    checked = {
        Invariant.LEDGER: len(kept),
        Invariant.SINGLE_WINNER: len(succeeded),
        Invariant.ARTIFACT_TRUTH: len(chosen),
    }
    there = place.behind()
    if len(rows) == FRAMES_PER_CHUNK:
        there = Place(phase=place.phase, job_id=rows[-1].job_id, ordinal=rows[-1].ordinal)
    return _Chunk(len(rows), there, checked, findings)


def _wrong_artifacts(farm: Farm, frames: Sequence[AuditedFrame]) -> list[Finding]:
    pool = ThreadPoolExecutor(MAX_CONCURRENT_READS, thread_name_prefix="audit")
    try:
        answers = pool.map(lambda frame: _wrong_artifact(farm, frame), frames)
        return [finding for finding in answers if finding is not None]
    finally:
        pool.shutdown(cancel_futures=True)


def _wrong_artifact(farm: Farm, frame: AuditedFrame) -> Finding | None:
    assert frame.sha256 is not None, "a constraint of the table: the frame succeeded"
    key = artifact_key(frame.tenant_id, frame.job_id, frame.ordinal, frame.sha256, frame.format)
    try:
        length, digest = _patiently(lambda: farm.artifacts.measure(key))
    except NotStored:
        detail = "its image is not stored"
    else:
        if (length, digest) == (frame.bytes, frame.sha256):
            return None
        detail = (
            f"{length} bytes with sha256 {digest.hex()} are stored, not {frame.bytes} with "
            f"{frame.sha256.hex()}"
        )
    # The job may have been removed while the storage was read.
    now = _read(farm, lambda c: stored.succeeded_frame(c, frame.job_id, frame.ordinal))
    if now is None or (now.bytes, now.sha256) != (frame.bytes, frame.sha256):
        return None
    return Finding(
        invariant=Invariant.ARTIFACT_TRUTH,
        job_id=frame.job_id,
        ordinal=frame.ordinal,
        attempt=frame.attempt,
        detail=detail,
    )


def _events(farm: Farm, place: Place, last_event: int) -> _Chunk:
    chunk = _read(farm, lambda c: stored.queued_after(c, place.event, last_event, EVENTS_PER_CHUNK))
    findings = [
        Finding(
            invariant=Invariant.DURABILITY,
            job_id=job_id,
            detail="the job was accepted but is missing, and no event says that it was removed",
        )
        for job_id in chunk.lost or []
    ]
    there = place.behind()
    if chunk.read == EVENTS_PER_CHUNK:
        there = Place(phase=place.phase, event=chunk.last)
    return _Chunk(chunk.read, there, {}, findings)


def _read(farm: Farm, question: Callable[[Transaction], T]) -> T:
    def ask() -> T:
        with transaction(farm.store) as connection:
            stored.only_read(connection)
            return question(connection)

    return _patiently(ask)


def _patiently(ask: Callable[[], T]) -> T:
    """Repeat a query while a server does not answer.

    Raises:
        Unavailable: the server did not answer TRIES times.
    """
    tries = Retrying(
        retry=retry_if_exception(lambda error: isinstance(error, Unavailable) and error.retryable),
        stop=stop_after_attempt(TRIES),
        wait=wait_exponential_jitter(multiplier=0.5, jitter=0.5),
        reraise=True,
    )
    return tries(ask)
