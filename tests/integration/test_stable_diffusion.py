"""The family with the demo's real weights: fields and batches that may change a picture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from farm.config import DEMO_CATALOG
from farm.domain.spec import FrameSpec
from farm.pipelines.catalog import load_catalog
from farm.pipelines.family import Batch, LoadedPipeline, StopBatch
from farm.pipelines.resolve import ResolvedPipeline, resolve_pipeline
from farm.pipelines.samplers import SAMPLERS

# diffusers' own samplers hand torch tensors to numpy.array.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

OFFER = resolve_pipeline("demo", load_catalog(DEMO_CATALOG).pipelines["demo"])


@pytest.fixture(scope="module")
def loaded() -> Iterator[LoadedPipeline]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield OFFER.family.load(OFFER.pipeline)
    torch.set_num_threads(threads)


def frame(seed: int = 1, bucket: int = 4, prompt: str = "a red star", **params: Any) -> FrameSpec:
    given = OFFER.params({"steps": 3, **params}).model_dump()
    return FrameSpec(pipeline="demo", prompt=prompt, seed=seed, bucket=bucket, params=given)


def render(
    loaded: LoadedPipeline, *frames: FrameSpec, resolved: ResolvedPipeline = OFFER
) -> list[Any]:
    pictures = resolved.family.denoise(loaded, Batch(frames))
    return [np.asarray(picture) for picture in pictures]


def test_neighbours_and_slot_change_nothing(loaded: LoadedPipeline) -> None:
    mine = frame(seed=7, prompt="a blue ring on a white background")
    alone = render(loaded, mine)[0]
    others = [frame(seed=seed, negative_prompt="blue") for seed in (20, 21, 22)]
    for slot in range(4):
        batch = [*others[:slot], mine, *others[slot:]]
        assert (render(loaded, *batch)[slot] == alone).all()


def test_a_short_batch_is_padded_up_to_its_bucket(loaded: LoadedPipeline) -> None:
    """The UNet gets the bucket's number of frames, with and without the prompt."""
    given: set[int] = set()

    def look(_unet: Any, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        given.add(args[0].shape[0])

    hook = loaded.pipe.unet.register_forward_pre_hook(look, with_kwargs=True)
    render(loaded, frame(bucket=4))
    render(loaded, frame(bucket=4), frame(bucket=4, seed=2))
    hook.remove()
    assert given == {2 * 4}


def test_the_sampler_of_an_earlier_batch_changes_nothing(loaded: LoadedPipeline) -> None:
    fresh = OFFER.family.load(OFFER.pipeline)
    names = ["euler", "dpmpp_2m", None, "ddim"]
    expected = [render(fresh, frame(sampler=name))[0] for name in names]
    for before in ("dpmpp_2m_karras", "dpmpp_2m_sde", "euler_karras", "euler_a"):
        for name, picture in zip(names, expected, strict=True):
            render(loaded, frame(sampler=before))
            assert (render(loaded, frame(sampler=name))[0] == picture).all(), (before, name)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_every_sampler_draws_and_repeats_itself(loaded: LoadedPipeline, name: str) -> None:
    one, two = (render(loaded, frame(sampler=name, steps=6))[0] for _ in range(2))
    assert (one == two).all()
    assert one.std() > 1.0


def test_the_hook_counts_steps_and_can_end_a_batch(loaded: LoadedPipeline) -> None:
    seen: list[tuple[int, int]] = []

    def on_step(step: int, steps: int) -> None:
        seen.append((step, steps))
        if step == 2:
            raise StopBatch

    with pytest.raises(StopBatch):
        OFFER.family.denoise(loaded, Batch([frame(steps=5)], on_step))
    assert seen == [(1, 5), (2, 5)]


def test_more_frames_than_the_bucket_holds_are_refused(loaded: LoadedPipeline) -> None:
    with pytest.raises(ValueError, match="bucket of 1"):
        render(loaded, frame(bucket=1), frame(bucket=1))
