"""The farm's PNG files, read by Pillow and by a reader that follows the specification."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from farm.imaging.png import SMALL_BYTES, png
from tests.benchmarks.encoding import photo_like

CHANNELS = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}
COLOUR_TYPES = {"L": 0, "LA": 4, "RGB": 2, "RGBA": 6}

HASH = "2c246190701019b9a1b1915945523d27e13ffc22564551c913066d1b6883a64a"


def chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    at = 8
    while at < len(content):
        (length,) = struct.unpack_from(">I", content, at)
        kind, body = content[at + 4 : at + 8], content[at + 8 : at + 8 + length]
        assert content[at + 8 + length : at + 12 + length] == struct.pack(
            ">I", zlib.crc32(kind + body)
        )
        yield kind, body
        at += 12 + length


def paeth(a: int, b: int, c: int) -> int:
    """Return the value nearest to a + b - c, the first of equals."""
    away_a, away_b, away_c = abs(b - c), abs(a - c), abs(a + b - 2 * c)
    if away_a <= away_b and away_a <= away_c:
        return a
    return b if away_b <= away_c else c


PREDICTED: list[Callable[[int, int, int], int]] = [
    lambda _a, _b, _c: 0,
    lambda a, _b, _c: a,
    lambda _a, b, _c: b,
    lambda a, b, _c: (a + b) // 2,
    paeth,
]
"""Predictors by filter type, from the bytes to the left (a), above (b) and above left (c)."""


def unfiltered(kind: int, row: bytearray, above: bytearray, step: int) -> bytearray:
    """Undo a row's filter (section 9 of the specification)."""
    if kind == 0:
        return row
    predicted = PREDICTED[kind]
    left, corner = bytearray(step) + row, bytes(step) + above
    for at, (byte, b, c) in enumerate(zip(row, above, corner, strict=False), step):
        left[at] = (byte + predicted(left[at - step], b, c)) & 255
    return left[step:]


def pixels(content: bytes) -> tuple[str, int, int, bytes]:
    """Decode a PNG by the specification. Return mode, width, height and bytes."""
    found = list(chunks(content))
    assert [kind for kind, _ in found if kind != b"iTXt"] == [b"IHDR", b"IDAT", b"IEND"]
    width, height, depth, colour, *rest = struct.unpack(">IIBBBBB", found[0][1])
    assert (depth, rest) == (8, [0, 0, 0])
    mode = {number: name for name, number in COLOUR_TYPES.items()}[colour]
    step = CHANNELS[mode]
    data = zlib.decompress(next(body for kind, body in found if kind == b"IDAT"))
    stride = 1 + width * step
    assert len(data) == height * stride
    rows, above = [], bytearray(width * step)
    for at in range(0, len(data), stride):
        above = unfiltered(data[at], bytearray(data[at + 1 : at + stride]), above, step)
        rows.append(bytes(above))
    return mode, width, height, b"".join(rows)


def check(image: Image.Image) -> None:
    content = png(image, {})
    assert pixels(content) == (image.mode, *image.size, image.tobytes())
    with Image.open(io.BytesIO(content)) as read:
        assert (read.mode, read.size, read.tobytes()) == (image.mode, image.size, image.tobytes())
    assert png(image.copy(), {}) == content


def drawn(mode: str, width: int, height: int, seed: int, levels: int) -> Image.Image:
    """Generate noise with this number of levels. Few levels make runs and equal neighbours."""
    values = np.random.default_rng(seed).integers(0, levels, (height, width, CHANNELS[mode]))
    return Image.frombytes(
        mode, (width, height), (values * (255 // (levels - 1))).astype(np.uint8).tobytes()
    )


@given(
    mode=st.sampled_from(sorted(CHANNELS)),
    width=st.integers(1, 40),
    height=st.integers(1, 40),
    seed=st.integers(0, 2**32),
    levels=st.sampled_from([2, 3, 17, 256]),
)
@settings(max_examples=150)
def test_any_small_picture_comes_back(
    mode: str, width: int, height: int, seed: int, levels: int
) -> None:
    check(drawn(mode, width, height, seed, levels))


@pytest.mark.parametrize("mode", sorted(CHANNELS))
@pytest.mark.parametrize(
    "size",
    [(1, SMALL_BYTES), (SMALL_BYTES, 1), (131, 127), (2**17 + 3, 2), (129, 257)],
    ids=["a column", "a row", "odd", "rows longer than a block", "several blocks"],
)
def test_any_large_picture_comes_back(mode: str, size: tuple[int, int]) -> None:
    for levels in (2, 5, 256):
        check(drawn(mode, *size, seed=levels, levels=levels))


def test_the_bytes_are_those_of_every_machine() -> None:
    """The bytes are those of zlib-ng 1.1.0. Provenance records its version."""
    image = drawn("RGB", 160, 120, seed=1, levels=17)
    assert hashlib.sha256(png(image, {"farm": "{}"})).hexdigest() == HASH


@pytest.mark.parametrize("value", [0, 127, 255])
def test_a_flat_picture_takes_next_to_nothing(value: int) -> None:
    image = Image.new("RGB", (512, 512), (value, 0, 255 - value))
    check(image)
    assert len(png(image, {})) < 5_000


def test_a_picture_like_a_photograph_is_no_longer_than_by_default() -> None:
    image = photo_like(256)
    check(image)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    assert len(png(image, {})) <= len(buffer.getvalue())


def test_texts_stand_before_the_pixels() -> None:
    texts = {"farm": '{"a": "ü 🌟"}', "parameters": "two\nlines"}
    content = png(Image.new("RGB", (3, 5)), texts)
    assert [kind for kind, _ in chunks(content)] == [b"IHDR", b"iTXt", b"iTXt", b"IDAT", b"IEND"]
    with Image.open(io.BytesIO(content)) as image:
        assert image.info == texts


@pytest.mark.parametrize("mode", ["1", "P", "I;16", "CMYK", "F"])
def test_other_modes_are_refused(mode: str) -> None:
    with pytest.raises(ValueError, match=f"mode {mode} cannot"):
        png(Image.new(mode, (4, 4)), {})
