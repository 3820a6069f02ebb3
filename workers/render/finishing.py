"""The tail of a batch: encode, put, complete. It runs while the next batch is denoised.

A few threads encode and put; one ends batches, each as soon as all of it is stored, and those that
are ready together in one commit. While the storage is away, finished batches wait in the spool.

What is taken is begun when the device has its next work, so that nothing holds that up.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial

from PIL import Image

from farm.context import Farm
from farm.domain.spec import Priority
from farm.errors import Unavailable
from farm.imaging.encoding import Encoder
from farm.process import cores
from farm.storage import artifact_key
from farm.store import leases
from farm.store.claim import ClaimedFrame
from farm.store.engine import transaction
from farm.store.frames import CompletedFrame
from workers.render.claims import Claims
from workers.render.committing import BatchCommitter
from workers.render.failures import failures, flagged, is_suspicious, named
from workers.render.filtering import FilterChain
from workers.render.identity import Identity
from workers.render.lease_watch import LeaseWatch
from workers.render.retry import retry_while_unavailable
from workers.render.reuse import Reuse
from workers.render.spool import Picture, RenderedBatch, Spool

log = logging.getLogger(__name__)

THREADS = 8
"""That encode and put: an upload mostly waits, and encoding leaves the interpreter alone …"""
ENCODERS = max(1, cores() - 1)
"""… but so many encode at once: whenever the device's thread wakes up, a core is there for it."""
MAX_BATCHES = 4
MAX_PIXELS = 128 * 2**20
"""In the tail at once, of three bytes each and what they are encoded to: then the device waits"""


class BatchFinisher:
    """One child's: takes what was denoised, and sees to its end."""

    def __init__(
        self,
        farm: Farm,
        identity: Identity,
        encoder: Encoder,
        spool: Spool,
        claims: Claims,
        filters: FilterChain,
        reuse: Reuse,
    ) -> None:
        self._farm = farm
        self._identity = identity
        self._encoder = encoder
        self._spool = spool
        self._claims = claims
        self._filters = filters
        self._reuse = reuse
        self._committer = BatchCommitter(farm, identity)
        self._pool = ThreadPoolExecutor(THREADS, "encoder")
        self._encoding = threading.Semaphore(ENCODERS)
        self._taken: list[Callable[[], None]] = []
        """What the threads get when the device has its next work"""
        self._ready: queue.SimpleQueue[RenderedBatch | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._batches = 0
        self._pixels = 0
        self._changes = 0
        self._closed = False
        self._broken: Exception | None = None
        self._thread: threading.Thread | None = None

    @property
    def full(self) -> bool:
        """Whether nothing more should be claimed before something is stored."""
        return self._spool.full or self._batches >= 2 * MAX_BATCHES

    @property
    def busy(self) -> bool:
        """Whether a batch has not come to its end yet."""
        return self._batches > 0 or len(self._spool) > 0

    def add(
        self,
        batch: RenderedBatch,
        pictures: Sequence[Image.Image | None],
        watch: LeaseWatch,
        *,
        hasty: bool = False,
    ) -> None:
        """Take over a batch that was denoised, once there is room, for `begin`.

        Args:
            batch: with its lease.
            pictures: one a frame; None where a safety checker balked.
            watch: watches the lease; closed at the end.
            hasty: do not wait for room.
        """
        items = list(enumerate(zip(batch.frames, pictures, strict=True)))
        batch.pixels = sum(picture.width * picture.height for picture in pictures if picture)
        self._enter(batch, hasty)
        shares = [items[start::THREADS] for start in range(min(THREADS, len(items)))]
        left, lock = len(shares), threading.Lock()

        def store(share: Sequence[tuple[int, tuple[ClaimedFrame, Image.Image | None]]]) -> None:
            nonlocal left
            for slot, (frame, picture) in share:
                try:
                    self._store(batch, slot, frame, picture, watch)
                except Exception as error:
                    log.exception("%s could not encode %s", self._identity.name, frame)
                    batch.failures += failures([frame], error)
            with lock:
                left -= 1
                last = left == 0
            if last:
                watch.close()
                batch.step = watch.step
                self._ready.put(batch)

        self._taken = [partial(store, share) for share in shares]

    def begin(self) -> None:
        """Begin to store what was taken; whatever waits for the tail begins it too."""
        taken, self._taken = self._taken, []
        for share in taken:
            self._pool.submit(share)

    def pass_on(self, batch: RenderedBatch, watch: LeaseWatch) -> None:
        """End a batch of which nothing is rendered."""
        watch.close()
        self._enter(batch, hasty=True)
        self._ready.put(batch)

    def fail(self, batch: RenderedBatch, error: Exception) -> None:
        """End a batch that failed as a whole, after all that came before it."""
        log.error("%s failed at %s", self._identity.name, named(batch.frames), exc_info=error)
        batch.failures = failures(batch.frames, error)
        batch.suspicious = is_suspicious(error)
        self._enter(batch, hasty=True)
        self._ready.put(batch)

    def wait(
        self, condition: Callable[[], bool] | None = None, seconds: float | None = None
    ) -> None:
        """Wait until something has changed, or until `condition` holds; at most for `seconds`.

        Raises:
            Exception: what broke the tail itself.
        """
        self.begin()
        with self._changed:
            before = self._changes
            met = condition or (lambda: self._changes > before or not self.busy)
            self._changed.wait_for(lambda: self._broken is not None or met(), seconds)
        if self._broken is not None:
            raise self._broken

    def settle(self) -> None:
        """Wait until nothing is under way; what the spool keeps may still be there."""
        self.wait(lambda: self._batches == 0)

    def close(self) -> None:
        """End the threads, once nothing is under way."""
        self._pool.shutdown()
        self._ready.put(None)
        if self._thread is not None:
            self._thread.join()

    def _enter(self, batch: RenderedBatch, hasty: bool) -> None:
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="committer", daemon=True)
            thread.start()
            self._thread = thread

        def room() -> bool:
            few = self._batches < MAX_BATCHES and self._pixels + batch.pixels <= MAX_PIXELS
            return hasty or few or self._batches == 0

        self.wait(room)
        with self._changed:
            self._batches += 1
            self._pixels += batch.pixels

    def _leave(self, batches: Sequence[RenderedBatch] = ()) -> None:
        with self._changed:
            self._batches -= len(batches)
            self._pixels -= sum(batch.pixels for batch in batches)
            self._changes += 1
            self._changed.notify_all()

    def _store(
        self,
        batch: RenderedBatch,
        slot: int,
        frame: ClaimedFrame,
        picture: Image.Image | None,
        watch: LeaseWatch,
    ) -> None:
        """Encode and put one frame's picture."""
        if picture is None:
            batch.failures.append(flagged(frame))
            return
        if (failure := self._filters.rejection(frame, picture)) is not None:
            batch.failures.append(failure)
            return
        # Whoever waits in front of a screen does not wait for bulk's pictures.
        at_once = batch.lease.priority is Priority.INTERACTIVE
        with nullcontext() if at_once else self._encoding:
            started = time.monotonic()
            content = self._encoder.encode(picture, frame.spec)
            batch.spent("encode", started)
        digest = hashlib.sha256(content).digest()
        form = frame.spec.format
        key = artifact_key(frame.tenant_id, frame.job_id, frame.ordinal, digest, form)
        done = CompletedFrame(frame.fence, digest, len(content), slot, self._reuse.digest(frame))
        kept = Picture(frame, key, done, content)
        if self._spool.away or not self._put(batch, kept):
            batch.unstored.append(kept)
        else:
            watch.on_other()

    def _put(self, batch: RenderedBatch, picture: Picture) -> bool:
        """Store a picture; returns whether the storage took or refused it for good."""
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

    def _run(self) -> None:
        """End batches, and store what is kept, until it is closed."""
        try:
            while not self._closed:
                if batches := self._all_ready():
                    self._end(batches)
                self._store_kept()
        except Exception as error:
            log.exception("%s: the tail broke", self._identity.name)
            with self._changed:
                self._broken = error
                self._changed.notify_all()

    def _all_ready(self) -> list[RenderedBatch]:
        """Wait for a batch, or until it is time to look at the spool; gives all that are there."""
        batches: list[RenderedBatch] = []
        try:
            found = self._ready.get(timeout=self._spool.pause)
            while True:
                if found is None:
                    self._closed = True
                else:
                    batches.append(found)
                found = self._ready.get_nowait()
        except queue.Empty:
            return batches

    def _end(self, batches: Sequence[RenderedBatch]) -> None:
        stored = [batch for batch in batches if not batch.unstored]
        self._committer.end(stored)
        for batch in stored:
            self._claims.ended(batch.lease)
        for batch in batches:
            if batch.unstored:
                self._keep(batch)
        self._leave(batches)

    def _keep(self, batch: RenderedBatch) -> None:
        log.warning("%s keeps %s", self._identity.name, named(batch.lease.frames))
        batch.account.spooled = True
        batch.unstored.sort(key=lambda picture: picture.done.slot)
        self._spool.keep(batch)

        def tell() -> None:
            with transaction(self._farm.store) as connection:
                leases.mark_spooled(connection, batch.lease.id)

        retry_while_unavailable(self._identity.name, tell)

    def _store_kept(self) -> None:
        """Store the batch that has waited longest in the spool, where it is time to try."""
        batch = self._spool.oldest()
        if batch is None:
            return
        if not retry_while_unavailable(self._identity.name, partial(self._wanted, batch)):
            log.info("%s lost %s", self._identity.name, named(batch.lease.frames))
            self._claims.release(batch.lease)
            self._spool.end()
        elif self._put_kept(batch):
            if (following := self._spool.following()) is not None:
                # Before this lease ends: the parent must see one that is looked after.
                retry_while_unavailable(self._identity.name, partial(self._wanted, following))
            self._committer.end([batch])
            self._claims.ended(batch.lease)
            self._spool.end()
        else:
            self._spool.postpone()
        self._leave()

    def _put_kept(self, batch: RenderedBatch) -> bool:
        while batch.unstored:
            if not self._put(batch, batch.unstored[0]):
                return False
            self._spool.stored(batch.unstored.pop(0))
        return True

    def _wanted(self, batch: RenderedBatch) -> bool:
        """Ask whether a kept batch is still wanted; the parent sees that it is looked after."""
        with transaction(self._farm.store) as connection:
            return leases.report_step(connection, batch.lease.id, *batch.step).wanted
