"""A frame's bits must not depend on its slot in the batch: a test of each shape, on the device.

torch splits an operation among its threads, and computes what is left over at the end of each part
with scalar code in place of SIMD code, which rounds some functions differently (silu, sigmoid,
gelu). Where a part ends within a frame, that frame's slot decides its last bits. So each shape is
tested before it is rendered, and rendered with one thread where more make a difference.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from farm.domain.spec import FrameSpec
from farm.errors import RenderError
from farm.pipelines.family import Batch, Family, LoadedPipeline, floats_seen
from farm.pipelines.params import Params
from farm.pipelines.runtime.devices import thread_count, torch_threads

log = logging.getLogger(__name__)

FEWEST_STEPS = 2
"""Every step runs the same kernels; some samplers need two."""
FEWEST_OF_REFINED = 5
"""A refiner takes a fifth of them."""
PROMPT = "a red star"
PROBE, NEIGHBOUR = 7, 11
"""Seeds: of the frame that is looked at, and of those beside it"""


@dataclass(frozen=True)
class Shape:
    """What of a frame decides how a batch is split."""

    width: int
    height: int
    bucket: int
    guided: bool

    @classmethod
    def of(cls, frame: FrameSpec) -> Shape:
        """Tell a frame's shape."""
        params = frame.params
        guided = (params.get("guidance_scale") or 0.0) > 1.0
        return cls(params["width"], params["height"], frame.bucket, guided)


@dataclass
class SlotTest:
    """The shapes of one pinned pipeline that were tested, and the threads that each is given."""

    name: str
    family: Family
    params_type: type[Params]
    _threads: dict[Shape, int] = field(default_factory=dict)

    def threads_of(self, frame: FrameSpec, otherwise: int) -> int:
        """Torch's threads for a frame's shape, `otherwise` where that was not tested."""
        return self._threads.get(Shape.of(frame), otherwise)

    def threads(self, loaded: LoadedPipeline, frame: FrameSpec) -> int:
        """Torch's threads for a frame's shape, which is tested when it is first met; 0 on a GPU.

        Args:
            loaded: what will render it.
            frame: the first of a batch.

        Raises:
            RenderError: the bits depend on the slot, whatever is tried.
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
                            "Pipeline %s renders %dx%d at bucket %d with one thread: with %d the "
                            "bits depend on the slot",
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
        """Whether a probe comes out alike in all slots, and in the first one beside others."""
        probe, other = (_quickest(frame, seed) for seed in (PROBE, NEIGHBOUR))
        beside = frame.bucket - 1
        alike = self._bits(loaded, [probe] * frame.bucket)
        mixed = self._bits(loaded, [probe, *[other] * beside])
        return alike == alike[:1] * frame.bucket and mixed[0] == alike[0]

    def _bits(self, loaded: LoadedPipeline, frames: list[FrameSpec]) -> list[list[bytes]]:
        """Render frames; gives for each slot the bits of its latents and of its picture."""
        params = frames[0].params
        blank = Image.new("RGB", (params["width"], params["height"]))
        images = dict.fromkeys(self.params_type.image_ids(params), blank)
        with floats_seen() as seen:
            pictures = self.family.denoise(loaded, Batch(frames, images=images))
        bucket = len(frames)
        floats = [tensor for tensor in seen if tensor.shape[0] % bucket == 0]
        return [
            [_bytes_of(tensor[slot::bucket]) for tensor in floats]
            + [b"" if picture is None else picture.tobytes()]
            for slot, picture in enumerate(pictures)
        ]


def _quickest(frame: FrameSpec, seed: int) -> FrameSpec:
    """A frame of the same shape that takes the fewest steps."""
    params = frame.params
    steps = FEWEST_STEPS if params.get("denoising_end") is None else FEWEST_OF_REFINED
    other = {"steps": steps, "prior_steps": steps, "sampler": None, "prompt_syntax": "plain"}
    other = {name: value for name, value in other.items() if name in params}
    return frame.model_copy(update={"prompt": PROMPT, "seed": seed, "params": {**params, **other}})


def _bytes_of(tensor: Any) -> bytes:
    import torch

    found: bytes = tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes()
    return found
