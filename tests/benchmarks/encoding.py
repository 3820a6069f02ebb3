"""Row f: time and size of encoding a picture, and speed of storing it.

Compared are Pillow's default and the former way. The pictures are generated here from a seed: soft
shapes of every size, each octave half as strong as the one before, mostly without colour, and a
grain that is stronger in light places. Pillow's default compresses them about as much as
photographs, in about the same time. ADR 20 compares the two.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import boto3
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from farm.imaging.png import png
from tests.benchmarks.figures import Ratio, Row, Way, in_turn

if TYPE_CHECKING:
    from tests.benchmarks.stand import BenchServers

SIDES = (512, 1024)
RUNS = 9
PUTS = 40
MAX_MS = 0.25
MAX_BYTES = 1.0
TEXTS = {"farm": "{}", "parameters": "a star\nSteps: 25"}

Write = Callable[[Image.Image], bytes]


def photo_like(side: int, seed: int = 1) -> Image.Image:
    """Generate a square RGB picture from a seed. It compresses like a photograph."""
    random = np.random.default_rng(seed)
    shapes = np.full((side, side, 3), 127.5)
    octaves = side.bit_length() - 2
    for octave in range(1, octaves + 1):
        points = max(2, side >> octave)
        noise = Image.fromarray(random.integers(0, 256, (points, points, 3), np.uint8))
        layer = np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC)) - 127.5
        shapes += _greyish(layer, 0.9) * 2.0 ** (octave - octaves)
    shapes = shapes.clip(0, 255)
    grain = _greyish(random.normal(0, 12, shapes.shape), 0.9)
    light = shapes.mean(axis=2, keepdims=True) / 255
    return Image.fromarray((shapes + grain * light).clip(0, 255).astype(np.uint8))


def _greyish(colours: NDArray[np.float64], share: float) -> NDArray[np.float64]:
    """Remove this share of the colour."""
    grey = colours.mean(axis=2, keepdims=True)
    mixed: NDArray[np.float64] = share * grey + (1 - share) * colours
    return mixed


def _pillow(**options: int) -> Write:
    def write(image: Image.Image) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, "PNG", **options)
        return buffer.getvalue()

    return write


WAYS: dict[str, Write] = {
    "Pillow's default": _pillow(),
    "Pillow, level 1, runs only (before)": _pillow(compress_level=1, compress_type=3),
    "farm.imaging.png (now)": lambda image: png(image, TEXTS),
}
OURS = "farm.imaging.png (now)"
BASE = "Pillow's default"


def rows(stand: BenchServers, short: bool) -> list[Row]:
    """Measure encoding, and storing an encoded picture."""
    return [encode(3 if short else RUNS), store(stand, 4 if short else PUTS)]


def encode(runs: int = RUNS) -> Row:
    """Time every way on every picture, in turn, in one thread."""
    row = Row(
        "f",
        "Encoding a picture",
        "Pictures generated from a seed, which compress like photographs; one thread.",
    )
    for side in SIDES:
        image = photo_like(side)
        sizes = {way: len(write(image)) for way, write in WAYS.items()}
        ways = {f"{way}, {side}²": partial(_ms, write, image) for way, write in WAYS.items()}
        row.series += in_turn(ways, runs, "ms")
        for way in list(WAYS)[1:]:
            row.add_ratio(
                f"{way}, {side}²", f"{BASE}, {side}²", most=MAX_MS if way == OURS else None
            )
            most = MAX_BYTES if way == OURS else None
            what = f"bytes: {way}, {side}² ÷ {BASE}"
            row.ratios.append(Ratio(what, [sizes[way] / sizes[BASE]], most=most))
    return row


def _ms(write: Write, image: Image.Image) -> float:
    started = time.perf_counter()
    write(image)
    return (time.perf_counter() - started) * 1000


def store(stand: BenchServers, puts: int) -> Row:
    """Time storing one encoded picture after another, by the farm and by plain boto3."""
    row = Row(
        "f2",
        "Storing a picture",
        f"{puts} puts of one encoded picture of 1024x1024, one after the other, each under its "
        "own key, into the same storage.",
    )
    content, settings = png(photo_like(1024), TEXTS), stand.servers
    plain = boto3.client("s3", endpoint_url=settings.s3_endpoint_url)

    def by_boto3(key: str) -> None:
        plain.put_object(Bucket=settings.s3_bucket, Key=key, Body=content)

    with stand.site() as site:

        def rate(put: Callable[[str], None]) -> float:
            started = time.monotonic()
            for _ in range(puts):
                put(f"bench/{next(stand.numbers)}.png")
            return puts / (time.monotonic() - started)

        ways: dict[str, Way] = {
            "farm": lambda: rate(lambda key: site.farm.artifacts.put(key, content)),
            "boto3": lambda: rate(by_boto3),
        }
        for way in ways.values():
            way()  # opens connections
        row.series = in_turn(ways, 3, "puts/s")
    row.add_ratio("farm", "boto3")
    return row
