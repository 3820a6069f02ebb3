"""Finished batches that the storage did not take yet: on disk, oldest first, up to a limit.

Their leases live on, so nothing of them is rendered again when the storage is back.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from farm.store.claim import ClaimedFrame, Lease
from farm.store.frames import CompletedFrame, FailedAttempt
from farm.store.workers import Account

log = logging.getLogger(__name__)

MAX_BATCHES = 1000
"""Kept at once: their leases are renewed together"""
FIRST_SECONDS = 0.5
MAX_SECONDS = 5.0
"""Between two tries to store what is kept: full jitter below twice as long each time."""


@dataclass
class Picture:
    """A frame's picture, encoded: in memory, or in a file."""

    frame: ClaimedFrame
    key: str
    done: CompletedFrame
    held: bytes | Path

    def content(self) -> bytes:
        """Give its bytes."""
        return self.held.read_bytes() if isinstance(self.held, Path) else self.held


@dataclass(eq=False)
class RenderedBatch:
    """A batch that was rendered, and what became of its frames so far."""

    lease: Lease
    frames: Sequence[ClaimedFrame]
    """Those of the lease that are rendered"""
    stages: dict[str, tuple[float, float]] = field(default_factory=dict)
    """When each stage began and ended, on the monotonic clock"""
    account: Account = field(default_factory=Account)
    pixels: int = 0
    step: tuple[int, int] = (0, 0)
    unstored: list[Picture] = field(default_factory=list)
    done: list[CompletedFrame] = field(default_factory=list)
    failures: list[FailedAttempt] = field(default_factory=list)
    suspicious: bool = False
    """Whether the worker itself may be why it failed"""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def spent(self, stage: str, started: float) -> None:
        """Add to a stage's seconds what has passed since `started`; several threads do."""
        name, now = f"{stage}_seconds", time.monotonic()
        with self._lock:
            setattr(self.account, name, getattr(self.account, name) + now - started)
            first, last = self.stages.get(stage, (started, now))
            self.stages[stage] = min(first, started), max(last, now)


class Spool:
    """One child's; at most `max_bytes` and MAX_BATCHES, and what the tail holds then."""

    def __init__(
        self, folder: Path, max_bytes: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._clock = clock
        self._batches: deque[RenderedBatch] = deque()
        self._bytes = 0
        self._in_memory: RenderedBatch | None = None
        """What the disk refused; nothing is rendered beside it"""
        self._pause = FIRST_SECONDS
        self._due = float("-inf")

    def __len__(self) -> int:
        return len(self._batches)

    @property
    def away(self) -> bool:
        """Whether the storage did not take what was tried last."""
        return len(self._batches) > 0 and self._due > float("-inf")

    @property
    def full(self) -> bool:
        """Whether nothing more should be rendered before something is stored."""
        much = self._bytes >= self._max_bytes or len(self._batches) >= MAX_BATCHES
        return len(self._batches) > 0 and (self._in_memory is not None or much)

    def keep(self, batch: RenderedBatch) -> None:
        """Put a batch last. Where the disk refuses, it stays in memory, and the spool is full."""
        self._batches.append(batch)
        self._bytes += sum(picture.done.bytes for picture in batch.unstored)
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for picture in batch.unstored:
                path = self._folder / f"{batch.lease.id}-{picture.done.slot}.png"
                path.write_bytes(picture.content())
                picture.held = path
        except OSError as error:
            self._in_memory = batch
            log.warning("Finished pictures cannot be kept on disk: %s", error)
        if not self.away:
            self.postpone()

    def oldest(self) -> RenderedBatch | None:
        """The batch to store next, where it is time to try."""
        return self._batches[0] if self._batches and self._clock() >= self._due else None

    def following(self) -> RenderedBatch | None:
        """The one behind the oldest."""
        return self._batches[1] if len(self._batches) > 1 else None

    def stored(self, picture: Picture) -> None:
        """Note that the storage took a picture of the oldest batch: it is well again."""
        self._pause, self._due = FIRST_SECONDS, float("-inf")
        self._forget(picture)

    def end(self) -> None:
        """Forget the oldest batch: it is stored, or nobody wants it any more."""
        batch = self._batches.popleft()
        if batch is self._in_memory:
            self._in_memory = None
        for picture in batch.unstored:
            self._forget(picture)

    def _forget(self, picture: Picture) -> None:
        self._bytes -= picture.done.bytes
        if isinstance(picture.held, Path):
            with suppress(OSError):
                picture.held.unlink(missing_ok=True)

    def postpone(self) -> None:
        """Note that the storage is still away."""
        self._due = self._clock() + random.uniform(0.1, self._pause)  # noqa: S311 - jitter
        self._pause = min(2 * self._pause, MAX_SECONDS)

    @property
    def pause(self) -> float | None:
        """Seconds until it is time to try again; None where nothing is kept."""
        return max(0.0, self._due - self._clock()) if self._batches else None
