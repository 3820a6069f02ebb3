"""Pictures as PNG, JPEG and WebP: pixels, texts, and their reading by other programs."""

from __future__ import annotations

import io
import struct
import xml.etree.ElementTree as ET
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from farm.domain.image_formats import FORMATS, Format
from farm.domain.spec import FrameSpec
from farm.errors import InvalidRequest, RenderError
from farm.imaging.encoding import Encoder, encode, pixels_as_stored, read
from farm.imaging.exif_xmp import text_bytes
from farm.imaging.provenance import Provenance
from farm.rendering.environment import library_versions
from tests.benchmarks.encoding import photo_like
from tests.support.png_text import parsed

ALL: tuple[Format, ...] = ("png", "jpeg", "webp")
PROMPTS = [
    "a red star",
    "نجمة حمراء",
    "ein Stern 🌟👩‍🚀, 星",
    "two\nlines\r\n\tand <farm:provenance> & &amp; ]]>",
    'quotes " \\ \x01\x1f\x7f\x85',
    "\ufffe\uffff\ufeff",
    "",
]


def provenance(form: Format, prompt: str = "a star", **params: Any) -> Provenance:
    given = {"width": 64, "height": 48, "negative_prompt": "", "steps": 25, "sampler": "ddim"}
    frame = FrameSpec(
        pipeline="demo", prompt=prompt, seed=31, bucket=8, params={**given, **params}, format=form
    )
    return Provenance(
        frame=frame,
        weights="ab" * 32,
        device="cpu AVX2",
        dtype="float32",
        threads=2,
        versions=library_versions(),
        options={"compile": "default"},
    )


PICTURE = photo_like(64).crop((0, 0, 64, 48))


@pytest.mark.parametrize("form", ALL)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_every_format_gives_back_what_was_written(form: Format, prompt: str) -> None:
    written = provenance(form, prompt, negative_prompt=prompt)
    content = encode(PICTURE, written)
    image, said, found = read(content)
    assert (said, found, image.mode, image.size) == (written, form, "RGB", PICTURE.size)
    assert image.tobytes() == pixels_as_stored(PICTURE, form).tobytes()
    assert (image.tobytes() == PICTURE.tobytes()) is FORMATS[form].lossless
    assert encode(PICTURE.copy(), written) == content


@pytest.mark.parametrize("form", ALL)
@given(prompt=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00")))
@settings(max_examples=50)
def test_any_prompt_comes_back(form: Format, prompt: str) -> None:
    assert read(encode(PICTURE, provenance(form, prompt)))[1].frame.prompt == prompt


@pytest.mark.parametrize("form", ALL)
@pytest.mark.parametrize("prompt", PROMPTS[:3])
def test_an_independent_reader_reads_the_web_uis_text(form: Format, prompt: str) -> None:
    content = encode(PICTURE, provenance(form, prompt, negative_prompt="blur, رمادي 🌫"))
    info = parsed(io.BytesIO(content))
    assert [said.value for said in info.prompts] == [prompt]
    assert [said.value for said in info.negative_prompts] == ["blur, رمادي 🌫"]
    (sampler,) = info.samplers
    assert (sampler.name, sampler.parameters["seed"]) == ("ddim", "31")


@pytest.mark.parametrize("form", ["jpeg", "webp"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_an_xml_parser_finds_the_farms_text(form: Format, prompt: str) -> None:
    written = provenance(form, prompt)
    with Image.open(io.BytesIO(encode(PICTURE, written))) as image:
        packet = image.info["xmp"].removesuffix(b"\0")
    root = ET.fromstring(packet)
    found = root.findtext(".//{urn:farm:provenance}provenance")
    assert found is not None
    assert Provenance.model_validate_json(found) == written


def test_exif_is_of_the_form_that_its_specification_has() -> None:
    with Image.open(io.BytesIO(encode(PICTURE, provenance("jpeg")))) as image:
        exif = image.info["exif"]
        read_by_pillow = image.getexif().get_ifd(0x8769)
    assert exif.startswith(b"Exif\0\0MM\0\x2a\0\0\0\x08")
    tag, kind, length, at = struct.unpack_from(">HHII", exif, 6 + 28)
    assert (tag, kind) == (0x9286, 7)  # UserComment, of type UNDEFINED
    assert exif[6 + at :] == read_by_pillow[0x9286]
    assert len(exif) == 6 + at + length
    assert exif[6 + at :].startswith(b"UNICODE\0")


def test_a_jpeg_keeps_the_resolution_of_colour() -> None:
    content = encode(PICTURE, provenance("jpeg"))
    start = content.index(b"\xff\xc0")  # the frame header: ITU T.81, B.2.2
    components = content[start + 10 : start + 19]
    assert [components[at + 1] for at in (0, 3, 6)] == [0x11] * 3
    with JpegImageFile(io.BytesIO(content)) as image:
        assert max(image.quantization[0]) <= 13  # quality 95: a twentieth of libjpeg's base table


def test_the_text_is_that_of_the_model_itself() -> None:
    written = provenance("png", 'a "star"')
    with Image.open(io.BytesIO(Encoder(written).encode(PICTURE, written.frame))) as image:
        assert image.info["farm"] == written.model_dump_json()


def test_a_file_without_a_format_in_its_text_is_read() -> None:
    old = provenance("png").model_dump()
    del old["frame"]["format"]
    assert Provenance.model_validate(old) == provenance("png")


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_files_of_others_are_refused(form: Format) -> None:
    buffer = io.BytesIO()
    PICTURE.save(buffer, form.upper())
    with pytest.raises(InvalidRequest, match="has no metadata of the farm"):
        read(buffer.getvalue())
    content = encode(PICTURE, provenance(form))
    with pytest.raises(InvalidRequest, match="The picture cannot be read"):
        read(content[: len(content) // 2])
    with pytest.raises(InvalidRequest, match="metadata of the farm is damaged"):
        read(content.replace(b'"bucket":8', b'"bucket":x'))


def test_what_a_format_cannot_hold_is_an_error_in_a_line() -> None:
    for form, image in (("jpeg", PICTURE.convert("RGBA")), ("png", PICTURE.convert("CMYK"))):
        with pytest.raises(RenderError, match=f"cannot be stored as {form}"):
            encode(image, provenance(form))  # type: ignore[arg-type]
    with pytest.raises(RenderError, match="cannot be stored as jpeg"):
        encode(PICTURE, provenance("jpeg", "🌟" * 20_000))


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=3))
def test_texts_within_the_limit_fit_a_jpeg(texts: list[str]) -> None:
    measured = text_bytes(*texts)
    bare = encode(PICTURE, provenance("jpeg", ""))
    full = encode(PICTURE, provenance("jpeg", "".join(texts)))
    # Both blocks grow, but not by more than was measured.
    assert len(full) - len(bare) <= 2 * measured


@pytest.mark.parametrize("character", ["x", "🌟", "星", '"', "\x01", "&", "\uffff"])
def test_the_longest_texts_that_are_allowed_fit_a_jpeg(character: str) -> None:
    half = character * (30_000 // text_bytes(character))
    written = provenance("jpeg", half, negative_prompt=half)
    assert read(encode(PICTURE, written))[1] == written
