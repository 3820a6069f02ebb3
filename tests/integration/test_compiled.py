"""A compiled pipeline: every declared shape is compiled before the first claim, and none after.

A backend that runs the graphs as traced counts them. test_kept_graphs.py tests inductor's output.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from farm.context import Farm
from farm.pipelines.catalog import load_catalog
from farm.pipelines.runtime import compiling
from farm.pipelines.runtime.devices import torch_threads
from farm.rendering.warmup import Shape, declared_shapes
from tests.support.checkpoints import save
from tests.support.render_loops import assembly_of
from tests.support.store import job_row, submit
from workers.render.loop import RenderLoop

pytestmark = [
    # diffusers' own samplers hand torch tensors to numpy.array.
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
    # torch's compiler imports parts of torch that are deprecated.
    pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning"),
]

CATALOG = """
[pipelines.tiny]
source = "tiny"
device = "cpu"
compile = "default"
bucket = { "default" = 2 }
"""


@pytest.fixture
def loop(farm: Farm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RenderLoop]:
    import torch
    from torch._dynamo.utils import counters

    monkeypatch.setattr(compiling, "BACKEND", "eager")
    save("stable_diffusion", tmp_path / "tiny")
    (tmp_path / "pipelines.toml").write_text(CATALOG)
    farm.catalog.pipelines.update(load_catalog(tmp_path / "pipelines.toml").pipelines)
    counters.clear()
    with torch_threads(1):
        loop = assembly_of(farm, "tiny").loop
        yield loop
        loop.close()
    torch.compiler.set_stance("default")


def test_nothing_is_compiled_after_the_warm_up(
    farm: Farm, tenant: uuid.UUID, loop: RenderLoop, caplog: pytest.LogCaptureFixture
) -> None:
    import torch
    from torch._dynamo.utils import counters

    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    mixed: list[dict[str, Any]] = [
        {"images_per_prompt": 3, "sampler": "ddim"},
        {"images_per_prompt": 2, "sampler": "euler", "negative_prompt": "b"},
        {"priority": "interactive", "guidance_scale": 1.0, "clip_skip": 1},
        {"sampler": "heun", "guidance_rescale": 0.5},
        {"guidance_scale": 1.0, "images_per_prompt": 2},
    ]
    jobs = [
        submit(farm, tenant, pipeline="tiny", prompts=["a"], steps=2, **fields) for fields in mixed
    ]
    with torch.compiler.set_stance("fail_on_recompile"):
        loop.run()
    for job in jobs:
        assert job_row(farm, tenant, job).status == "succeeded"
    assert "is not compiled for" not in caplog.text

    outside: dict[str, Any] = {"width": 96, "height": 64, "images_per_prompt": 3, "steps": 1}
    with caplog.at_level(logging.WARNING, "farm.rendering.warmup"):
        for _ in range(2):
            job = submit(farm, tenant, pipeline="tiny", prompts=["a"], **outside)
            loop.run()
            assert job_row(farm, tenant, job).status == "succeeded"
    assert caplog.text.count("is not compiled for 96x64 at bucket 2") == 1
    assert counters["stats"]["unique_graphs"] == graphs


def test_the_declared_shapes(farm: Farm, tmp_path: Path) -> None:
    save("stable_diffusion", tmp_path / "tiny")
    (tmp_path / "pipelines.toml").write_text(
        CATALOG.replace('"default" = 2', '"default" = 2, "32x64" = 6').replace(
            '"default"\n', '""\n'
        )
    )
    farm.catalog.pipelines.update(load_catalog(tmp_path / "pipelines.toml").pipelines)
    assert set(declared_shapes(farm.resolve("tiny"))) == {
        *(Shape(64, 64, bucket) for bucket in (1, 2)),
        *(Shape(32, 64, bucket) for bucket in (1, 2, 4, 6)),
    }
