"""Previews of the batch on the device: small pictures of its latents, while somebody watches.

The step hook only starts a copy of the latents, and never waits for the device. A thread turns the
copy into pictures. The latents themselves are never changed, and an error here is logged only.
"""

from __future__ import annotations

import io
import logging
import queue
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
LOOK_SECONDS = 0.5
"""Interval in which a batch is looked up: does anybody watch it? In seconds."""
SILENT_SECONDS = 5.0
"""Pause after Redis did not answer, in seconds."""
MAX_SIDE = 256
"""Maximum width and height of a preview, in pixels."""
JPEG_QUALITY = 70


class Previewing:
    """Previews of the batches of one render process."""

    def __init__(self, previews: Previews, colours: LatentColours | None) -> None:
        """Create it.

        Args:
            previews: where they are put.
            colours: the colours of the pipeline's latents. None: there are no previews.
        """
        self.colours = colours
        self._previews = previews
        self._silent_until = 0.0
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    @contextmanager
    def of(self, frames: Sequence[ClaimedFrame]) -> Iterator[None]:
        """Show the latents that are denoised in the block."""
        if self.colours is None:
            yield
            return
        batch = BatchPreviews(self, self.colours, frames)
        with latents_shown_to(batch.on_latents):
            try:
                yield
            finally:
                batch.close()

    def close(self) -> None:
        """End the thread, and close the connections."""
        self._tasks.put(None)
        if self._thread is not None:
            self._thread.join()
        self._previews.close()

    def do(self, task: Callable[[], None]) -> None:
        """Do something in the thread, which is started if needed.

        Raises:
            RuntimeError: There can be no more threads.
        """
        if self._thread is None:
            thread = threading.Thread(target=self._work, name="previews", daemon=True)
            thread.start()
            self._thread = thread
        self._tasks.put(task)

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

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                task()
            except Exception:
                log.exception("A preview failed.")


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
        return as_grid(estimated_picture(before, after, levels_around(self.latents)), width, height)


class BatchPreviews:
    """Previews of one batch. The device's thread calls it, and another one makes the pictures."""

    def __init__(
        self, owner: Previewing, colours: LatentColours, frames: Sequence[ClaimedFrame]
    ) -> None:
        self._owner = owner
        self._colours = colours
        self._frames = frames[:FRAMES]
        self._bucket = frames[0].spec.bucket
        params = frames[0].spec.params
        self._width, self._height = int(params["width"]), int(params["height"])
        self._is_even = not params.get("eta")
        """True if the sampler adds no noise that its job asked for."""
        self._copy: _Copy | None = None
        self._before: Latents | None = None
        self._watched: set[uuid.UUID] = set()
        self._shown: dict[uuid.UUID, set[int]] = {}
        self._look_at = self._due_at = 0.0
        self._is_over = False

    def on_latents(self, latents: Latents) -> None:
        """Copy the latents of a step, if they are needed. Never waits, and never raises."""
        try:
            if not self._is_over:
                self._note(latents)
        except Exception:
            log.exception("The previews of a batch failed.")
            self._is_over = True

    def close(self) -> None:
        """End the previews, without waiting for the thread."""
        self._is_over = True
        self._before = None
        if self._shown or self._copy is not None:
            self._owner.do(self._drop)

    def _note(self, latents: Latents) -> None:
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + LOOK_SECONDS
            self._owner.do(self._look)
        if len(latents.values) != self._bucket:
            return
        before, self._before = self._before, latents
        share = latents.done / latents.steps
        if not self._watched or not FIRST_SHARE <= share < 1 or now < self._due_at:
            return
        self._due_at = now + PICTURE_SECONDS
        is_first = self._copy is None
        self._copy = _copied(latents, before if self._is_even else None, len(self._frames))
        if is_first:  # else the thread has not taken the one before
            self._owner.do(self._show)

    def _look(self) -> None:
        job_ids = list({frame.job_id for frame in self._frames})
        self._watched = self._owner.ask(lambda all_: all_.watched(job_ids), set())

    def _show(self) -> None:
        copy, self._copy = self._copy, None
        grid = copy.grid(self._width, self._height) if copy and not self._is_over else None
        if copy is None or grid is None:
            return
        scale = min(1.0, MAX_SIDE / max(self._width, self._height))
        size = max(1, round(self._width * scale)), max(1, round(self._height * scale))
        made: dict[uuid.UUID, list[Preview]] = {}
        for frame, latents in zip(self._frames, grid, strict=True):
            if frame.job_id not in self._watched:
                continue
            image = self._colours.picture(latents, size)
            if image is not None:
                done, steps = copy.latents.done, copy.latents.steps
                preview = Preview(frame.ordinal, done, steps, _jpeg(image))
                made.setdefault(frame.job_id, []).append(preview)
                self._shown.setdefault(frame.job_id, set()).add(frame.ordinal)
        self._owner.ask(lambda all_: all_.put(made), None)

    def _drop(self) -> None:
        self._copy = None
        self._owner.ask(lambda all_: all_.drop(self._shown), None)


def _copied(latents: Latents, before: Latents | None, frames: int) -> _Copy:
    """Start a copy to the CPU. On a GPU it runs behind the step, and nobody waits for it."""
    import torch

    pinned = latents.values.device.type == "cuda"

    def copy(values: torch.Tensor) -> torch.Tensor:
        values = values.detach()[:frames]
        if not pinned:
            return values.to("cpu", copy=True)
        # torch keeps pinned memory for the next copy: only the first one allocates it.
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
