"""Draw the 64x64 pictures that the demo model learns from, and write their captions.

A picture is one large shape in one colour on a plain ground of another colour. A combination
is a (shape, colour, ground) triple. About 15% of the triples, chosen by a hash of their names,
are held out: the model never sees them in training, and is tested on them.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable
from typing import NamedTuple

from PIL import Image, ImageDraw

SIZE = 64
"""Default side of a picture, in pixels."""

OVERSAMPLE = 4
"""Factor by which shapes are drawn larger, then averaged down, for smooth edges."""

HELD_OUT_PERCENT = 15
"""Share of the combinations kept out of training, in percent. The hash reaches it nearly."""

Rgb = tuple[int, int, int]
Point = tuple[float, float]

COLOURS: dict[str, Rgb] = {
    "red": (216, 38, 48),
    "pink": (250, 146, 196),
    "yellow": (250, 212, 52),
    "green": (44, 158, 76),
    "blue": (38, 98, 226),
    "purple": (140, 42, 146),
    "white": (246, 246, 246),
    "black": (22, 22, 26),
}
"""Colour names and their RGB values, 0 to 255; any two differ by a distance of at least 110."""

SHAPES: tuple[str, ...] = (
    "circle",
    "ring",
    "square",
    "triangle",
    "diamond",
    "star",
    "heart",
    "cross",
)
"""Names of the shapes."""

TEMPLATES: tuple[tuple[str, float], ...] = (
    ("a {colour} {shape} on a {ground} background", 0.70),
    ("{colour} {shape} on a {ground} background", 0.07),
    ("a {colour} {shape} on {ground}", 0.07),
    ("a picture of a {colour} {shape} on a {ground} background", 0.06),
    ("a {ground} background with a {colour} {shape}", 0.06),
    ("a {colour} {shape}", 0.04),
)
"""Caption forms and the share of captions in each; the first is the main one."""


class Combo(NamedTuple):
    """The content of a picture: a shape, its colour, and the colour of the ground."""

    shape: str
    colour: str
    ground: str


def dice(*seed: object) -> random.Random:
    """Return a random number generator seeded by the given words and numbers. Not for secrets."""
    return random.Random(" ".join(str(part) for part in seed))  # noqa: S311


def all_combos() -> list[Combo]:
    """List every combination in which the shape's colour differs from the ground's."""
    return [
        Combo(shape, colour, ground)
        for shape in SHAPES
        for colour in COLOURS
        for ground in COLOURS
        if colour != ground
    ]


def is_held_out(combo: Combo) -> bool:
    """Return True if the combination is kept out of training. The same on every machine."""
    digest = hashlib.sha256(" ".join(combo).encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < HELD_OUT_PERCENT


def held_out_combos() -> list[Combo]:
    """List the combinations that are not in the training data."""
    return [combo for combo in all_combos() if is_held_out(combo)]


def trained_combos() -> list[Combo]:
    """List the combinations in the training data."""
    return [combo for combo in all_combos() if not is_held_out(combo)]


def caption(combo: Combo, template: int = 0) -> str:
    """Return the caption of a combination in one of the TEMPLATES (default: the main form)."""
    return TEMPLATES[template][0].format(**combo._asdict())


def _regular(corners: int, radii: tuple[float, ...] = (1.0,)) -> list[Point]:
    """Return corners at equal angles from the top, with the given radii in turn."""
    points = []
    for index in range(corners):
        angle = 2 * math.pi * index / corners
        radius = radii[index % len(radii)]
        points.append((radius * math.sin(angle), -radius * math.cos(angle)))
    return points


def _circle() -> list[Point]:
    return [(0.94 * x, 0.94 * y) for x, y in _regular(120)]


def _square() -> list[Point]:
    half = 0.84
    return [(-half, -half), (half, -half), (half, half), (-half, half)]


def _triangle() -> list[Point]:
    return [(1.14 * x, 1.14 * y + 0.22) for x, y in _regular(3)]


def _diamond() -> list[Point]:
    return [(0.0, -1.16), (0.76, 0.0), (0.0, 1.16), (-0.76, 0.0)]


def _star() -> list[Point]:
    return [(1.16 * x, 1.16 * y + 0.08) for x, y in _regular(10, (1.0, 0.42))]


def _heart() -> list[Point]:
    points = []
    for index in range(120):
        angle = 2 * math.pi * index / 120
        x = 16 * math.sin(angle) ** 3
        y = sum(
            weight * math.cos(order * angle)
            for order, weight in ((1, 13.0), (2, -5.0), (3, -2.0), (4, -1.0))
        )
        points.append((x / 16, -y / 16 - 0.1))
    return points


def _cross() -> list[Point]:
    arm, half = 1.02, 0.34
    corner = [(half, -half), (half, -arm), (-half, -arm)]
    points: list[Point] = []
    for _ in range(4):
        points.extend(corner)
        corner = [(y, -x) for x, y in corner]
    return points


_OUTLINES: dict[str, Callable[[], list[Point]]] = {
    "circle": _circle,
    "ring": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "star": _star,
    "heart": _heart,
    "cross": _cross,
}

_RING_HOLE = 0.54
"""Radius of a ring's hole, as a fraction of its outer radius."""


def _place(points: list[Point], centre: Point, radius: float, turn: float) -> list[Point]:
    """Turn the points by `turn` radians, scale them to `radius`, and move them to `centre`."""
    cos, sin = radius * math.cos(turn), radius * math.sin(turn)
    return [(centre[0] + cos * x - sin * y, centre[1] + sin * x + cos * y) for x, y in points]


def _mask(shape: str, size: int, centre: Point, radius: float, turn: float) -> Image.Image:
    """Draw the shape as an 8-bit mask of `size` pixels square: 255 inside, smooth at the edges."""
    mask = Image.new("L", (size * OVERSAMPLE, size * OVERSAMPLE), 0)
    pen = ImageDraw.Draw(mask)
    scaled = (centre[0] * OVERSAMPLE, centre[1] * OVERSAMPLE)
    outline = _OUTLINES[shape]()
    pen.polygon(_place(outline, scaled, radius * OVERSAMPLE, turn), fill=255)
    if shape == "ring":
        hole = radius * OVERSAMPLE * _RING_HOLE
        pen.polygon(_place(outline, scaled, hole, turn), fill=0)
    return mask.reduce(OVERSAMPLE)


def _tint(colour: str, rng: random.Random) -> Rgb:
    """Return the colour, with each channel changed randomly by up to 6 of 255."""
    red, green, blue = (min(255, max(0, value + rng.randint(-6, 6))) for value in COLOURS[colour])
    return red, green, blue


def draw(combo: Combo, rng: random.Random, size: int = SIZE) -> Image.Image:
    """Draw the combination as an RGB picture.

    Place, size, turn (up to 8 degrees) and tints come from `rng`, so equal seeds give equal
    pictures. The shape is 50 to 70% as wide as the picture. `size` is the side in pixels
    (default 64).
    """
    unit = size / SIZE
    centre = (unit * (32 + rng.uniform(-5, 5)), unit * (32 + rng.uniform(-5, 5)))
    radius = unit * rng.uniform(17.5, 21.5)
    turn = math.radians(rng.uniform(-8, 8))
    ground = Image.new("RGB", (size, size), _tint(combo.ground, rng))
    ground.paste(_tint(combo.colour, rng), mask=_mask(combo.shape, size, centre, radius, turn))
    return ground
