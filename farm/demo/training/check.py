"""Check the demo model: render combinations, and read shape and colours from the pixels.

Run from the root of the repository:

    python -m farm.demo.training.check                                  # the shipped weights
    python -m farm.demo.training.check --count 200 --scheduler euler    # more pictures

The reader measures the pixels with separate geometry. It shares only the colour values and the
names with the drawing code. The exit status is 1 if the result is below the threshold.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from farm.demo.training import pictures
from farm.demo.training.pictures import Combo

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

MODEL = Path(__file__).parents[1] / "model"
"""Default folder of the checkpoint: the one that ships."""

SAMPLERS: dict[str, str] = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "pndm": "PNDMScheduler",
    "heun": "HeunDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lms": "LMSDiscreteScheduler",
}
"""Names of samplers and their classes in diffusers."""

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]

UNKNOWN = "unknown"
"""Name of a shape or colour that the reader cannot recognise."""

BORDER = 3
"""Width of the border that is measured as the ground, in pixels."""

ANGLES = 72
"""Number of directions in which the outline is measured."""


def colour_name(colour: Array, reach: float = 70.0) -> str:
    """Return the name of an RGB colour (0 to 255), or UNKNOWN if none is within `reach`."""
    distances = {
        name: float(np.linalg.norm(colour - np.array(value)))
        for name, value in pictures.COLOURS.items()
    }
    name = min(distances, key=lambda each: distances[each])
    return name if distances[name] <= reach else UNKNOWN


def ground_colour(pixels: Array) -> Array:
    """Return the median RGB of the border of a picture [height, width, 3]."""
    inner = np.ones(pixels.shape[:2], dtype=bool)
    inner[BORDER:-BORDER, BORDER:-BORDER] = False
    median: Array = np.median(pixels[inner], axis=0)
    return median


def shape_colour(pixels: Array, ground: Array) -> Array | None:
    """Return the median RGB of pixels that differ clearly from the ground. None if too few do."""
    distance = np.linalg.norm(pixels - ground, axis=2)
    clear = distance > 0.7 * np.percentile(distance, 97)
    if np.percentile(distance, 97) < 40:
        return None
    median: Array = np.median(pixels[clear], axis=0)
    return median


def coverage(pixels: Array, ground: Array, colour: Array) -> Array:
    """Return how much of the shape's colour each pixel has: 0 is the ground, 1 the shape."""
    way = colour - ground
    share: Array = np.clip((pixels - ground) @ way / (way @ way), 0.0, 1.0)
    return share


def outside(mask: Flags) -> Flags:
    """Return the pixels outside the mask that connect to the picture's edge."""
    free = np.pad(~mask, 1, constant_values=True)
    reached = np.zeros_like(free)
    reached[0, :] = reached[-1, :] = reached[:, 0] = reached[:, -1] = True
    while True:
        grown = reached.copy()
        grown[1:] |= reached[:-1]
        grown[:-1] |= reached[1:]
        grown[:, 1:] |= reached[:, :-1]
        grown[:, :-1] |= reached[:, 1:]
        grown &= free
        if (grown == reached).all():
            return grown[1:-1, 1:-1]
        reached = grown


def sample(field: Array, rows: Array, columns: Array) -> Array:
    """Return values of a field between its pixels, by bilinear interpolation; 0 outside."""
    padded = np.pad(field, 2)
    rows = np.clip(rows + 2, 0, padded.shape[0] - 2)
    columns = np.clip(columns + 2, 0, padded.shape[1] - 2)
    top, left = rows.astype(int), columns.astype(int)
    down, right = rows - top, columns - left
    upper = padded[top, left] * (1 - right) + padded[top, left + 1] * right
    lower = padded[top + 1, left] * (1 - right) + padded[top + 1, left + 1] * right
    value: Array = upper * (1 - down) + lower * down
    return value


def outline(cover: Array) -> Array:
    """Measure from the centroid to the outline in ANGLES directions, as a fraction of the mean.

    Directions run clockwise from straight up.
    """
    rows, columns = np.indices(cover.shape)
    weight = cover.sum()
    row, column = (rows * cover).sum() / weight, (columns * cover).sum() / weight
    angles = 2 * np.pi * np.arange(ANGLES) / ANGLES
    reach = np.arange(0.0, max(cover.shape), 0.25)
    values = sample(
        cover,
        row - np.outer(np.cos(angles), reach),
        column + np.outer(np.sin(angles), reach),
    )
    inside = values > 0.5
    last = inside.shape[1] - 1 - np.argmax(inside[:, ::-1], axis=1)
    distance: Array = np.where(inside.any(axis=1), reach[last], 0.0)
    return distance / max(float(distance.mean()), 1e-9)


EXPECTED: dict[str, dict[int, float]] = {
    "circle": {},
    "square": {4: -0.14},
    "triangle": {3: 0.28, 6: 0.10},
    "diamond": {2: 0.17, 4: 0.16},
    "star": {5: 0.34},
    "heart": {1: -0.04, 2: -0.17, 3: -0.21, 5: -0.05},
    "cross": {4: 0.34, 8: -0.09},
}
"""Harmonics of the outline of each upright shape: amplitude by order, negative for a dip at the
top. A circle has none. A ring has the outline of a circle."""

ORDERS = np.arange(1, 9)
"""Orders of the harmonics that are compared."""

NEAR = 0.22
"""Maximum distance of measured and expected harmonics at which a shape is named."""

CLEAR = 0.65
"""Maximum distance of the named shape, as a fraction of the next nearest shape's."""


def outline_shape(cover: Array) -> str:
    """Return the shape whose harmonics, turned up to 14 degrees, fit clearly best."""
    measured = np.fft.rfft(outline(cover))[ORDERS] * 2 / ANGLES
    turns = np.radians(np.arange(-14, 15, 2))
    distances: dict[str, float] = {}
    for shape, harmonics in EXPECTED.items():
        upright = np.array([harmonics.get(int(order), 0.0) for order in ORDERS])
        turned = upright * np.exp(-1j * np.outer(turns, ORDERS))
        distances[shape] = float(np.linalg.norm(turned - measured, axis=1).min())
    best, second = sorted(distances, key=lambda each: distances[each])[:2]
    least = distances[best]
    return best if least < min(NEAR, CLEAR * distances[second]) else UNKNOWN


def shape_name(cover: Array) -> str:
    """Return the shape of a coverage map, or UNKNOWN."""
    mask = cover > 0.5
    area = float(mask.mean())
    if not 0.06 < area < 0.45:
        return UNKNOWN
    hole = float((~mask & ~outside(mask)).sum() / mask.sum())
    shape = outline_shape(cover)
    if 0.15 < hole < 0.8:
        return "ring" if shape == "circle" else UNKNOWN
    return shape if hole < 0.03 else UNKNOWN


def read_picture(image: Image.Image) -> Combo:
    """Read shape, colour and ground of a picture. Each is "unknown" if not recognised."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    ground = ground_colour(pixels)
    colour = shape_colour(pixels, ground)
    if colour is None:
        return Combo(UNKNOWN, UNKNOWN, colour_name(ground))
    cover = coverage(pixels, ground, colour)
    rest = pixels - ground - cover[..., None] * (colour - ground)
    clean = float(np.linalg.norm(rest, axis=2).mean()) < 20
    shape = shape_name(cover) if clean else UNKNOWN
    return Combo(shape, colour_name(colour), colour_name(ground))


class Score(NamedTuple):
    """Shares of pictures, 0 to 1, with each part right, and with all three right."""

    shape: float
    colour: float
    ground: float
    all_three: float


def score(wanted: list[Combo], got: list[Combo]) -> Score:
    """Compare the requested with the read combinations."""
    right = np.array(
        [[a == b for a, b in zip(*pair, strict=True)] for pair in zip(wanted, got, strict=True)]
    )
    shape, colour, ground = (float(share) for share in right.mean(axis=0))
    return Score(shape, colour, ground, float(right.all(axis=1).mean()))


def load(model: Path, sampler: str, device: str) -> DiffusionPipeline:
    """Load the pipeline in float32 with the named sampler (a key of SAMPLERS)."""
    # Imported here, so that reading pictures needs neither torch nor diffusers.
    import diffusers

    loader = diffusers.AutoPipelineForText2Image
    pipeline = loader.from_pretrained(model)
    chosen = getattr(diffusers, SAMPLERS[sampler])
    pipeline.scheduler = chosen.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def render(
    pipeline: DiffusionPipeline,
    combos: list[Combo],
    options: argparse.Namespace,
) -> list[Image.Image]:
    """Render one picture per combination. Its seed is its index in the list plus --seed."""
    import torch

    images: list[Image.Image] = []
    for first in range(0, len(combos), 16):
        chunk = combos[first : first + 16]
        seeds = range(options.seed + first, options.seed + first + len(chunk))
        result = pipeline(
            [pictures.caption(combo) for combo in chunk],
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        )
        images.extend(result.images)
    return images


def choose(combos: list[Combo], count: int) -> list[Combo]:
    """Choose `count` combinations in a fixed random order, repeating the list if it is short."""
    order = pictures.dice("check").sample(combos, len(combos))
    return [order[index % len(order)] for index in range(count)]


def sheet(images: list[Image.Image], path: Path, across: int = 12) -> None:
    """Write the pictures to one file, `across` (default 12) in a row."""
    width, height = images[0].size
    rows = -(-len(images) // across)
    canvas = Image.new("RGB", (across * width, rows * height), (128, 128, 128))
    for index, image in enumerate(images):
        canvas.paste(image, (index % across * width, index // across * height))
    canvas.save(path)


def check(
    pipeline: DiffusionPipeline,
    title: str,
    combos: list[Combo],
    options: argparse.Namespace,
) -> Score:
    """Render and read the combinations, and print the score and the errors."""
    images = render(pipeline, combos, options)
    read = [read_picture(image) for image in images]
    result = score(combos, read)
    print(
        f"{title}: {len(combos)} pictures, right shape {result.shape:.1%}, "
        f"colour {result.colour:.1%}, ground {result.ground:.1%}, all three {result.all_three:.1%}"
    )
    if options.verbose:
        for number, (wanted, got) in enumerate(zip(combos, read, strict=True)):
            if wanted != got:
                print(f"  {number}: wanted {' '.join(wanted)}, read {' '.join(got)}")
    if options.sheet:
        sheet(images, options.sheet.with_stem(f"{options.sheet.stem}-{title}"))
    return result


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Check the demo model by its pictures.")
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of the checkpoint")
    parser.add_argument(
        "--count",
        type=int,
        default=142,
        help="number of held-out pictures, and of trained-on pictures",
    )
    parser.add_argument("--steps", type=int, default=25, help="sampling steps")
    parser.add_argument("--guidance", type=float, default=2.5, help="guidance scale")
    parser.add_argument("--scheduler", choices=sorted(SAMPLERS), default="ddim")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first picture")
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.9,
        help="minimum share of held-out pictures that are right, 0 to 1",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--sheet",
        type=Path,
        help="write contact sheets, for example sheet.png: sheet-held-out.png and so on",
    )
    parser.add_argument("--verbose", action="store_true", help="list the wrong pictures")
    return parser.parse_args(arguments)


def main() -> int:
    """Check held-out and trained-on combinations. Return 0 if the former reach the threshold."""
    options = parse()
    pipeline = load(options.model, options.scheduler, options.device)
    held_out = choose(pictures.held_out_combos(), options.count)
    result = check(pipeline, "held-out", held_out, options)
    check(pipeline, "trained-on", choose(pictures.trained_combos(), options.count), options)
    return 0 if result.all_three >= options.threshold else 1


if __name__ == "__main__":
    sys.exit(main())
