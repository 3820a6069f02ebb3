"""A rendered batch, and the storage of its images in S3."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from farm.context import Farm
from farm.errors import Unavailable
from farm.store.claim import ClaimedFrame, Lease
from farm.store.frames import CompletedFrame, FailedAttempt
from farm.store.histograms import place
from farm.store.workers import Account
from workers.render.failures import failures, is_suspicious
from workers.render.identity import Identity

log = logging.getLogger(__name__)


@dataclass
class Picture:
    """The encoded picture of a frame, in memory or in a file."""

    frame: ClaimedFrame
    key: str
    done: CompletedFrame
    held: bytes | Path

    def content(self) -> bytes:
        """Return the bytes of the picture."""
        return self.held.read_bytes() if isinstance(self.held, Path) else self.held


@dataclass(eq=False)
class RenderedBatch:
    """A rendered batch, and the results of its frames so far."""

    lease: Lease
    frames: Sequence[ClaimedFrame]
    """Frames of the lease that are rendered."""
    stages: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Start and end of each stage, on the monotonic clock."""
    account: Account = field(default_factory=Account)
    pixels: int = 0
    step: tuple[int, int] = (0, 0)
    unstored: list[Picture] = field(default_factory=list)
    done: list[CompletedFrame] = field(default_factory=list)
    failures: list[FailedAttempt] = field(default_factory=list)
    suspicious: bool = False
    """True if the worker itself may have caused the failure."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def spent(self, stage: str, started: float) -> None:
        """Add the time since `started` to a stage. Several threads call this."""
        name, now = f"{stage}_seconds", time.monotonic()
        with self._lock:
            setattr(self.account, name, getattr(self.account, name) + now - started)
            first, last = self.stages.get(stage, (started, now))
            self.stages[stage] = min(first, started), max(last, now)

    def accounted(self) -> Account:
        """Return the batch's sums, with its durations in their histograms."""
        account = self.account
        account.wait_buckets = Counter(
            place(frame.waited, frame.urgency)
            for frame in self.lease.frames
            if frame.waited is not None
        )
        if account.denoise_seconds:
            account.denoise_buckets = Counter([place(account.denoise_seconds)])
            account.cost_seconds = account.denoise_seconds
            account.cost = self.lease.frame_cost * len(self.frames)
        return account


class ImageWriter:
    """Stores images, and records the result in their batch. Several threads share it."""

    def __init__(self, farm: Farm, identity: Identity) -> None:
        self._farm = farm
        self._identity = identity

    def put(self, batch: RenderedBatch, picture: Picture) -> bool:
        """Upload a picture. Return False if the storage did not answer: then a retry is needed."""
        try:
            started = time.monotonic()
            self._farm.artifacts.put(picture.key, picture.content())
            batch.spent("put", started)
            batch.done.append(picture.done)
        except Unavailable as error:
            log.warning("%s could not store %s: %s", self._identity.name, picture.frame, error)
            return False
        except Exception as error:
            log.exception("%s could not store %s", self._identity.name, picture.frame)
            batch.failures += failures([picture.frame], error)
            batch.suspicious |= is_suspicious(error)
        return True
