"""A batch denoised in the middle of another, through a twin. Both have the same pixels as alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from farm.domain.spec import FrameSpec
from farm.pipelines.catalog import load_catalog
from farm.pipelines.family import Batch, LoadedPipeline
from farm.pipelines.resolve import ResolvedPipeline, resolve_pipeline, sample
from tests.support.parity_cases import CATALOG, save_catalog

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`callback_steps`:FutureWarning"),
]

STEPS = 6
KINDS = [line[len("[pipelines.") : -1] for line in CATALOG.splitlines() if line.startswith("[pipe")]
SAMPLERS = ("dpmpp_2m", "euler_a", "heun")
"""Samplers with a memory, with their own noise, and with two calls a step."""


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_catalog(tmp_path_factory.mktemp("kinds"))


def frames(
    resolved: ResolvedPipeline, seeds: Sequence[int], bucket: int, **asked: Any
) -> list[FrameSpec]:
    fields = resolved.params_type.model_fields
    given = {name: value for name, value in asked.items() if name in fields}
    params = resolved.params({**sample(resolved.params_type), **given}).model_dump()
    return [
        FrameSpec(
            pipeline=resolved.name, prompt=f"star {seed}", seed=seed, bucket=bucket, params=params
        )
        for seed in seeds
    ]


def pixels(
    resolved: ResolvedPipeline,
    loaded: LoadedPipeline,
    some: Sequence[FrameSpec],
    on_step: Any = None,
) -> Any:
    params = some[0].params
    picture = Image.effect_noise((params["width"], params["height"]), 64).convert("RGB")
    images = dict.fromkeys(resolved.params_type.image_ids(params), picture)
    hook = on_step or (lambda _done, _steps: None)
    drawn = resolved.family.denoise(loaded, Batch(some, hook, images))
    return [None if one is None else np.asarray(one) for one in drawn]


@pytest.mark.parametrize("kind", KINDS)
def test_both_are_as_if_they_ran_alone(
    catalog: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved = resolve_pipeline(kind, load_catalog(catalog).pipelines[kind])
    loaded = resolved.family.load(resolved.pipeline)
    twin = loaded.clone_sharing_weights()
    same = Image.effect_noise((64, 64), 64)
    monkeypatch.setattr(Image, "effect_noise", lambda size, _sigma: same.resize(size))
    own_alone = kind in ("kandinsky", "pixart", "flux")  # they support only their own sampler
    samplers = (None,) if own_alone else SAMPLERS if kind == "sd" else SAMPLERS[:1]
    for place, sampler in enumerate(samplers):
        more = {} if sampler is None else {"sampler": sampler}
        few = {"steps": STEPS, "prior_steps": STEPS, "width": 64, "height": 64, **more}
        bulk = frames(resolved, [1, 2, 3], 4, **few)
        urgent = frames(resolved, [9], 1, **{**few, "steps": 4, "guidance_scale": 3.0})
        alone, urgent_alone = pixels(resolved, loaded, bulk), pixels(resolved, loaded, urgent)
        nested: list[Any] = []

        def let_in(step: int, steps: int) -> None:
            if step == 1 + place or step == steps - 1:  # noqa: B023 - called within this turn
                nested.append(pixels(resolved, twin, urgent))  # noqa: B023

        interrupted = pixels(resolved, loaded, bulk, let_in)
        assert len(nested) == 2
        for pictures, expected in [(interrupted, alone), *((one, urgent_alone) for one in nested)]:
            for one, other in zip(pictures, expected, strict=True):
                assert (one is None) == (other is None)
                assert one is None or (one == other).all()
        assert all(one is not None for one in alone) or kind == "guarded"


def test_a_vae_that_a_failed_call_left_widened_is_as_before(catalog: Path) -> None:
    """SDXL decodes in float32, and narrows its VAE only after a successful decoding."""
    resolved = resolve_pipeline("sdxl", load_catalog(catalog).pipelines["sdxl"])
    loaded = resolved.family.load(resolved.pipeline)
    twin = loaded.clone_sharing_weights()
    pinned = loaded.pipe.vae.dtype
    twin.pipe.vae.to(torch.float64)
    assert loaded.pipe.vae.dtype == torch.float64 != pinned  # they share it
    twin.reset_after_failure()
    assert loaded.pipe.vae.dtype == pinned
