"""Family that renders nothing, for benchmarks and chaos tests.

It waits at each step, and returns noise, or pictures from its checkpoint. If its catalog entry has
a `ladder`, a batch takes that time too, like a device that is slower with more frames.
"""

from __future__ import annotations

import json
import random
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from farm.pipelines.catalog import Pipeline
from farm.pipelines.checkpoints.weights import weights_hash
from farm.pipelines.family import Batch, Checkpoint, LoadedPipeline, padded
from farm.pipelines.params import Params
from farm.pipelines.runtime.devices import NONE

if TYPE_CHECKING:
    from PIL import Image

CLASS = "NullPipeline"


class NullParams(Params):
    """Size of the noise, and number and duration of its steps."""

    width: int = Field(
        default=64, ge=8, le=8192, multiple_of=8, description="width of the picture, in pixels"
    )
    height: int = Field(
        default=64, ge=8, le=8192, multiple_of=8, description="height of the picture, in pixels"
    )
    steps: int = Field(default=4, ge=1, le=1000, description="number of steps, which only wait")
    step_seconds: float = Field(
        default=0.01, ge=0.0, le=10.0, description="duration of a step, in seconds"
    )


class Null:
    """The family behind `family = "null"`."""

    name = "null"
    torchless = True
    params: type[Params] = NullParams
    parts: tuple[str, ...] = ()

    def fits(self, pipeline: Pipeline, checkpoint: Checkpoint) -> bool:
        """Accept the checkpoints that `write_checkpoint` writes."""
        return checkpoint.class_name == CLASS

    def tailor(self, pipeline: Pipeline, checkpoint: Checkpoint) -> type[Params]:
        """Return the same parameters for every checkpoint."""
        return NullParams

    def load(self, pipeline: Pipeline) -> LoadedPipeline:
        """Load only the pictures of the checkpoint, if it has any."""
        folder = Path(pipeline.checkpoint)
        extras = {
            "pictures": _pictures(folder),
            "seconds": {step.bucket: step.seconds for step in pipeline.ladder},
        }
        return LoadedPipeline(None, NONE, "float32", None, weights_hash(folder), extras=extras)

    def denoise(self, loaded: LoadedPipeline, batch: Batch) -> list[Image.Image | None]:
        """Wait for the time of the steps, and return a picture for each frame's seed and size."""
        params = NullParams.model_validate(batch.frames[0].params)
        batch_seconds = loaded.extras["seconds"].get(batch.frames[0].bucket, 0.0)
        for step in range(1, params.steps + 1):
            time.sleep(params.step_seconds + batch_seconds / params.steps)
            batch.on_step(step, params.steps)
        size = (params.width, params.height)
        there = [picture for picture in loaded.extras["pictures"] if picture.size == size]
        if there:
            return [there[frame.seed % len(there)] for frame in batch.frames]
        pictures = [noise(frame.seed, *size) for frame in padded(batch.frames)]
        return [*pictures[: len(batch.frames)]]


def noise(seed: int, width: int, height: int) -> Image.Image:
    """Return a picture of random colours, always the same for a seed and a size."""
    from PIL import Image

    content = random.Random(seed).randbytes(width * height * 3)  # noqa: S311 - pictures, no secrets
    return Image.frombytes("RGB", (width, height), content)


def _pictures(folder: Path) -> list[Image.Image]:
    from PIL import Image

    return [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.png"))]


def write_checkpoint(folder: Path, pictures: Sequence[Image.Image] = ()) -> None:
    """Write a checkpoint folder for a catalog entry of this family; 50 bytes without pictures.

    Args:
        folder: folder of the checkpoint; made if missing.
        pictures: pictures for frames of their size, instead of noise, chosen by the seed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": CLASS}))
    empty = b"{}"
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(empty)) + empty)
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number:03}.png")


family = Null()
