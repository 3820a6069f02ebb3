"""A new family is one new file. Its jobs are then accepted, described and rendered."""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import farm.pipelines.families as farm_families
from farm.config import Settings
from farm.context import Farm
from farm.domain.spec import FrameSpec
from farm.errors import CatalogError
from farm.imaging.encoding import read
from farm.pipelines.catalog import load_catalog
from farm.pipelines.families import all_families
from farm.pipelines.family import Batch
from farm.pipelines.resolve import resolve_pipeline
from farm.storage import artifact_key
from tests.integration.test_api_refusals import check_problem
from tests.integration.test_child import hire
from tests.support.api_server import serving
from tests.support.store import frame_rows, job_row, submit

MODULE = '''
"""Gradients: from the colour that the weights hold to one that the job names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import Field

from farm.pipelines.catalog import Pipeline
from farm.pipelines.checkpoints.weights import weights_hash
from farm.pipelines.family import Batch, Checkpoint, LoadedPipeline, padded
from farm.pipelines.params import Params, tailored


class GradientParams(Params):
    """A size and where the gradient ends."""

    grey: int = Field(default=255, ge=0, le=255, description="the brightness at the right")
    steps: int = Field(default=2, ge=1, le=10, description="how often to say so")


class Gradient:
    name = "gradient"
    params: type[Params] = GradientParams
    parts: tuple[str, ...] = ()

    def fits(self, pipeline: Pipeline, checkpoint: Checkpoint) -> bool:
        return checkpoint.class_name == "GradientPipeline"

    def tailor(self, pipeline: Pipeline, checkpoint: Checkpoint) -> type[Params]:
        side = checkpoint.index["side"]
        return tailored(GradientParams, {"width": {"default": side}, "height": {"default": side}})

    def load(self, pipeline: Pipeline) -> LoadedPipeline:
        from safetensors.numpy import load_file

        folder = Path(pipeline.checkpoint)
        start = int(load_file(folder / "tint" / "model.safetensors")["start"][0])
        return LoadedPipeline(start, "cpu", "float32", None, weights_hash(folder))

    def denoise(self, loaded: LoadedPipeline, batch: Batch) -> list[Image.Image | None]:
        pictures: list[Image.Image | None] = []
        frames = padded(batch.frames)
        steps = frames[0].params["steps"]
        for step in range(steps):
            batch.on_step(step + 1, steps)
        for frame in frames:
            width, height = frame.params["width"], frame.params["height"]
            slope = (frame.params["grey"] - loaded.pipe) / (width - 1)
            row = [round(loaded.pipe + place * slope) for place in range(width)]
            picture = Image.new("L", (width, height))
            picture.putdata(row * height)
            pictures.append(picture.convert("RGB"))
        return pictures[: len(batch.frames)]


family = Gradient()
'''
START = 16
"""Grey value in the weights."""


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Return the package with the new file in it."""
    folder = tmp_path / "families"
    folder.mkdir()
    (folder / "gradient.py").write_text(MODULE)
    monkeypatch.setattr(farm_families, "__path__", [*farm_families.__path__, str(folder)])
    all_families.cache_clear()
    yield
    all_families.cache_clear()
    sys.modules.pop("farm.pipelines.families.gradient", None)


@pytest.fixture
def catalog(tmp_path: Path) -> Path:
    """Write an entry without a family: its checkpoint's class is enough."""
    tint = tmp_path / "dawn" / "tint"
    tint.mkdir(parents=True)
    save_file({"start": np.array([START], np.int32)}, tint / "model.safetensors")
    index = {"_class_name": "GradientPipeline", "tint": ["diffusers", "Tint"], "side": 24}
    (tmp_path / "dawn" / "model_index.json").write_text(json.dumps(index))
    path = tmp_path / "pipelines.toml"
    path.write_text('[pipelines.dawn]\nsource = "dawn"\nbucket = { "default" = 2 }\n')
    return path


@pytest.fixture
def settings(settings: Settings, catalog: Path, added: None) -> Settings:
    return settings.model_copy(update={"pipelines": catalog, "torch_threads": 1})


def expected(width: int, height: int, grey: int) -> Any:
    row = np.round(np.linspace(START, grey, width)).astype(np.uint8)
    return np.repeat(np.repeat(row[None, :, None], height, 0), 3, 2)


def test_from_the_catalog_to_a_picture(catalog: Path, added: None) -> None:
    entry = load_catalog(catalog).pipelines["dawn"]
    resolved = resolve_pipeline("dawn", entry)
    assert resolved.family.name == "gradient"
    params = resolved.params({"grey": 200, "height": 8}).model_dump()
    frame = FrameSpec(pipeline="dawn", prompt="dawn", seed=1, bucket=2, params=params)
    steps: list[tuple[int, int]] = []
    batch = Batch([frame], lambda *step: steps.append(step))
    [picture] = resolved.family.denoise(resolved.family.load(entry), batch)
    assert np.abs(np.asarray(picture).astype(int) - expected(24, 8, 200)).max() <= 1
    assert steps == [(1, 2), (2, 2)]


def test_without_the_file_there_is_no_such_family(catalog: Path) -> None:
    with pytest.raises(CatalogError, match="no family renders a GradientPipeline"):
        resolve_pipeline("dawn", load_catalog(catalog).pipelines["dawn"])


def test_from_a_client_to_the_storage(farm: Farm, tenant: uuid.UUID) -> None:
    """The API describes and checks its fields, a worker renders it, the picture records it."""
    with serving(farm) as api:
        client = api.client()
        [listed] = client.get("/v1/pipelines").json()["data"]
        assert (listed["family"], listed["problem"]) == ("gradient", None)
        assert listed["defaults"] == {"width": 24, "height": 24, "grey": 255, "steps": 2}
        job = client.get("/openapi.json").json()["components"]["schemas"]["JobSpec"]
        assert job["properties"]["grey"]["description"] == "the brightness at the right"
        wrong = {"pipeline": "dawn", "prompts": ["dawn"], "grey": 256}
        assert check_problem(client.post("/v1/jobs", json=wrong), 422)["error"]["param"] == "grey"
    job_id = submit(farm, tenant, pipeline="dawn", images_per_prompt=3, grid={"grey": [0, 99]})
    child = hire(farm, "dawn")
    child.start()
    child.answer()
    assert job_row(farm, tenant, job_id).status == "succeeded"
    rows = frame_rows(farm, job_id)
    assert len(rows) == 6
    for ordinal, row in rows.items():
        content = farm.artifacts.get(artifact_key(tenant, job_id, ordinal, row.sha256))
        image, provenance, _ = read(content)
        grey = 0 if ordinal < 3 else 99
        assert provenance.frame.params["grey"] == grey
        assert np.abs(np.asarray(image).astype(int) - expected(24, 24, grey)).max() <= 1
