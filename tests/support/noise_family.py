"""A family for tests only: seeded noise, ten steps a batch, with a hook for tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from farm.domain.spec import FrameSpec
from farm.pipelines.catalog import Pipeline
from farm.pipelines.family import Batch, Checkpoint, LoadedPipeline, padded
from farm.pipelines.params import Negatable, Params

STEPS = 10
Disturb = Callable[[Sequence[FrameSpec], int], None]


class NoiseParams(Negatable):
    """Parameters: only a size."""

    width: int = 8
    height: int = 8


class Noise:
    """A family that renders seeded noise in ten steps a batch, and calls the test's hook."""

    name = "noise"
    params: type[Params] = NoiseParams
    parts: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.batches: list[list[FrameSpec]] = []
        self.disturb: Disturb = lambda _frames, _step: None
        self.steps = STEPS

    def fits(self, pipeline: Pipeline, checkpoint: Checkpoint) -> bool:
        return False

    def tailor(self, pipeline: Pipeline, checkpoint: Checkpoint) -> type[Params]:
        return NoiseParams

    def load(self, pipeline: Pipeline) -> LoadedPipeline:
        return LoadedPipeline(
            pipe=None, device="cpu", dtype="float32", scheduler_config=None, weights="0" * 64
        )

    def denoise(self, loaded: LoadedPipeline, batch: Batch) -> list[Image.Image | None]:
        frames = batch.frames
        self.batches.append(list(padded(frames)))
        for step in range(self.steps):
            self.disturb(frames, step)
            batch.on_step(step + 1, self.steps)
        return [
            Image.fromarray(np.random.default_rng(frame.seed).integers(0, 255, (8, 8, 3), np.uint8))
            for frame in frames
        ]
