"""Previews of the batch on the device: small pictures of its latents, while somebody watches.

The step hook only starts a copy of the latents, and never waits for it. A thread turns the copy
into pictures. The latents themselves are never changed.
"""

from __future__ import annotations

import io
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image

from farm.errors import Unavailable
from farm.pipelines.family import Latents, LoadedPipeline, latents_shown_to
from farm.services.previews import Preview, Previews
from farm.store.claim import ClaimedFrame
from workers.render.previews.colours import LatentColours, as_grid
from workers.render.previews.noise import estimated_picture, levels_around

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

T = TypeVar("T")

FRAMES = 4
"""Frames of a batch that have previews: the first ones."""
FIRST_SHARE = 0.2
"""Share of the steps before the first preview. Until then a picture is mostly noise."""
PICTURE_SECONDS = 0.5
"""Least time between two previews of a batch, in seconds."""
LOOK_SECONDS = 1.0
"""Interval in which a batch is looked up: does anybody watch it? In seconds."""
SILENT_SECONDS = 5.0
"""Pause after Redis did not answer, in seconds."""
MAX_SIDE = 256
"""Maximum width and height of a preview, in pixels."""
JPEG_QUALITY = 70


@dataclass
class _Copy:
    """Latents on their way to the CPU, with those of the step before."""

    after: torch.Tensor
    before: torch.Tensor | None
    latents: Latents
    wait: Callable[[], object]
    """Returns when the copies are complete."""

    def grid(self, width: int, height: int) -> Any:
        """Return the estimated picture as (batch, rows, columns, channels); None: it is none."""
        self.wait()
        after = self.after.float().numpy()
        before = None if self.before is None else self.before.float().numpy()
        levels = levels_around(self.latents.scheduler, self.latents.index)
        return as_grid(estimated_picture(before, after, levels), width, height)


class Previewing:
    """Previews of the batches of one render process."""

    def __init__(self, previews: Previews, *, allowed: bool) -> None:
        """Create it.

        Args:
            previews: where they are put.
            allowed: False if a filter or a safety checker may keep pictures back.
        """
        self._previews = previews
        self._allowed = allowed
        self._colours = LatentColours()
        self._silent_until = 0.0

    @contextmanager
    def of(self, frames: Sequence[ClaimedFrame]) -> Iterator[BatchPreviews | None]:
        """Show the latents that are denoised in the block."""
        if not self._allowed:
            yield None
            return
        batch = BatchPreviews(self, frames)
        try:
            with latents_shown_to(batch.on_latents):
                yield batch
        finally:
            batch.close()

    def close(self) -> None:
        """Close the connections."""
        self._previews.close()

    def ask(self, call: Callable[[Previews], T], otherwise: T) -> T:
        """Ask Redis, unless it was silent just now. Return `otherwise` if it does not answer."""
        if time.monotonic() < self._silent_until:
            return otherwise
        try:
            return call(self._previews)
        except Unavailable as error:
            log.debug("Previews are left out: %s", error)
            self._silent_until = time.monotonic() + SILENT_SECONDS
            return otherwise

    @property
    def colours(self) -> LatentColours:
        """The colours of latents, as far as they have been learned."""
        return self._colours


class BatchPreviews:
    """Previews of one batch. The device's thread calls `on_latents`, another one makes them."""

    def __init__(self, owner: Previewing, frames: Sequence[ClaimedFrame]) -> None:
        self._owner = owner
        self._frames = frames[:FRAMES]
        self._bucket = frames[0].spec.bucket
        params = frames[0].spec.params
        self._width, self._height = int(params["width"]), int(params["height"])
        self._is_even = not params.get("eta")
        """True if the sampler adds no noise that its job asked for."""
        self._pictures: Sequence[Image.Image | None] = ()
        self._changed = threading.Condition()
        self._copy: _Copy | None = None
        self._latest: Latents | None = None
        self._watched: set[uuid.UUID] = set()
        self._shown: dict[uuid.UUID, set[int]] = {}
        self._due_at = 0.0
        self._is_over = False
        self._thread = threading.Thread(target=self._work, name="previews", daemon=True)
        self._thread.start()

    def on_latents(self, latents: Latents) -> None:
        """Copy the latents of a step, if they are needed. Never waits."""
        if len(latents.values) != self._bucket:
            return
        before, self._latest = self._latest, latents
        now = time.monotonic()
        share = latents.done / latents.steps
        if not self._watched or not FIRST_SHARE <= share < 1 or now < self._due_at:
            return
        self._due_at = now + PICTURE_SECONDS
        copy = _copied(latents, before if self._is_even else None, len(self._frames))
        with self._changed:
            self._copy = copy
            self._changed.notify()

    def learn(self, pictures: Sequence[Image.Image | None]) -> None:
        """Learn the colours of latents from the finished pictures, in the thread."""
        self._pictures = pictures[: len(self._frames)]

    def close(self) -> None:
        """End the previews, without waiting for the thread."""
        with self._changed:
            self._is_over = True
            self._changed.notify()

    def _work(self) -> None:
        job_ids = list({frame.job_id for frame in self._frames})
        try:
            while not self._is_over:
                self._watched = self._owner.ask(lambda all_: all_.watched(job_ids), set())
                with self._changed:
                    self._changed.wait_for(lambda: self._copy or self._is_over, LOOK_SECONDS)
                    copy, self._copy = self._copy, None
                if copy is not None and not self._is_over:
                    self._show(copy)
            if self._shown:
                self._owner.ask(lambda all_: all_.drop(self._shown), None)
            self._learn()
        except Exception:
            log.exception("The previews of a batch failed.")

    def _show(self, copy: _Copy) -> None:
        grid = copy.grid(self._width, self._height)
        if grid is None:
            return
        scale = min(1.0, MAX_SIDE / max(self._width, self._height))
        size = max(1, round(self._width * scale)), max(1, round(self._height * scale))
        made: dict[uuid.UUID, list[Preview]] = {}
        for frame, latents in zip(self._frames, grid, strict=True):
            if frame.job_id in self._watched:
                image = self._owner.colours.picture(latents, size)
                if image is None:
                    return
                done, steps = copy.latents.done, copy.latents.steps
                preview = Preview(frame.ordinal, done, steps, _jpeg(image))
                made.setdefault(frame.job_id, []).append(preview)
                self._shown.setdefault(frame.job_id, set()).add(frame.ordinal)
        self._owner.ask(lambda all_: all_.put(made), None)

    def _learn(self) -> None:
        if self._latest is None or not self._pictures or self._owner.colours.is_learned:
            return
        grid = _copied(self._latest, None, len(self._frames)).grid(self._width, self._height)
        if grid is None:
            return
        for picture, latents in zip(self._pictures, grid, strict=False):
            if picture is not None:
                self._owner.colours.learn(latents, picture)


def _copied(latents: Latents, before: Latents | None, frames: int) -> _Copy:
    """Start a copy to the CPU. On a GPU it runs behind the step, and nobody waits for it."""
    import torch

    pinned = latents.values.device.type == "cuda"

    def copy(values: torch.Tensor) -> torch.Tensor:
        values = values.detach()[:frames]
        if not pinned:
            return values.to("cpu", copy=True)
        there = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        return there.copy_(values, non_blocking=True)

    after, earlier = copy(latents.values), None if before is None else copy(before.values)
    if not pinned:
        return _Copy(after, earlier, latents, lambda: None)
    event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return _Copy(after, earlier, latents, event.synchronize)


def _jpeg(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "JPEG", quality=JPEG_QUALITY)
    return content.getvalue()


def keeps_pictures_back(loaded: LoadedPipeline) -> bool:
    """Return True if a safety checker may keep pictures back: a preview would show them."""
    return any(getattr(pipe, "safety_checker", None) is not None for pipe in loaded.pipes)
