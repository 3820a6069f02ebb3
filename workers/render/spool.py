"""The spool: finished batches that are not stored yet, on disk, oldest first, up to a limit.

Their leases are renewed, so none of them is rendered again when the storage is back.
"""

from __future__ import annotations

import logging
import random
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from farm.store import leases
from farm.store.engine import Store, transaction
from workers.render.batch import ImageWriter, Picture, RenderedBatch
from workers.render.claims import Claims
from workers.render.committing import BatchCommitter
from workers.render.failures import named
from workers.render.identity import Identity
from workers.render.retry import retry_while_unavailable

log = logging.getLogger(__name__)

MAX_BATCHES = 1000
"""Maximum number of batches in a spool. Their leases are renewed together."""
FIRST_SECONDS = 0.5
MAX_SECONDS = 5.0
"""Maximum pause between two tries to store a batch, in seconds. It is random (full jitter).

The upper limit of the pause doubles after each try.
"""


class Spool:
    """Spool of one child: at most `max_bytes` and MAX_BATCHES, plus the finisher's batches."""

    def __init__(
        self, folder: Path, max_bytes: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._clock = clock
        self._batches: deque[RenderedBatch] = deque()
        self._bytes = 0
        self._in_memory: RenderedBatch | None = None
        """Batch that could not be written to disk. While it is here, nothing is rendered."""
        self._pause = FIRST_SECONDS
        self._due = float("-inf")

    def __len__(self) -> int:
        return len(self._batches)

    @property
    def away(self) -> bool:
        """True if the last try to store a batch failed."""
        return len(self._batches) > 0 and self._due > float("-inf")

    @property
    def full(self) -> bool:
        """True if a batch must be stored before more is rendered."""
        much = self._bytes >= self._max_bytes or len(self._batches) >= MAX_BATCHES
        return len(self._batches) > 0 and (self._in_memory is not None or much)

    def keep(self, batch: RenderedBatch) -> None:
        """Append a batch. If the disk refuses it, it stays in memory, and the spool is full."""
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
        """Return the batch to store next, if it is time to try."""
        return self._batches[0] if self._batches and self._clock() >= self._due else None

    def following(self) -> RenderedBatch | None:
        """Return the batch after the oldest one."""
        return self._batches[1] if len(self._batches) > 1 else None

    def stored(self, picture: Picture) -> None:
        """Record that a picture of the oldest batch is stored: the storage works again."""
        self._pause, self._due = FIRST_SECONDS, float("-inf")
        self._forget(picture)

    def end(self) -> None:
        """Remove the oldest batch: it is stored, or no longer wanted."""
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
        """Record that the storage still does not answer."""
        self._due = self._clock() + random.uniform(0.1, self._pause)  # noqa: S311 - jitter
        self._pause = min(2 * self._pause, MAX_SECONDS)

    @property
    def pause(self) -> float | None:
        """Seconds until the next try; None if the spool is empty."""
        return max(0.0, self._due - self._clock()) if self._batches else None


class SpoolDrain:
    """Moves batches into the spool, and from there to the storage and to their end."""

    def __init__(
        self,
        store: Store,
        identity: Identity,
        spool: Spool,
        writer: ImageWriter,
        committer: BatchCommitter,
        claims: Claims,
    ) -> None:
        self._store = store
        self._identity = identity
        self._spool = spool
        self._writer = writer
        self._committer = committer
        self._claims = claims

    def keep(self, batch: RenderedBatch) -> None:
        """Move a batch into the spool. Its lease is renewed until the batch is stored."""
        log.warning("%s keeps in the spool: %s", self._identity.name, named(batch.lease.frames))
        batch.account.spooled = True
        batch.unstored.sort(key=lambda picture: picture.done.slot)
        self._spool.keep(batch)

        def mark() -> None:
            with transaction(self._store) as connection:
                leases.mark_spooled(connection, batch.lease.id)

        retry_while_unavailable(self._identity.name, mark)

    def store_oldest(self) -> bool:
        """Store the oldest batch and end it, if it is time to try. Return False if it is not."""
        batch = self._spool.oldest()
        if batch is None:
            return False
        if not retry_while_unavailable(self._identity.name, partial(self._wanted, batch)):
            log.info("%s lost the lease of %s", self._identity.name, named(batch.lease.frames))
            self._claims.release(batch.lease)
            self._spool.end()
        elif self.put(batch):
            if (following := self._spool.following()) is not None:
                # Before this lease ends: the parent must see progress on another lease.
                retry_while_unavailable(self._identity.name, partial(self._wanted, following))
            self._committer.end([batch])
            self._claims.ended(batch.lease)
            self._spool.end()
        else:
            self._spool.postpone()
        return True

    def put(self, batch: RenderedBatch) -> bool:
        """Store the images of the spool's oldest batch. Return False if the storage is away."""
        while batch.unstored:
            if not self._writer.put(batch, batch.unstored[0]):
                return False
            self._spool.stored(batch.unstored.pop(0))
        return True

    def _wanted(self, batch: RenderedBatch) -> bool:
        """Return whether a spooled batch is still wanted. The parent sees this as progress."""
        with transaction(self._store) as connection:
            return leases.report_step(connection, batch.lease.id, *batch.step).wanted
