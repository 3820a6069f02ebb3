"""How long a picture's file takes and how long it is, beside Pillow's default and the way before.

    python -m tests.benchmarks.encoding

The pictures are drawn here, from a seed: soft shapes of every size, each octave half as strong as
the one before, mostly without colour, and a grain that is stronger where it is light. Pillow's
default brings them to about the share of their bytes that it brings photographs to, in about the
same time; the record of the decision (ADR 20) compares the two.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from farm.png import png

SIDES = (512, 1024)
RUNS = 9
TEXTS = {"farm": "{}", "parameters": "a star\nSteps: 25"}

Write = Callable[[Image.Image], bytes]


@dataclass(frozen=True)
class Row:
    """One way of encoding, on one picture."""

    side: int
    """pixels"""
    way: str
    ms: float
    """median"""
    spread_ms: float
    """from the first quartile to the third"""
    bytes: int
    raw_ratio: float
    """bytes / the pixels' own"""
    ms_ratio: float
    """ms / Pillow's default, which was timed in turn with it"""
    bytes_ratio: float
    """bytes / Pillow's default"""


def photo_like(side: int, seed: int = 1) -> Image.Image:
    """Draw a square RGB picture that packs as photographs do, the same for a seed."""
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
    """Take so much of the colour away."""
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
    "farm.png (now)": lambda image: png(image, TEXTS),
}
BASE = "Pillow's default"


def measure(runs: int = RUNS) -> list[Row]:
    """Time every way on every picture, in turn, in one thread."""
    return [row for side in SIDES for row in _measured(photo_like(side), runs)]


def _measured(image: Image.Image, runs: int) -> list[Row]:
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    sizes = {way: len(write(image)) for way, write in WAYS.items()}
    for _ in range(runs):
        for way, write in WAYS.items():
            started = time.perf_counter()
            write(image)
            times[way].append((time.perf_counter() - started) * 1000)
    medians = {way: statistics.median(taken) for way, taken in times.items()}
    rows = []
    for way, taken in times.items():
        first, _, third = statistics.quantiles(taken, n=4)
        rows.append(
            Row(
                side=image.width,
                way=way,
                ms=medians[way],
                spread_ms=third - first,
                bytes=sizes[way],
                raw_ratio=sizes[way] / (3 * image.width * image.height),
                ms_ratio=medians[way] / medians[BASE],
                bytes_ratio=sizes[way] / sizes[BASE],
            )
        )
    return rows


def main() -> None:
    """Print the rows as a table."""
    print(
        f"{'side':>5} {'way':36} {'ms':>8} {'spread':>7} {'of raw':>7} {'ms /':>6} {'bytes /':>7}"
    )
    for row in measure():
        print(
            f"{row.side:5} {row.way:36} {row.ms:8.1f} {row.spread_ms:7.1f} {row.raw_ratio:7.3f} "
            f"{row.ms_ratio:6.3f} {row.bytes_ratio:7.3f}"
        )


if __name__ == "__main__":
    main()
