"""A family that renders nothing: it waits for each step and gives noise, or pictures that lie in
its checkpoint. For benches and chaos."""

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
    """How large the noise is, and how long it takes."""

    width: int = Field(default=64, ge=8, le=8192, multiple_of=8, description="pixels")
    height: int = Field(default=64, ge=8, le=8192, multiple_of=8, description="pixels")
    steps: int = Field(default=4, ge=1, le=1000, description="steps, with nothing done in them")
    step_seconds: float = Field(default=0.01, ge=0.0, le=10.0, description="how long a step waits")


class Null:
    """The family behind `family = "null"`."""

    name = "null"
    torchless = True
    params: type[Params] = NullParams
    parts: tuple[str, ...] = ()

    def fits(self, pipeline: Pipeline, checkpoint: Checkpoint) -> bool:
        """Render what `write_checkpoint` writes."""
        return checkpoint.class_name == CLASS

    def tailor(self, pipeline: Pipeline, checkpoint: Checkpoint) -> type[Params]:
        """Every checkpoint is the same."""
        return NullParams

    def load(self, pipeline: Pipeline) -> LoadedPipeline:
        """Pin nothing but the checkpoint's pictures, if there are any."""
        folder = Path(pipeline.checkpoint)
        pictures = {"pictures": _pictures(folder)}
        return LoadedPipeline(None, NONE, "float32", None, weights_hash(folder), extras=pictures)

    def denoise(self, loaded: LoadedPipeline, batch: Batch) -> list[Image.Image | None]:
        """Wait as long as the frames say, and give each what belongs to its seed and size."""
        params = NullParams.model_validate(batch.frames[0].params)
        for step in range(1, params.steps + 1):
            time.sleep(params.step_seconds)
            batch.on_step(step, params.steps)
        size = (params.width, params.height)
        there = [picture for picture in loaded.extras["pictures"] if picture.size == size]
        if there:
            return [there[frame.seed % len(there)] for frame in batch.frames]
        pictures = [noise(frame.seed, *size) for frame in padded(batch.frames)]
        return [*pictures[: len(batch.frames)]]


def noise(seed: int, width: int, height: int) -> Image.Image:
    """Draw a picture of random colours, always the same for a seed and a size."""
    from PIL import Image

    content = random.Random(seed).randbytes(width * height * 3)  # noqa: S311 - pictures, no secrets
    return Image.frombytes("RGB", (width, height), content)


def _pictures(folder: Path) -> list[Image.Image]:
    from PIL import Image

    return [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.png"))]


def write_checkpoint(folder: Path, pictures: Sequence[Image.Image] = ()) -> None:
    """Make the folder that a catalog entry of this family names as its source; 50 bytes in all.

    Args:
        folder: made if missing.
        pictures: what is given instead of noise to frames of their size, chosen by the seed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": CLASS}))
    empty = b"{}"
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(empty)) + empty)
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number:03}.png")


family = Null()
