"""The fallback family, with every class that AutoPipelineForText2Image knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from farm.domain.spec import FrameSpec
from farm.errors import CatalogError
from farm.pipelines.catalog import Pipeline
from farm.pipelines.checkpoints.call_signature import (
    TABLES,
    _tables,
    read_signature,
    text_to_image_class,
)
from farm.pipelines.families.auto import Auto
from farm.pipelines.family import Batch, Checkpoint
from farm.pipelines.resolve import resolve_pipeline
from farm.pipelines.runtime.devices import prepare_torch
from tests.support.checkpoints import save

CONFIGS: dict[str, dict[str, Any]] = {
    "transformer": {"sample_size": 64, "patch_size": 2},
    "vae": {"block_out_channels": [1, 2, 3, 4]},
    "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler"},
}
PICTURES = Pipeline(source="somewhere", defaults={"width": 512, "height": 512})


# Read without imports, as the farm does: importing diffusers takes four seconds a process.
# Kolors needs sentencepiece. Without it diffusers leaves Kolors out of its table.
KNOWN_CLASSES = sorted({name for name in _tables()[TABLES[0]].values() if "Kolors" not in name})


def test_the_classes_are_those_of_diffusers_own_table() -> None:
    from diffusers.pipelines import auto_pipeline

    table = auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING
    assert sorted({kind.__name__ for kind in table.values()}) == KNOWN_CLASSES


@pytest.mark.parametrize("class_name", KNOWN_CLASSES)
def test_every_class_is_offered_or_refused_in_clear(class_name: str) -> None:
    """Each default equals that of the class itself, read by Python."""
    import inspect

    import diffusers

    assert text_to_image_class(class_name) == class_name
    signature = read_signature(class_name)
    assert signature is not None
    real = inspect.signature(getattr(diffusers, class_name).__call__).parameters
    assert list(signature.arguments) == [name for name in real if name not in {"self", "kwargs"}]
    for name, argument in signature.arguments.items():
        if argument.is_known and not argument.is_required:
            assert argument.default == real[name].default, name
    checkpoint = Checkpoint({"_class_name": class_name}, CONFIGS)
    if "Control" in class_name or "num_frames" in real:
        with pytest.raises(CatalogError, match=r"also needs an image|renders videos"):
            Auto().tailor(PICTURES, checkpoint)
        return
    params = Auto().tailor(PICTURES, checkpoint)
    given = params.model_validate({"width": 512, "height": 512})
    assert given.model_dump()["steps"] == real["num_inference_steps"].default
    assert params.json_schema()["properties"]["width"]["multipleOf"] in {8, 16}


def test_other_classes_of_a_checkpoint_are_taken_as_the_auto_class_takes_them() -> None:
    from diffusers.pipelines import auto_pipeline

    table: Any = auto_pipeline
    for other in (table.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, table.AUTO_INPAINT_PIPELINES_MAPPING):
        for kind in other.values():
            expected = table._get_task_class(
                table.AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
                kind.__name__,
                throw_error_if_not_exist=False,
            )
            found = text_to_image_class(kind.__name__)
            assert found == (expected.__name__ if expected else None), kind


def test_no_neighbour_s_words_change_a_picture(tmp_path: Path) -> None:
    """CogView4 pads all prompts of a call to the longest, and the padding has an effect."""
    save("cogview4", tmp_path / "cogview4")
    resolved = resolve_pipeline("cog", Pipeline(source=str(tmp_path / "cogview4"), device="cpu"))
    assert resolved.family.name == "auto"
    prepare_torch(1)
    loaded = resolved.family.load(resolved.pipeline)
    params = resolved.params({"steps": 2, "max_sequence_length": 64}).model_dump()

    def frame(prompt: str, seed: int) -> FrameSpec:
        return FrameSpec(pipeline="cog", prompt=prompt, seed=seed, bucket=2, params=params)

    def drawn(*frames: FrameSpec) -> np.ndarray[Any, Any]:
        return np.asarray(resolved.family.denoise(loaded, Batch(frames))[0])

    alone = drawn(frame("a red star", 1))
    neighbour = frame("a very long prompt of somebody else, much longer than the other", 2)
    assert (drawn(frame("a red star", 1), neighbour) == alone).all()

    # In one call of diffusers itself, with the same seeds, the picture differs.
    import torch

    both = loaded.pipe(
        prompt=["a red star", neighbour.prompt],
        num_inference_steps=2,
        max_sequence_length=64,
        height=params["height"],
        width=params["width"],
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in (1, 2)],
    ).images[0]
    assert (np.asarray(both) != alone).any()
