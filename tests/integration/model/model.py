"""The model of the store: the expected jobs, frames and leases after each move."""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256

from farm.domain.states import TERMINAL, FrameState, JobStatus, settled
from farm.store.claim import ClaimedFrame, Fence, Lease
from farm.store.frames import CompletedFrame
from tests.support.store import fence

Place = tuple[uuid.UUID, int]
"""Job ID and ordinal of a frame."""

Announced = tuple[str, uuid.UUID, int, int]
"""Kind of an event, with the job ID, ordinal and attempt that it names."""

PLAN = [1, 2, 2, 4, 4, 4, 4, 8]
"""Bucket for 1, 2, … frames whose bucket is open. With three frames, two are rendered first."""

LEASE_SECONDS = 600.0
"""Length of every lease that is claimed or renewed."""

W, R = FrameState.WAITING, FrameState.RUNNING


@dataclass
class ModelFrame:
    """A frame: its state and its attempts."""

    state: FrameState = W
    attempt: int = 0
    uncharged: int = 0
    isolated: bool = False
    ended: list[tuple[int, str]] = field(default_factory=list)
    """Attempts that failed, each with its reason."""
    sha256: bytes | None = None
    """Hash of the artifact, if it succeeded."""
    reused: bool = False
    """True if the artifact is another frame's."""

    def end(self, most: int, reason: str, *, charged: bool, dead: bool, isolated: bool) -> None:
        """End a running attempt, by the complete rule of charging."""
        self.ended.append((self.attempt, reason))
        self.uncharged += not charged
        used_up = self.attempt - self.uncharged >= most
        self.state = FrameState.DEAD if charged and (dead or used_up) else FrameState.READY
        self.isolated = self.isolated or isolated or charged


@dataclass
class ModelJob:
    """A job: its frames and its owner's requests. Frames never claimed have no row."""

    tenant: uuid.UUID
    frames: list[ModelFrame]
    max_attempts: int
    bucket: int | None
    """Bucket that its owner named. None: each claim chooses."""
    in_groups: bool = False
    """True if its lines have different settings. Then they are claimed in another order."""
    held: bool = False
    cancelled: bool = False

    def count(self, state: FrameState) -> int:
        return sum(frame.state is state for frame in self.frames)

    @property
    def status(self) -> JobStatus:
        if self.cancelled:
            return JobStatus.CANCELLED
        if not any(frame.attempt for frame in self.frames):
            return JobStatus.QUEUED
        succeeded, dead = self.count(FrameState.SUCCEEDED), self.count(FrameState.DEAD)
        return settled(len(self.frames), succeeded, dead, 0) or JobStatus.RUNNING

    @property
    def paused(self) -> bool:
        """True while the job is paused. An ended job is not paused, and stays so after a retry."""
        self.held = self.held and self.status not in TERMINAL
        return self.held

    @property
    def claimable(self) -> bool:
        waits = self.count(W) + self.count(FrameState.READY)
        return waits > 0 and not self.paused and not self.cancelled


class Model:
    """All jobs, and all leases that workers ever had."""

    def __init__(self) -> None:
        self.jobs: dict[uuid.UUID, ModelJob] = {}
        self.given: list[Lease] = []
        self.lapsed: set[uuid.UUID] = set()
        """IDs of leases that are over but not expired yet."""
        self.kept: set[uuid.UUID] = set()
        """IDs of leases with a rendered batch that waits for the storage."""
        self.renders: dict[tuple[uuid.UUID, bytes], set[Place]] = {}
        """Frames whose artifact may be reused, by tenant and recipe. The store keeps one."""
        self.limits: dict[uuid.UUID, int | None] = {}
        """Most running frames, by tenant. None, or none: no limit."""
        self.held: set[uuid.UUID] = set()
        """IDs of the leases that have not ended, as the database has them."""

    def something_waits(self) -> bool:
        """Return True if a claim must find a batch."""
        return any(job.claimable and self.room(job.tenant) > 0 for job in self.jobs.values())

    def running(self, tenant: uuid.UUID) -> int:
        """Count a tenant's frames of leases. A lease counts as a whole until it ends."""
        job_ids = (
            frame.job_id for lease in self.given if lease.id in self.held for frame in lease.frames
        )
        return sum(self.jobs[job_id].tenant == tenant for job_id in job_ids)

    def room(self, tenant: uuid.UUID) -> float:
        """Return the number of its frames that may begin."""
        most = self.limits.get(tenant)
        return math.inf if most is None else most - self.running(tenant)

    def frame_at(self, item: Fence | Place) -> ModelFrame:
        return self.jobs[item[0]].frames[item[1]]

    def frame(self, claimed: ClaimedFrame) -> ModelFrame:
        return self.frame_at((claimed.job_id, claimed.ordinal))

    def holding(self, fences: Iterable[Fence]) -> list[Fence]:
        """List the attempts that still run. A write may change only these."""
        return [
            item
            for item in fences
            if self.frame_at(item).state is R and self.frame_at(item).attempt == item[2]
        ]

    def is_won(self, item: CompletedFrame) -> bool:
        frame = self.frame_at(item.fence)
        return frame.sha256 == item.sha256 and frame.attempt == item.fence[2]

    def newest(self) -> Lease:
        return [lease for lease in self.given if self.is_open(lease)][-1]

    def is_open(self, lease: Lease) -> bool:
        return bool(self.holding(parted(lease, "all")))

    def succeed(self, done: Iterable[CompletedFrame]) -> None:
        rendered: dict[tuple[uuid.UUID, bytes], set[Place]] = {}
        for item in done:
            frame = self.frame_at(item.fence)
            frame.state, frame.sha256 = FrameState.SUCCEEDED, item.sha256
            frame.reused = item.reused
            if item.digest is not None and not item.reused:
                owner = self.jobs[item.fence[0]].tenant
                rendered.setdefault((owner, item.digest), set()).add(item.fence[:2])
        self.renders |= rendered

    def end(
        self,
        item: Fence,
        reason: str,
        *,
        charged: bool = True,
        dead: bool = False,
        isolated: bool = False,
    ) -> None:
        most = self.jobs[item[0]].max_attempts
        self.frame_at(item).end(most, reason, charged=charged, dead=dead, isolated=isolated)

    def drop(self, lease: Lease, reason: str) -> None:
        """End a lease from outside. With several frames none is charged: any may be the cause.

        A batch that was rendered and only waited for the storage is not charged either.
        """
        kept, several = lease.id in self.kept, len(lease.frames) > 1
        for item in self.holding(parted(lease, "all")):
            self.end(item, reason, charged=not (kept or several), isolated=several and not kept)

    def give_back(self, leases: Iterable[Lease]) -> None:
        for lease in leases:
            for item in self.holding(parted(lease, "all")):
                self.end(item, "released", charged=False)

    def same_workers(self, lease: Lease) -> list[Lease]:
        """List all leases that the same worker ever had."""
        return [other for other in self.given if other.worker_id == lease.worker_id]

    def expire_lapsed(self) -> None:
        for lease in self.given:
            if lease.id in self.lapsed:
                self.drop(lease, "lease_expired")
        self.lapsed.clear()

    def announcements(self) -> Iterator[Announced]:
        for job_id, ordinal, frame in self.every_frame():
            for attempt in range(1, frame.attempt + 1):
                yield "frames.claimed", job_id, ordinal, attempt
            for attempt, reason in frame.ended:
                if reason != "cancelled":
                    kind = "released" if reason == "released" else "failed"
                    yield f"frames.{kind}", job_id, ordinal, attempt
            if frame.state is FrameState.SUCCEEDED:
                yield "frames.succeeded", job_id, ordinal, frame.attempt

    def every_frame(self) -> Iterator[tuple[uuid.UUID, int, ModelFrame]]:
        for job_id, job in self.jobs.items():
            for ordinal, frame in enumerate(job.frames):
                yield job_id, ordinal, frame


def parted(lease: Lease, part: str) -> list[Fence]:
    fences = [fence(frame) for frame in lease.frames]
    return {"all": fences, "first": fences[:1], "last": fences[-1:]}[part]


def rendered(lease: Lease, part: str = "all") -> list[CompletedFrame]:
    """Return a lease's frames with artifacts. Each attempt's artifact has another hash."""
    fences = parted(lease, part)
    return [
        CompletedFrame(
            item,
            sha256(repr(item).encode()).digest(),
            100 + slot,
            slot,
            recipe(claimed),
            seconds=0.25,
        )
        for slot, claimed in enumerate(lease.frames)
        if (item := fence(claimed)) in fences
    ]


def recipe(claimed: ClaimedFrame) -> bytes | None:
    """Hash all that decides a frame's bytes here, the chosen bucket too; None without reuse."""
    if not claimed.reuse:
        return None
    spec = claimed.spec
    return sha256(repr((spec.params["guidance_scale"], spec.bucket, spec.seed)).encode()).digest()
