"""Prompt embeddings: each text is encoded once, with the same bits as a second encoding."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from PIL import Image

from farm.errors import RenderError
from farm.pipelines.prompts.embeddings import PromptEncoder, Reading
from tests.support.checkpoints import MAKERS
from workers.render.control_images import BatchImages, ImageCache

PROMPTS = ["a red star", "نجمة حمراء", "a red star", "🌟 on blue"]
NEGATIVES = ["", "blurred", "", ""]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pipe(kind: str) -> Any:
    torch.manual_seed(0)
    return MAKERS[kind]()


def rows_seen(pipeline: Any) -> list[int]:
    """Record the number of texts in each later call of the last text encoder."""
    seen: list[int] = []
    encoder = getattr(pipeline, "text_encoder_2", None) or pipeline.text_encoder
    encoder.register_forward_pre_hook(
        lambda _encoder, args, kwargs: seen.append((args or [kwargs["input_ids"]])[0].shape[0]),
        with_kwargs=True,
    )
    return seen


@pytest.mark.parametrize("kind", ["stable_diffusion", "sdxl"])
@pytest.mark.parametrize("syntax", ["plain", "compel"])
def test_remembered_or_not_gives_equal_bits(kind: str, syntax: str) -> None:
    pipeline = pipe(kind)
    reading = Reading(syntax, None, bucket=4)
    remembering, forgetful = PromptEncoder(pipeline), PromptEncoder(pipeline, remembered_bytes=0)
    remembering.arguments(["something else", *PROMPTS[1:]], ["x"] * 4, reading)
    for place, negative in enumerate(NEGATIVES):
        # Each time with other neighbours, and in another slot.
        prompts = [PROMPTS[place], "b", "c", "d"]
        [found, *_] = remembering.arguments(prompts, [negative, "y", "y", "y"], reading)
        [fresh] = forgetful.arguments([PROMPTS[place]], [negative], reading)
        assert found.keys() == fresh.keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, fresh[name]), name
            assert tensor.abs().sum() > 0


@pytest.mark.parametrize("kind", ["stable_diffusion", "sdxl"])
def test_a_text_is_encoded_once(kind: str) -> None:
    pipeline = pipe(kind)
    encoder = PromptEncoder(pipeline)
    seen = rows_seen(pipeline)
    for _ in range(3):
        encoder.arguments(PROMPTS, NEGATIVES, Reading("plain", None, bucket=4))
    assert seen == [4, 4]  # three prompts padded to the bucket, and two negative ones
    encoder.arguments(PROMPTS, NEGATIVES, Reading("plain", None, bucket=2))
    assert seen[2:] == [2, 2, 2]  # another shape: three prompts by two, and two negative ones


def test_what_is_remembered_is_bounded() -> None:
    pipeline = pipe("stable_diffusion")
    [row] = PromptEncoder(pipeline).arguments(["a"], None, Reading("plain", None, bucket=1))
    room = 2 * row["prompt_embeds"].nbytes
    encoder = PromptEncoder(pipeline, remembered_bytes=room)
    seen = rows_seen(pipeline)
    for text in ("a", "b", "a", "c", "a", "b"):  # c replaces b, the least recently used
        encoder.arguments([text], None, Reading("plain", None, bucket=1))
    assert len(seen) == 4


def test_images_are_fetched_once_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []

    def load(_artifacts: object, _tenant: uuid.UUID, image_id: str) -> Image.Image:
        if image_id == "gone":
            raise RenderError("The storage holds no image gone.")
        fetched.append(image_id)
        return Image.new("RGB", (20, 20) if image_id == "large" else (10, 10))

    monkeypatch.setattr("workers.render.control_images.load_image", load)
    nothing: Any = None
    ann, bob = uuid.uuid4(), uuid.uuid4()
    images = BatchImages(
        ImageCache(nothing, kept_pixels=200), dict.fromkeys(["a", "b", "c", "large", "gone"], ann)
    )
    for name in ("a", "b", "a", "c", "a", "b", "large", "large"):
        assert images[name].size == ((20, 20) if name == "large" else (10, 10))
    assert fetched == ["a", "b", "c", "b", "large", "large"]
    with pytest.raises(RenderError):
        images["gone"]
    assert BatchImages(images._cache, {"a": bob})["a"].size == (10, 10)
    assert fetched[-1] == "a"  # the same ID of another tenant is another image
