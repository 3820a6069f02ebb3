"""Provenance in a PNG, read back by the farm and by an independent reader."""

from __future__ import annotations

import io
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from farm.domain.spec import FrameSpec
from farm.errors import InvalidRequest
from farm.imaging.encoding import encode, read
from farm.imaging.provenance import Provenance, ProvenanceWriter
from farm.rendering.environment import library_versions
from tests.support.png_text import parsed

PROMPTS = [
    "a red star on a blue background",
    "نجمة حمراء على خلفية زرقاء",
    "ein Stern 🌟👩‍🚀, 星, ⭐️",
    "two\nlines\n\nand a third",
    'quotes " and \\ back, slashes',
    "a (red)1.5 star, <lora:x:1>, 100%",
    "\u202eturned around\u202c",
    "trailing space ",
    "",
]


def provenance(prompt: str, **params: Any) -> Provenance:
    return Provenance(
        frame=FrameSpec(
            pipeline="demo",
            prompt=prompt,
            seed=2**63 - 1,
            bucket=8,
            params={
                "width": 64,
                "height": 48,
                "negative_prompt": "",
                "steps": 25,
                "guidance_scale": 4.5,
                "sampler": "ddim",
                **params,
            },
        ),
        weights="ab" * 32,
        device="cpu AVX2",
        dtype="float32",
        threads=2,
        versions=library_versions(),
    )


def picture() -> Image.Image:
    image = Image.new("RGB", (64, 48), (10, 200, 30))
    image.putpixel((5, 6), (1, 2, 3))
    return image


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_png_gives_back_what_was_written(prompt: str) -> None:
    written = provenance(prompt, negative_prompt=prompt)
    image, said, _ = read(encode(picture(), written))
    assert said == written
    assert image.tobytes() == picture().tobytes()


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=200))
def test_any_prompt_comes_back(prompt: str) -> None:
    assert read(encode(picture(), provenance(prompt)))[1].frame.prompt == prompt


def test_the_same_picture_is_the_same_file() -> None:
    written = provenance("a star")
    assert encode(picture(), written) == encode(picture(), written)


def test_the_text_is_what_the_web_ui_writes() -> None:
    written = provenance("a star,\nred", negative_prompt="blur, noise")
    text = ProvenanceWriter(written).parameters(written.frame)
    version = library_versions()["farm"]
    assert text == (
        "a star,\nred\n"
        "Negative prompt: blur, noise\n"
        "Steps: 25, Sampler: ddim, CFG scale: 4.5, Seed: 9223372036854775807, Size: 64x48, "
        f"Model hash: ababababab, Model: demo, Version: farm {version}"
    )


@pytest.mark.parametrize("prompt", [prompt for prompt in PROMPTS if prompt.strip()])
@pytest.mark.parametrize("negative", ["", "blur, رمادي 🌫"])
def test_an_independent_reader_reads_it(prompt: str, negative: str) -> None:
    content = encode(picture(), provenance(prompt, negative_prompt=negative))
    info = parsed(io.BytesIO(content))
    assert [read.value for read in info.prompts] == [prompt.strip()]
    assert [read.value for read in info.negative_prompts] == ([negative] if negative else [])
    (sampler,) = info.samplers
    assert sampler.name == "ddim"
    assert sampler.parameters["seed"] == "9223372036854775807"
    assert sampler.parameters["steps"] == "25"
    assert sampler.parameters["cfg_scale"] == "4.5"
    assert sampler.model is not None
    assert (sampler.model.name, sampler.model.hash) == ("demo", "ababababab")


def test_pictures_of_others_are_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    with pytest.raises(InvalidRequest, match="has no metadata of the farm"):
        read(buffer.getvalue())
    for content in (b"", b"hello", encode(picture(), provenance("x"))[:200]):
        with pytest.raises(InvalidRequest, match=r"not a PNG|cannot be read"):
            read(content)


def test_a_damaged_text_is_refused() -> None:
    content = encode(picture(), provenance("a star"))
    other = content.replace(b'"bucket":8', b'"bucket":x')
    with pytest.raises(InvalidRequest):
        read(other)


def _png_with(chunk: bytes, body: bytes) -> bytes:
    """Build a picture with an extra chunk right after its header."""
    plain = io.BytesIO()
    Image.new("RGB", (8, 8)).save(plain, "PNG")
    content = plain.getvalue()
    crc = zlib.crc32(chunk + body).to_bytes(4, "big")
    return content[:33] + len(body).to_bytes(4, "big") + chunk + body + crc + content[33:]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
        b"GIF89a" + bytes(20),
        _png_with(b"cHRM", b"\x00\x00"),
        _png_with(b"pHYs", b"\x00"),
        _png_with(b"zTXt", b"farm\x00\x00" + zlib.compress(bytes(80 * 2**20))),
        _png_with(b"iTXt", b"farm\x00\x00\x00\x00\x00" + b'{"format": 2}'),
        _png_with(b"iTXt", b"farm\x00\x00\x00\x00\x00" + b"not json"),
    ],
    ids=["empty", "short", "eps", "gif", "cHRM", "pHYs", "bomb", "format", "text"],
)
def test_what_is_no_picture_of_the_farm_is_refused_in_a_line(content: bytes) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(content)
    assert "\n" not in caught.value.message
    assert "object at" not in caught.value.message
    assert "pydantic" not in caught.value.message


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "EPS"])
def test_other_formats_are_not_even_opened(kind: str) -> None:
    buffer = io.BytesIO()
    picture().save(buffer, kind)
    with pytest.raises(InvalidRequest, match="not a PNG"):
        read(buffer.getvalue())
