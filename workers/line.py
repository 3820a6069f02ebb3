"""The render line, straight: claim, denoise, encode, put, complete; until the lane is empty.

While the storage is away, finished batches wait in the spool, and the line goes on.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from PIL import Image
from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_random_exponential

from farm import failpoints
from farm.artifacts import artifact_key
from farm.context import Farm
from farm.encoding import Encoder
from farm.errors import FarmError, RenderError, StorageRefused, Unavailable
from farm.families.base import Batch, Loaded, StopBatch
from farm.families.devices import is_out_of_memory
from farm.offers import Offer
from farm.provenance import circumstances_of
from farm.states import FLAGGED, FrameState
from farm.store import frames, leases, workers
from farm.store.claim import ClaimedFrame, Fence, Lease, claim
from farm.store.engine import transaction
from farm.store.frames import Done, Failure
from farm.store.resting import note_failure
from farm.store.workers import Account
from farm.warming import Warmth
from workers.batchlog import BatchLog
from workers.identity import Identity
from workers.images import BatchImages, ImageCache
from workers.scratch import Scratch
from workers.spool import Finished, Picture, Spool
from workers.watch import LeaseWatch

log = logging.getLogger(__name__)

T = TypeVar("T")

REFUSALS = (ValueError, TypeError, KeyError, IndexError, AttributeError)
"""What diffusers raises where a call cannot be; it would again."""


class RenderLine:
    """One child's pinned pipeline, and what it does with each batch."""

    def __init__(
        self,
        farm: Farm,
        identity: Identity,
        offer: Offer,
        loaded: Loaded,
        warmth: Warmth | None = None,
        batch_log: BatchLog | None = None,
    ) -> None:
        self._farm = farm
        self._identity = identity
        self._offer = offer
        self._loaded = loaded
        self._warmth = warmth or Warmth()
        self._batch_log = batch_log
        self._images = ImageCache(farm.artifacts)
        self._encoder = Encoder(circumstances_of(loaded))
        settings = farm.settings
        scratch = Scratch(settings.scratch_dir, identity.id)
        self._spool = Spool(scratch.pictures(os.getpid()), settings.spool_bytes)
        self._commit_seconds = 0.0
        self._unsure = True
        self.out_of_memory = False
        """Whether memory ran out: then nothing more is claimed, and a fresh process should go on"""

    def run(self) -> None:
        """Render batch after batch until nothing may be claimed; an outage is waited out."""
        while True:
            self._store_kept()
            may_claim = not (self._spool.full or self.out_of_memory)
            lease = self._insist(self._claim) if may_claim else None
            if lease is not None:
                if len(lease.frames) == lease.frames[0].spec.bucket:
                    self._farm.bells.ring(lease.pipeline)  # there may be more: wake another worker
                self._unsure = True  # until its lease is ended, or known to the spool
                self._render(lease)
                self._unsure = False
            elif self._spool:
                self._spool.wait()
            else:
                return

    def _claim(self) -> Lease | None:
        me = self._identity
        if self._unsure:
            with transaction(self._farm.store) as connection:
                leases.release_forgotten(connection, me.id, os.getpid(), self._spool.leases)
        self._unsure = True  # until the reply to this claim is here
        with transaction(self._farm.store) as connection:
            lease = claim(
                connection,
                pipeline=me.pipeline,
                worker_id=me.id,
                worker=me.name,
                pid=os.getpid(),
                lease_seconds=self._farm.settings.lease_seconds,
            )
        self._unsure = False
        return lease

    def _render(self, lease: Lease) -> None:
        """Render a batch. Its lease ends here, or lives on in the spool: the parent renews it."""
        if self._batch_log is not None:
            self._batch_log.begin()
        batch = Finished(lease, Account(commit_seconds=self._commit_seconds))
        try:
            with LeaseWatch(self._farm.store, lease, self._farm.settings.touch_seconds) as watch:
                with _timed(batch.account, "denoise_seconds"):
                    pictures = self._denoise(lease, watch)
                self._encode(batch, pictures)
                batch.step = watch.step
                # While older ones wait, the storage is known to be away.
                kept = bool(self._spool) or not self._put(batch, lambda _: watch.on_stored())
            if kept:
                log.warning("%s keeps %s", self._identity.name, _named(lease.frames))
                batch.account.kept = True
                self._spool.keep(batch)
                self._commit(lambda: self._keep(lease))
            else:
                self._finish(batch)
        except StopBatch:
            log.info("%s stopped: %s", self._identity.name, _named(lease.frames))
            self._commit(lambda: self._release(lease))
        except Exception as error:
            self.out_of_memory = is_out_of_memory(error)
            self._fail(batch, error)

    def _finish(self, batch: Finished) -> None:
        """End a batch whose pictures are stored."""
        try:
            self._commit(lambda: self._complete(batch))
        except Exception as error:  # the database refuses what it should take
            self._fail(batch, error)

    def _fail(self, batch: Finished, error: Exception) -> None:
        """End a batch that failed as a whole."""
        log.error(
            "%s failed at %s", self._identity.name, _named(batch.lease.frames), exc_info=error
        )
        batch.done, batch.failures = [], _failures(batch.lease.frames, error)
        batch.suspicious = _is_suspicious(error)
        self._commit(lambda: self._complete(batch))

    def _denoise(self, lease: Lease, watch: LeaseWatch) -> list[Image.Image | None]:
        specs = [frame.spec for frame in lease.frames]
        images = BatchImages(self._images, self._owners(lease.frames))
        prompts = [spec.prompt for spec in specs]

        def on_step(step: int, steps: int) -> None:
            failpoints.reach(self._farm.settings.failpoints, "render.step", prompts)
            watch.on_step(step, steps)

        self._warmth.meet(self._offer.name, specs[0])
        try:
            return self._offer.family.denoise(self._loaded, Batch(specs, on_step, images))
        except BaseException as error:
            self._loaded.rest()
            if isinstance(error, REFUSALS):
                raise RenderError(f"{self._offer.name} refuses it: {error}") from error
            raise

    def _owners(self, claimed: Sequence[ClaimedFrame]) -> dict[str, uuid.UUID]:
        """Tell whose each image of a batch is."""
        image_ids = self._offer.params_type.image_ids
        return {
            image_id: frame.tenant_id
            for frame in claimed
            for image_id in image_ids(frame.spec.params)
        }

    def _encode(self, batch: Finished, pictures: Sequence[Image.Image | None]) -> None:
        for slot, (frame, picture) in enumerate(zip(batch.lease.frames, pictures, strict=True)):
            if picture is None:
                batch.failures.append(_flagged(frame))
                continue
            try:
                with _timed(batch.account, "encode_seconds"):
                    content = self._encoder.encode(picture, frame.spec)
            except Exception as error:
                log.exception("%s could not encode %s", self._identity.name, frame)
                batch.failures += _failures([frame], error)
                continue
            digest = hashlib.sha256(content).digest()
            key = artifact_key(
                frame.tenant_id, frame.job_id, frame.ordinal, digest, frame.spec.format
            )
            done = Done(_fence(frame), digest, len(content), slot)
            batch.unstored.append(Picture(frame, key, done, content))

    def _put(self, batch: Finished, on_stored: Callable[[Picture], None]) -> bool:
        """Store what is not stored yet; returns whether the storage took all of it."""
        while batch.unstored:
            picture = batch.unstored[0]
            try:
                with _timed(batch.account, "put_seconds"):
                    self._farm.artifacts.put(picture.key, picture.content())
                batch.done.append(picture.done)
            except Unavailable as error:
                log.warning("%s could not store %s: %s", self._identity.name, picture.frame, error)
                return False
            except Exception as error:
                log.exception("%s could not store %s", self._identity.name, picture.frame)
                batch.failures += _failures([picture.frame], error)
                batch.suspicious = _is_suspicious(error)
            del batch.unstored[0]
            on_stored(picture)
        return True

    def _store_kept(self) -> None:
        """Store the batches that wait in the spool, as far as the storage takes them."""
        while (batch := self._spool.oldest()) is not None:
            if not self._insist(functools.partial(self._wanted, batch)):
                log.info("%s lost %s", self._identity.name, _named(batch.lease.frames))
                self._commit(functools.partial(self._release, batch.lease))
            elif self._put(batch, self._spool.stored):
                self._finish(batch)
            else:
                self._spool.postpone()
                return
            self._spool.end()

    def _wanted(self, batch: Finished) -> bool:
        """Ask whether a kept batch is still wanted; the parent sees that it is looked after."""
        with transaction(self._farm.store) as connection:
            return leases.touch(connection, batch.lease.id, *batch.step)

    def _complete(self, batch: Finished) -> None:
        done, account, me, until = batch.done, batch.account, self._identity, None
        settings, first = self._farm.settings, batch.lease.frames[0]
        with transaction(self._farm.store) as connection:
            accepted = frames.complete(connection, batch.lease.id, done)
            if not accepted and done and frames.already_complete(connection, done):
                return  # the reply to an earlier COMMIT was lost
            ended = frames.fail(
                connection, batch.lease.id, batch.failures, settings.retry_seconds
            ).values()
            account.succeeded = len(accepted)
            account.dropped = len(done) - len(accepted)
            account.dead = [*ended].count(FrameState.DEAD)
            account.returned = [*ended].count(FrameState.READY)
            workers.account(connection, me.id, account)
            if batch.suspicious and not done:
                until = note_failure(
                    connection, me.id, first.job_id, first.ordinal, settings.rest_seconds
                )
        if until is not None:
            log.error("%s rests until %s: one frame after another fails", me.name, until)
        for item in done:
            if item.fence not in accepted:
                log.warning(
                    "%s: job %s frame %s attempt %s was dropped: its lease was lost",
                    me.name,
                    *item.fence,
                )

    def _keep(self, lease: Lease) -> None:
        with transaction(self._farm.store) as connection:
            leases.keep(connection, lease.id)

    def _release(self, lease: Lease) -> None:
        with transaction(self._farm.store) as connection:
            frames.release(connection, lease.id, [_fence(frame) for frame in lease.frames])

    def _commit(self, write: Callable[[], None]) -> None:
        started = time.monotonic()
        self._insist(write)
        self._commit_seconds = time.monotonic() - started

    def _insist(self, work: Callable[[], T]) -> T:
        """Do it again and again while Postgres is away; it never gives up.

        Without Postgres there is nothing else to do, and a write whose lease was lost meanwhile
        changes nothing.
        """
        tries = Retrying(
            retry=retry_if_exception_type(Unavailable),
            wait=wait_random_exponential(multiplier=0.2, max=2.0),
            before_sleep=self._tell,
        )
        return tries(work)

    def _tell(self, state: RetryCallState) -> None:
        outcome = state.outcome
        assert outcome is not None
        log.warning("%s waits: %s", self._identity.name, outcome.exception())


def _fence(frame: ClaimedFrame) -> Fence:
    return frame.job_id, frame.ordinal, frame.attempt


def _failures(claimed: Sequence[ClaimedFrame], error: Exception) -> list[Failure]:
    """Map what went wrong to what becomes of the frames: the one place that decides it."""
    text = "".join(traceback.format_exception(error)).replace("\x00", "")
    message = f"{type(error).__name__}: {error}".replace("\x00", "")
    several = len(claimed) > 1
    reason, retryable, charged, smaller = "render_error", True, not several, False
    if isinstance(error, Unavailable | StorageRefused):
        reason = "storage_unavailable" if isinstance(error, Unavailable) else "storage_refused"
        charged, several = False, False
    elif is_out_of_memory(error):
        reason, message, smaller = "out_of_memory", "Memory ran out.", True
    elif several:
        # Any one of them may be why, and they may be of several tenants: each is tried alone.
        message = "Its batch failed; it is tried again without the others."
    elif isinstance(error, FarmError):
        message, retryable = error.message, error.retryable
    return [
        Failure(
            _fence(frame),
            reason,
            message,
            retryable,
            None if several else text,  # it may tell of other tenants' frames
            charged=charged,
            alone=several,
            smaller=smaller,
        )
        for frame in claimed
    ]


def _is_suspicious(error: Exception) -> bool:
    """Whether an error may be the worker's own fault, rather than a server's or the frame's."""
    return isinstance(error, StorageRefused) or not isinstance(error, FarmError)


def _flagged(frame: ClaimedFrame) -> Failure:
    """What becomes of a flagged picture: another attempt would give the same one."""
    message = "The pipeline's safety checker flagged this picture."
    return Failure(_fence(frame), FLAGGED, message, retryable=False)


def _named(claimed: Sequence[ClaimedFrame]) -> str:
    return "; ".join(str(frame) for frame in claimed)


@contextmanager
def _timed(account: Account, field: str) -> Iterator[None]:
    started = time.monotonic()
    try:
        yield
    finally:
        setattr(account, field, getattr(account, field) + time.monotonic() - started)
