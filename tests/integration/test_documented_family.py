"""The example family of docs/pipelines.md renders the same pixels as the family it replaces."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from farm.domain.spec import FrameSpec
from farm.pipelines.catalog import Pipeline
from farm.pipelines.family import Batch, Family, StopBatch
from farm.pipelines.resolve import resolve_pipeline
from tests.support.checkpoints import save
from tests.support.docs_page import EXAMPLE_FAMILY

NAME = "documented_flux"


@pytest.fixture
def documented(tmp_path: Path) -> Iterator[Family]:
    path = tmp_path / "flux.py"
    path.write_text(EXAMPLE_FAMILY.text)
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[NAME] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module.family
    del sys.modules[NAME]


@pytest.fixture
def entry(tmp_path: Path) -> Iterator[Pipeline]:
    save("flux", tmp_path / "tiny")
    entry = Pipeline(source="tiny", device="cpu")
    entry.place(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield entry
    torch.set_num_threads(threads)


def frame(seed: int, params: dict[str, Any]) -> FrameSpec:
    return FrameSpec(pipeline="tiny", prompt="a red star", seed=seed, bucket=2, params=params)


def test_it_renders_what_the_family_renders_that_it_replaces(
    documented: Family, entry: Pipeline
) -> None:
    asked = {"steps": 2, "width": 64, "height": 32, "guidance_scale": 2.0}
    resolved = resolve_pipeline("tiny", entry)
    assert resolved.family.name == "auto"
    before = resolved.family.denoise(
        resolved.family.load(entry), Batch([frame(1, resolved.params(asked).model_dump())])
    )
    steps: list[tuple[int, int]] = []
    loaded = documented.load(entry)
    batch = Batch([frame(1, asked)], lambda *step: steps.append(step))
    pictures = documented.denoise(loaded, batch)
    assert [np.asarray(picture).tolist() for picture in pictures] == [
        np.asarray(picture).tolist() for picture in before
    ]
    assert steps == [(1, 2), (2, 2)]

    def stop(_step: int, _steps: int) -> None:
        raise StopBatch

    with pytest.raises(StopBatch):
        documented.denoise(loaded, Batch([frame(1, asked)], stop))
