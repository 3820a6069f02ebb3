"""The render loop: claim, denoise, and pass to the finisher, until the lane is empty.

The device never waits. The next batch is claimed while one is denoised. At the same time the
finisher encodes, uploads and completes. An interactive batch may run between two steps of another.
"""

from __future__ import annotations

import logging
import math
import os
import time
import uuid
from collections.abc import Callable, Sequence

from PIL import Image

from farm import failpoints
from farm.context import Farm
from farm.domain.spec import Priority
from farm.errors import RenderError
from farm.pipelines.family import Batch, LoadedPipeline, StopBatch
from farm.pipelines.resolve import ResolvedPipeline
from farm.pipelines.runtime.devices import is_out_of_memory, torch_threads
from farm.pipelines.runtime.loading import free_what_is_left
from farm.pipelines.runtime.slots import SlotTest
from farm.rendering.warmup import CompiledShapes
from farm.store.claim import ClaimedFrame, Lease
from workers.render.batch import RenderedBatch
from workers.render.batch_log import BatchLog
from workers.render.claims import INTERRUPTING_PART, Claims
from workers.render.control_images import BatchImages, ImageCache
from workers.render.failures import named
from workers.render.finishing import BatchFinisher
from workers.render.identity import Identity
from workers.render.interactive import InteractiveClaims
from workers.render.lease_watch import LeaseWatch
from workers.render.previews.batches import Previewing
from workers.render.reuse import Reuse
from workers.render.scratch import Scratch

log = logging.getLogger(__name__)

REFUSALS = (ValueError, TypeError, KeyError, IndexError, AttributeError)
"""Errors that diffusers raises for an impossible call. A retry would fail again."""

LOOK_SECONDS = 1.0
"""Interval between two claims while only the finisher is busy, in seconds."""


class RenderLoop:
    """Loaded pipeline of one child, and its work on each batch."""

    def __init__(
        self,
        farm: Farm,
        identity: Identity,
        resolved: ResolvedPipeline,
        loaded: LoadedPipeline,
        *,
        claims: Claims,
        interactive: InteractiveClaims,
        finisher: BatchFinisher,
        reuse: Reuse,
        slots: SlotTest,
        scratch: Scratch,
        previewing: Previewing,
        compiled_shapes: CompiledShapes,
        batch_log: BatchLog | None = None,
    ) -> None:
        self._farm = farm
        self._identity = identity
        self._resolved = resolved
        self._loaded = loaded
        self._claims = claims
        self._interactive = interactive
        self._finisher = finisher
        self._reuse = reuse
        self._slots = slots
        self._scratch = scratch
        self._previewing = previewing
        self._compiled_shapes = compiled_shapes
        self._batch_log = batch_log
        self._images = ImageCache(farm.artifacts)
        # Offloading moves parts between devices with hooks that allow one call at a time.
        self.may_interrupt = farm.settings.preempt and not resolved.pipeline.offload
        """True while an interactive batch may interrupt another. False once memory ran out."""
        self._twin: LoadedPipeline | None = None
        self._lent_seconds = 0.0
        """Time that interrupting batches took from the current batch, in seconds."""
        self._since = 0.0
        """Start of the working time that is not accounted yet, on the monotonic clock."""
        self._broken: Exception | None = None
        self.out_of_memory = False
        """True if memory ran out. Then nothing is claimed, and a new process should continue."""

    def run(self) -> None:
        """Render batch after batch until nothing can be claimed. Wait during an outage."""
        self._claims.mark_uncertain()
        self._since = time.monotonic()
        try:
            while True:
                # Read before the claim: a batch that ends in between may requeue frames.
                busy = self._finisher.busy
                lease = self._next()
                if lease is not None:
                    self._render(lease)
                    if self._broken is not None:
                        raise self._broken
                elif busy:
                    self._give_back()
                    self._finisher.wait(seconds=LOOK_SECONDS)
                    self._since = time.monotonic()
                else:
                    return
        finally:
            self._give_back()

    def close(self) -> None:
        """End the other threads after `run` has returned. A child process just exits."""
        self._interactive.close()
        self._claims.close()
        self._finisher.close()
        self._previewing.close()

    def _next(self) -> Lease | None:
        if self.out_of_memory or self._finisher.full:
            return None
        if not self._claims.is_ahead:
            self._finisher.begin()
        return self._interactive.take() or self._claims.next() or self._interactive.take_last()

    def _give_back(self) -> None:
        """Release batches that were claimed and will not be rendered."""
        self._finisher.begin()
        self._claims.give_back()
        lease = self._interactive.take_last()
        if lease is not None:
            self._claims.release(lease)

    def _render(self, lease: Lease) -> None:
        """Denoise a batch. Its lease ends in the finisher or, on an error, here."""
        if self._batch_log is not None:
            self._batch_log.begin()
        batch, watch = self._begin(lease)
        if not batch.frames:
            self._finisher.pass_on(batch, watch)
            return
        started, self._lent_seconds = time.monotonic(), 0.0
        if lease.priority is not Priority.INTERACTIVE and self._claims.pace.is_known:
            self._let_in(lease, 0.0, math.inf)

        def on_step(step: int, steps: int) -> None:
            watch.on_step(step, steps)
            passed = time.monotonic() - started - self._lent_seconds
            if self._finisher.full:
                self._interactive.rest()
                return
            left = passed / step * (steps - step)
            self._claims.claim_ahead(left, passed / step)
            if self._yields(lease, passed, left) and (urgent := self._interactive.take()):
                self._interrupt(urgent, lease, watch)
            self._let_in(lease, passed, left)

        try:
            try:
                pictures = self._denoise(self._loaded, batch, on_step)
            finally:
                self._interactive.rest()
            now = time.monotonic()
            batch.stages["denoise"] = started, now
            batch.account.denoise_seconds = now - started - self._lent_seconds
            batch.account.work_seconds, self._since = now - self._since, now
            self._finisher.add(batch, pictures, watch)
        except StopBatch:
            self._stop(lease, watch)
        except Exception as error:
            watch.close()
            self.out_of_memory = is_out_of_memory(error)
            if self.out_of_memory and (bucket := batch.frames[0].spec.bucket) > 1:
                params = batch.frames[0].spec.params
                self._scratch.note_too_large(f"{params['width']}x{params['height']}", bucket)
            self._finisher.fail(batch, error)
            self._finisher.settle()
            self._claims.give_back()  # the failure may trip this worker
        if watch.draining:
            self._claims.give_back()

    def _yields(self, lease: Lease, passed: float, left: float) -> bool:
        """Tell whether an urgent batch may interrupt this one now.

        A batch keeps its part of the device time. An interactive one is interrupted only if it
        still needs longer than an urgent batch may take.

        Args:
            lease: the current batch.
            passed: time that it was denoised, in seconds.
            left: time that it still needs, in seconds.
        """
        settings = self._farm.settings
        short = INTERRUPTING_PART * settings.interactive_seconds
        if lease.priority is Priority.INTERACTIVE and left <= short:
            return False
        share = settings.less_urgent_share
        return self.may_interrupt and share * self._lent_seconds <= (1 - share) * passed

    def _let_in(self, lease: Lease, passed: float, left: float) -> None:
        """Claim an urgent batch as soon as one waits, if it may interrupt this one."""
        if self._yields(lease, passed, left):
            own = {frame.tenant_id for frame in lease.frames}
            spared = lease.priority is Priority.INTERACTIVE and len(own) == 1
            self._interactive.listen(own if spared else ())
        else:
            self._interactive.rest()

    def _interrupt(self, lease: Lease, interrupted: Lease, watch: LeaseWatch) -> None:
        """Denoise an urgent batch between two steps of another one, without changing that one."""
        started = time.monotonic()
        self._interactive.rest()
        try:
            self._render_within(lease, watch)
            self._scratch.hold(os.getpid(), interrupted.id)
        except Exception as error:  # the interrupted batch is not the cause
            self._broken = error
            raise StopBatch from error
        self._finisher.begin()
        self._lent_seconds += time.monotonic() - started
        self._interactive.look_again()

    def _render_within(self, lease: Lease, outer: LeaseWatch) -> None:
        batch, watch = self._begin(lease)
        if not batch.frames:
            self._finisher.pass_on(batch, watch)
            return
        started = time.monotonic()

        def on_step(step: int, steps: int) -> None:
            watch.on_step(step, steps)
            outer.on_other()

        try:
            self._twin = self._twin or self._loaded.clone_sharing_weights()
            pictures = self._denoise(self._twin, batch, on_step)
            batch.spent("denoise", started)
            self._finisher.add(batch, pictures, watch, hasty=True)
        except StopBatch:
            self._stop(lease, watch)
        except Exception as error:
            watch.close()
            if is_out_of_memory(error):
                self._stop_interrupting(lease)
            else:
                self._finisher.fail(batch, error)

    def _stop_interrupting(self, lease: Lease) -> None:
        """Release an urgent batch, because memory does not suffice for two batches."""
        self.may_interrupt = False
        self._twin = None
        free_what_is_left()
        log.warning(
            "%s has not enough memory to interrupt a batch. From now on urgent batches wait until "
            "the current batch ends: %s",
            self._identity.name,
            named(lease.frames),
        )
        self._claims.release(lease)

    def _begin(self, lease: Lease) -> tuple[RenderedBatch, LeaseWatch]:
        """Start the watch of a lease, and find the frames that must be rendered."""
        # With filters nothing is reused: they must see every picture.
        reuses = not self._resolved.pipeline.filters and any(frame.reuse for frame in lease.frames)
        if reuses:
            self._finisher.begin()  # searching and copying takes time
        frames, done = self._reuse.split(lease.frames) if reuses else (lease.frames, [])
        seconds = self._farm.settings.progress_seconds
        watch = LeaseWatch(self._farm.store, lease, seconds, self._interactive.notify)
        watch.start()
        stages = {"claim": self._claims.window(lease)}
        return RenderedBatch(lease, frames, stages, done=done), watch

    def _stop(self, lease: Lease, watch: LeaseWatch) -> None:
        watch.close()
        log.info("%s stopped rendering: %s", self._identity.name, named(lease.frames))
        self._claims.release(lease)

    def _denoise(
        self, loaded: LoadedPipeline, batch: RenderedBatch, on_step: Callable[[int, int], None]
    ) -> list[Image.Image | None]:
        """Denoise a batch, with a note in the scratch folder that it is on the device."""
        specs = [frame.spec for frame in batch.frames]
        images = BatchImages(self._images, self._owners(batch.frames))
        prompts = [spec.prompt for spec in specs]
        passed = since = 0.0

        def hook(step: int, steps: int) -> None:
            nonlocal passed, since
            passed += time.monotonic() - since
            self._claims.pace.measure(batch.lease.id, batch.lease.cost * step / steps, passed)
            failpoints.reach(self._farm.settings.failpoints, "render.step", prompts)
            on_step(step, steps)
            since = time.monotonic()

        self._compiled_shapes.warn_if_uncompiled(self._resolved.name, specs[0])
        self._scratch.hold(os.getpid(), batch.lease.id)
        self._finisher.begin()
        try:
            with torch_threads(self._slots.threads(loaded, specs[0])):
                since = time.monotonic()
                with self._previewing.of(batch.frames):
                    return self._resolved.family.denoise(loaded, Batch(specs, hook, images))
        except BaseException as error:
            loaded.reset_after_failure()
            if isinstance(error, REFUSALS):
                raise RenderError(f"Pipeline {self._resolved.name} refuses it: {error}") from error
            raise
        finally:
            # In any case: the parent kills a child that keeps a batch whose lease is lost.
            self._scratch.hold(os.getpid(), None)

    def _owners(self, claimed: Sequence[ClaimedFrame]) -> dict[str, uuid.UUID]:
        """Return the tenant of each image of a batch."""
        image_ids = self._resolved.params_type.image_ids
        return {
            image_id: frame.tenant_id
            for frame in claimed
            for image_id in image_ids(frame.spec.params)
        }
