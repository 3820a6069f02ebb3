"""Finishing of batches: encode, upload, complete. It runs while the next batch is denoised.

Several threads encode and upload. One thread ends each batch as soon as all of it is stored, and
batches that are ready together in one commit. While the storage does not answer, finished batches
wait in the spool.

A batch is encoded only after the next batch is on the device, so that the device never waits.
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

from farm.domain.spec import Priority
from farm.imaging.encoding import Encoder
from farm.process import cores
from farm.storage import artifact_key
from farm.store.claim import ClaimedFrame
from farm.store.frames import CompletedFrame
from workers.render.batch import ImageWriter, Picture, RenderedBatch
from workers.render.claims import Claims
from workers.render.committing import BatchCommitter
from workers.render.failures import failures, flagged, is_suspicious, named
from workers.render.filtering import FilterChain
from workers.render.identity import Identity
from workers.render.lease_watch import LeaseWatch
from workers.render.reuse import Reuse
from workers.render.spool import Spool, SpoolDrain

log = logging.getLogger(__name__)

THREADS = 8
"""Threads that encode and upload. Uploads mostly wait, and encoding releases the interpreter."""
ENCODERS = max(1, cores() - 1)
"""Maximum number of concurrent encodings. It leaves one core free for the device's thread."""
MAX_BATCHES = 4
"""Maximum number of unfinished batches before the device waits."""
MAX_PIXELS = 128 * 2**20
"""Maximum number of pixels in unfinished batches before the device waits.

A pixel needs three bytes, plus its encoded form.
"""


class BatchFinisher:
    """Finishes the denoised batches of one child."""

    def __init__(
        self,
        identity: Identity,
        encoder: Encoder,
        filters: FilterChain,
        reuse: Reuse,
        writer: ImageWriter,
        spool: Spool,
        drain: SpoolDrain,
        committer: BatchCommitter,
        claims: Claims,
    ) -> None:
        self._identity = identity
        self._encoder = encoder
        self._filters = filters
        self._reuse = reuse
        self._writer = writer
        self._spool = spool
        self._drain = drain
        self._committer = committer
        self._claims = claims
        self._pool = ThreadPoolExecutor(THREADS, "encoder")
        self._encoding = threading.Semaphore(ENCODERS)
        self._taken: list[Callable[[], None]] = []
        """Work for the threads, started when the device has its next batch."""
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
        """True if a batch must be stored before the next one is claimed."""
        return self._spool.full or self._batches >= 2 * MAX_BATCHES

    @property
    def busy(self) -> bool:
        """True while a batch is not finished: until its commit, which may requeue frames."""
        return self._batches > 0 or len(self._spool) > 0

    def add(
        self,
        batch: RenderedBatch,
        pictures: Sequence[Image.Image | None],
        watch: LeaseWatch,
        *,
        hasty: bool = False,
    ) -> None:
        """Take over a denoised batch once there is room. `begin` starts the work on it.

        Args:
            batch: the batch, with its lease.
            pictures: one picture per frame; None if a safety checker flagged it.
            watch: the watch of the lease; it is closed at the end.
            hasty: True to add the batch without waiting for room.
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
        """Start to store the added batch. Every wait for the finisher calls this first."""
        taken, self._taken = self._taken, []
        for share in taken:
            self._pool.submit(share)

    def pass_on(self, batch: RenderedBatch, watch: LeaseWatch) -> None:
        """End a batch without frames to render."""
        watch.close()
        self._enter(batch, hasty=True)
        self._ready.put(batch)

    def fail(self, batch: RenderedBatch, error: Exception) -> None:
        """End a batch that failed as a whole, after all earlier batches."""
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
            Exception: the finisher itself failed with this error.
        """
        self.begin()
        with self._changed:
            before = self._changes
            met = condition or (lambda: self._changes > before or not self.busy)
            self._changed.wait_for(lambda: self._broken is not None or met(), seconds)
        if self._broken is not None:
            raise self._broken

    def settle(self) -> None:
        """Wait until all batches are finished, except for those in the spool."""
        self.wait(lambda: self._batches == 0)

    def close(self) -> None:
        """End the threads. Call it when all batches are finished."""
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
        """Encode and upload one frame's picture."""
        if picture is None:
            batch.failures.append(flagged(frame))
            return
        if (failure := self._filters.rejection(frame, picture)) is not None:
            batch.failures.append(failure)
            return
        # Interactive pictures do not wait for those of bulk jobs: a person may be waiting.
        at_once = batch.lease.priority is Priority.INTERACTIVE
        with nullcontext() if at_once else self._encoding:
            started = time.monotonic()
            content = self._encoder.encode(picture, frame.spec)
            batch.spent("encode", started)
        digest = hashlib.sha256(content).digest()
        form = frame.spec.format
        key = artifact_key(frame.tenant_id, frame.job_id, frame.ordinal, digest, form)
        done = CompletedFrame(
            frame.fence,
            digest,
            len(content),
            slot,
            self._reuse.digest(frame),
            seconds=batch.account.denoise_seconds / len(batch.frames),
            provenance=self._encoder.kept_apart(frame.spec),
        )
        kept = Picture(frame, key, done, content)
        if self._spool.away or not self._writer.put(batch, kept):
            batch.unstored.append(kept)
        else:
            watch.on_other()

    def _run(self) -> None:
        """End batches, and store those in the spool, until `close`."""
        try:
            while not self._closed:
                if batches := self._all_ready():
                    self._end(batches)
                if self._drain.store_oldest():
                    self._leave()
        except Exception as error:
            log.exception("%s: the finisher failed", self._identity.name)
            with self._changed:
                self._broken = error
                self._changed.notify_all()

    def _all_ready(self) -> list[RenderedBatch]:
        """Wait for a batch, or until the spool is due. Return all batches that are ready."""
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
                self._drain.keep(batch)
        self._leave(batches)
