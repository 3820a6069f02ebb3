"""A pipeline with a test hook in every step, a worker's render loop on it, and checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from farm.context import Farm
from farm.pipelines.catalog import Pipeline
from farm.pipelines.resolve import ResolvedPipeline
from tests.support.checkpoint_sandbox import CheckpointSandbox
from tests.support.noise_family import Noise, NoiseParams
from tests.support.render_loops import assembly_of
from workers.render.assembly import Assembly
from workers.render.loop import RenderLoop


@pytest.fixture
def noise(farm: Farm) -> Noise:
    family = Noise()
    pipeline = Pipeline(source="nowhere", bucket={"default": 4})
    farm.catalog.pipelines["noise"] = pipeline
    farm._offers["noise"] = ResolvedPipeline("noise", pipeline, family, NoiseParams, NoiseParams)
    return family


@pytest.fixture
def assembly(farm: Farm, noise: Noise) -> Iterator[Assembly]:
    made = assembly_of(farm, "noise")
    yield made
    made.loop.close()


@pytest.fixture
def loop(assembly: Assembly) -> RenderLoop:
    return assembly.loop


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of undamaged checkpoints. Each is made once per module."""
    return tmp_path_factory.mktemp("good")


@pytest.fixture
def bench(good: Path, tmp_path: Path) -> CheckpointSandbox:
    return CheckpointSandbox(good, tmp_path)
