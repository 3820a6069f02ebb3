"""The render line, straight: claim, denoise, encode, put, complete; until the lane is empty."""

from __future__ import annotations

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

from farm.artifacts import artifact_key
from farm.context import Farm
from farm.errors import FarmError, RenderError, Unavailable
from farm.families.base import Batch, Loaded, StopBatch
from farm.families.devices import device_name, is_out_of_memory, thread_count
from farm.offers import Offer
from farm.provenance import Provenance, encode_png, library_versions
from farm.states import FLAGGED, FrameState
from farm.store import frames, workers
from farm.store.claim import ClaimedFrame, Fence, Lease, claim
from farm.store.engine import Connection, transaction
from farm.store.frames import Done, Failure
from farm.store.workers import Account
from farm.warming import Warmth
from workers.identity import Identity
from workers.images import BatchImages, ImageCache
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
    ) -> None:
        self._farm = farm
        self._identity = identity
        self._offer = offer
        self._loaded = loaded
        self._warmth = warmth or Warmth()
        self._images = ImageCache(farm.artifacts)
        self._versions = library_versions()
        self._commit_seconds = 0.0
        self._unsure = True

    def run(self) -> None:
        """Render batch after batch until nothing may be claimed; an outage is waited out."""
        while (lease := self._insist(self._claim)) is not None:
            if len(lease.frames) == lease.frames[0].spec.bucket:
                self._farm.bells.ring(lease.pipeline)  # there may be more: wake another worker
            self._render(lease)

    def _claim(self) -> Lease | None:
        if self._unsure:
            with transaction(self._farm.store) as connection:
                frames.release_forgotten(connection, self._identity.id, os.getpid())
        self._unsure = True  # until the reply to this claim is here
        with transaction(self._farm.store) as connection:
            lease = claim(
                connection,
                pipeline=self._identity.pipeline,
                worker_id=self._identity.id,
                worker=self._identity.name,
                pid=os.getpid(),
                lease_seconds=self._farm.settings.lease_seconds,
            )
        self._unsure = False
        return lease

    def _render(self, lease: Lease) -> None:
        """Render a batch. Whatever happens, its lease ends here: the parent would renew it."""
        account = Account(commit_seconds=self._commit_seconds)
        try:
            with LeaseWatch(self._farm.store, lease, self._farm.settings.touch_seconds) as watch:
                with _timed(account, "denoise_seconds"):
                    pictures = self._denoise(lease, watch)
                self._store(lease, pictures, account, watch)
        except StopBatch:
            log.info("%s stopped: %s", self._identity.name, _named(lease.frames))
            self._commit(lambda: self._release(lease))
        except Exception as error:
            log.exception("%s failed at %s", self._identity.name, _named(lease.frames))
            failures = _failures(lease.frames, error)
            self._commit(lambda: self._fail(lease, failures, account))

    def _denoise(self, lease: Lease, watch: LeaseWatch) -> list[Image.Image | None]:
        specs = [frame.spec for frame in lease.frames]
        images = BatchImages(self._images, self._owners(lease.frames))
        self._warmth.meet(self._offer.name, specs[0])
        try:
            return self._offer.family.denoise(self._loaded, Batch(specs, watch.on_step, images))
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

    def _store(
        self,
        lease: Lease,
        pictures: Sequence[Image.Image | None],
        account: Account,
        watch: LeaseWatch,
    ) -> None:
        done: list[Done] = []
        failures: list[Failure] = []
        for slot, (frame, picture) in enumerate(zip(lease.frames, pictures, strict=True)):
            if picture is None:
                failures.append(_flagged(frame))
                continue
            try:
                done.append(self._put(frame, slot, picture, account))
            except Unavailable as error:
                # The storage is away: the others would only wait for it as long, one by one.
                log.warning("%s could not store %s: %s", self._identity.name, frame, error)
                failures += _failures(lease.frames[slot:], error)
                break
            except Exception as error:
                log.exception("%s could not store %s", self._identity.name, frame)
                failures += _failures([frame], error)
            finally:
                watch.on_stored()
        self._commit(lambda: self._complete(lease, done, failures, account))

    def _put(self, frame: ClaimedFrame, slot: int, picture: Image.Image, account: Account) -> Done:
        with _timed(account, "encode_seconds"):
            content = encode_png(picture, self._provenance(frame))
        digest = hashlib.sha256(content).digest()
        key = artifact_key(frame.tenant_id, frame.job_id, frame.ordinal, digest)
        with _timed(account, "put_seconds"):
            self._farm.artifacts.put(key, content)
        return Done(_fence(frame), digest, len(content), slot)

    def _provenance(self, frame: ClaimedFrame) -> Provenance:
        return Provenance(
            frame=frame.spec,
            weights=self._loaded.weights,
            device=device_name(self._loaded.device),
            dtype=self._loaded.dtype,
            threads=thread_count(self._loaded.device),
            versions=self._versions,
            options=dict(self._loaded.options),
        )

    def _complete(
        self, lease: Lease, done: list[Done], failures: list[Failure], account: Account
    ) -> None:
        with transaction(self._farm.store) as connection:
            accepted = frames.complete(connection, lease.id, done)
            if not accepted and done and frames.already_complete(connection, done):
                return  # the reply to an earlier COMMIT was lost
            account.succeeded = len(accepted)
            account.dropped = len(done) - len(accepted)
            self._end(connection, lease, failures, account)
            workers.account(connection, self._identity.id, account)
        for item in done:
            if item.fence not in accepted:
                log.warning(
                    "%s: job %s frame %s attempt %s was dropped: its lease was lost",
                    self._identity.name,
                    *item.fence,
                )

    def _fail(self, lease: Lease, failures: list[Failure], account: Account) -> None:
        with transaction(self._farm.store) as connection:
            self._end(connection, lease, failures, account)
            workers.account(connection, self._identity.id, account)

    def _end(
        self, connection: Connection, lease: Lease, failures: list[Failure], account: Account
    ) -> None:
        retry_seconds = self._farm.settings.retry_seconds
        states = list(frames.fail(connection, lease.id, failures, retry_seconds).values())
        account.dead = states.count(FrameState.DEAD)
        account.returned = states.count(FrameState.READY)

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
        pause = 0.1
        while True:
            try:
                return work()
            except Unavailable as error:
                log.warning("%s waits: %s", self._identity.name, error)
                time.sleep(pause)
                pause = min(pause * 2, 2.0)


def _fence(frame: ClaimedFrame) -> Fence:
    return frame.job_id, frame.ordinal, frame.attempt


def _failures(claimed: Sequence[ClaimedFrame], error: Exception) -> list[Failure]:
    """Map what went wrong to what becomes of the frames: the one place that decides it."""
    text = "".join(traceback.format_exception(error)).replace("\x00", "")
    message = f"{type(error).__name__}: {error}".replace("\x00", "")
    reason, retryable, charged, alone = "render_error", True, True, False
    if isinstance(error, Unavailable):
        reason, charged = "storage_unavailable", False
    elif len(claimed) > 1:
        # Any one of them may be why, and they may be of several tenants: each is tried alone.
        message = "Its batch failed; it is tried again without the others."
        charged, alone = False, True
    elif isinstance(error, FarmError):
        message, retryable = error.message, error.retryable
    elif is_out_of_memory(error):
        reason = "out_of_memory"
    return [
        Failure(_fence(frame), reason, message, retryable, text, charged, alone=alone)
        for frame in claimed
    ]


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
