"""Test of each shape on the device: a frame's bits must not depend on its slot in the batch.

torch splits an operation among its threads. It computes the rest at the end of each part with
scalar code instead of SIMD code, which rounds some functions differently (silu, sigmoid, gelu). If
a part ends within a frame, that frame's slot decides its last bits. So each shape is tested before
it is rendered. If more threads make a difference, it is rendered with one.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from PIL import Image

from farm.domain.spec import FrameSpec
from farm.errors import RenderError
from farm.pipelines.family import (
    Batch,
    Family,
    LoadedPipeline,
    floats_seen,
    latents_shown_to,
)
from farm.pipelines.params import Params
from farm.pipelines.runtime.devices import thread_count, torch_threads

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

FEWEST_STEPS = 2
"""Number of steps of a test. Every step runs the same kernels; some samplers need two."""
FEWEST_OF_REFINED = 5
"""Number of steps of a test with a refiner, which takes a fifth of them."""
PROMPT = "a red star"
"""Prompt of the test."""
PROBE, NEIGHBOUR = 7, 11
"""Seed of the tested frame, and seed of its neighbours."""


@dataclass(frozen=True)
class Shape:
    """Facts about a frame that decide how its batch is split."""

    width: int
    height: int
    bucket: int
    guided: bool

    @classmethod
    def of(cls, frame: FrameSpec) -> Shape:
        """Return a frame's shape."""
        params = frame.params
        guided = (params.get("guidance_scale") or 0.0) > 1.0
        return cls(params["width"], params["height"], frame.bucket, guided)


@dataclass
class SlotTest:
    """Tested shapes of one pinned pipeline, with the number of threads for each."""

    name: str
    family: Family
    params_type: type[Params]
    _threads: dict[Shape, int] = field(default_factory=dict)

    def threads_of(self, frame: FrameSpec, otherwise: int) -> int:
        """Return torch's threads for a frame's shape, or `otherwise` if it was not tested."""
        return self._threads.get(Shape.of(frame), otherwise)

    def threads(self, loaded: LoadedPipeline, frame: FrameSpec) -> int:
        """Return torch's threads for a frame's shape; 0 on a GPU. Test the shape at its first use.

        Args:
            loaded: pipeline that will render it.
            frame: first frame of a batch.

        Raises:
            RenderError: the bits depend on the slot, even with one thread.
        """
        shape = Shape.of(frame)
        if shape not in self._threads:
            self._threads[shape] = self._tested(loaded, frame, shape)
        return self._threads[shape]

    def _tested(self, loaded: LoadedPipeline, frame: FrameSpec, shape: Shape) -> int:
        most = thread_count(loaded.device)
        if shape.bucket == 1 or not loaded.pipes:
            return most
        for threads in dict.fromkeys([most, min(most, 1)]):
            with torch_threads(threads):
                if self._is_even(loaded, frame):
                    if threads < most:
                        log.warning(
                            "Pipeline %s renders %dx%d at bucket %d with one thread: with %d "
                            "threads the bits depend on the slot",
                            self.name,
                            shape.width,
                            shape.height,
                            shape.bucket,
                            most,
                        )
                    return threads
        raise RenderError(
            f"Pipeline {self.name} cannot render {shape.width}x{shape.height} at bucket "
            f"{shape.bucket} to the same bytes: on this device a picture's bits depend on its "
            "slot in the batch. Choose another bucket, such as 1, or another size."
        )

    def _is_even(self, loaded: LoadedPipeline, frame: FrameSpec) -> bool:
        """Return True if a probe has the same bits in all slots, and with other neighbours."""
        probe, other = (_quickest(frame, seed) for seed in (PROBE, NEIGHBOUR))
        alike = self._bits(loaded, [probe] * frame.bucket)
        mixed = self._bits(loaded, [probe, *[other] * (frame.bucket - 1)])
        return alike == alike[:1] * frame.bucket and mixed[0] == alike[0]

    def _bits(self, loaded: LoadedPipeline, frames: list[FrameSpec]) -> list[list[bytes]]:
        """Render frames. Return, for each slot, the bits of its latents and of its picture."""
        params = frames[0].params
        blank = Image.new("RGB", (params["width"], params["height"]))
        images = dict.fromkeys(self.params_type.image_ids(params), blank)
        # They are no pictures of the batch that this test may interrupt.
        with latents_shown_to(lambda _: None), floats_seen() as seen:
            pictures = self.family.denoise(loaded, Batch(frames, images=images))
        bucket = len(frames)
        floats = [tensor for tensor in seen if tensor.shape[0] % bucket == 0]
        return [
            [_bytes_of(tensor[slot::bucket]) for tensor in floats]
            + [b"" if picture is None else picture.tobytes()]
            for slot, picture in enumerate(pictures)
        ]


def _quickest(frame: FrameSpec, seed: int) -> FrameSpec:
    """Return a frame of the same shape with the fewest steps."""
    params = frame.params
    steps = FEWEST_STEPS if params.get("denoising_end") is None else FEWEST_OF_REFINED
    other = {"steps": steps, "prior_steps": steps, "sampler": None, "prompt_syntax": "plain"}
    other = {name: value for name, value in other.items() if name in params}
    return frame.model_copy(update={"prompt": PROMPT, "seed": seed, "params": {**params, **other}})


def _bytes_of(tensor: torch.Tensor) -> bytes:
    import torch

    found: bytes = tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes()
    return found
