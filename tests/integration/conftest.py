"""A pipeline whose every step a test can disturb, and the render line of a worker on it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from farm.context import Farm
from farm.pipelines.catalog import Pipeline
from farm.pipelines.resolve import ResolvedPipeline
from tests.noise import Noise, NoiseParams
from tests.rendering import render_line
from workers.render.loop import RenderLoop


@pytest.fixture
def noise(farm: Farm) -> Noise:
    family = Noise()
    pipeline = Pipeline(source="nowhere", bucket={"default": 4})
    farm.catalog.pipelines["noise"] = pipeline
    farm._offers["noise"] = ResolvedPipeline("noise", pipeline, family, NoiseParams, NoiseParams)
    return family


@pytest.fixture
def line(farm: Farm, noise: Noise) -> Iterator[RenderLoop]:
    line = render_line(farm, "noise")
    yield line
    line.close()
