"""One picture rendered by the farm's pipelines, and the same picture by bare diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from farm.domain.spec import FrameSpec
from farm.pipelines.family import Batch
from farm.pipelines.resolve import resolve_pipeline
from tests.support.checkpoint_sandbox import CheckpointSandbox


def picture(bench: CheckpointSandbox, words: str, **params: Any) -> np.ndarray[Any, Any]:
    """Load an entry and render the farm's picture."""
    resolved = resolve_pipeline("x", bench.entry(words))
    loaded = resolved.family.load(resolved.pipeline)
    given = resolved.params({"steps": 2, "width": 64, "height": 64, **params}).model_dump()
    frame = FrameSpec(pipeline="x", prompt="a red star", seed=31, bucket=1, params=given)
    [drawn] = resolved.family.denoise(loaded, Batch([frame]))
    return np.asarray(drawn)


def bare(source: Any) -> np.ndarray[Any, Any]:
    """Render the same picture by bare diffusers, from a folder or with a loaded pipeline."""
    import torch
    from diffusers import AutoPipelineForText2Image

    pipe = source
    if isinstance(source, Path):
        pipe = AutoPipelineForText2Image.from_pretrained(source, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(
        "a red star",
        num_inference_steps=2,
        width=64,
        height=64,
        generator=torch.Generator("cpu").manual_seed(31),
    )
    return np.asarray(drawn.images[0])
