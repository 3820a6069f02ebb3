"""Filters: functions that may reject an image, which is then rendered again with another seed.

A filter is a function of an image and its spec: a built-in one, for example `blank`, or the
operator's own as MODULE:FUNCTION, for example `my_filters:sharp`. It returns whether to keep the
image, and a score that is shown to users.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

from farm.domain.spec import FrameSpec
from farm.errors import CatalogError

if TYPE_CHECKING:
    from PIL import Image

FLAT = 3.0
"""Minimum standard deviation of the luminance (0 to 255). An image below it is flat."""

NEAR = 6
"""Maximum number of differing bits, of 64, in the perceptual hashes of near-duplicates."""


class Verdict(NamedTuple):
    """Result of a filter for an image."""

    keep: bool
    score: float
    why: str = ""
    perceptual_hash: int | None = None
    """A perceptual hash of 64 bits. The image is then kept only if no kept image of its job has a
    hash that differs in `NEAR` bits or fewer."""


Filter = Callable[["Image.Image", FrameSpec], Verdict]


def blank(image: Image.Image, spec: FrameSpec) -> Verdict:  # noqa: ARG001 - every filter has it
    """Reject an image of one colour, or nearly one colour."""
    from PIL import ImageStat

    deviation = float(ImageStat.Stat(image.convert("L")).stddev[0])
    return Verdict(
        deviation >= FLAT, deviation, f"the standard deviation of its luminance is below {FLAT:g}"
    )


def near_duplicate(image: Image.Image, spec: FrameSpec) -> Verdict:  # noqa: ARG001
    """Reject an image that looks like another one of its job, by imagehash's phash."""
    import imagehash

    bits = imagehash.phash(image).hash.flatten()
    return Verdict(True, 0.0, perceptual_hash=int("".join("1" if bit else "0" for bit in bits), 2))


BUILT_IN: Mapping[str, Filter] = {"blank": blank, "near_duplicate": near_duplicate}


def load_filters(names: Sequence[str]) -> dict[str, Filter]:
    """Find filters by their names.

    Raises:
        CatalogError: there is no such filter.
    """
    return {name: BUILT_IN.get(name) or _found(name) for name in names}


def _found(name: str) -> Filter:
    module, _, function = name.partition(":")
    if not function:
        raise CatalogError(
            f"filters: {name!r} is unknown. Use {', '.join(BUILT_IN)}, or your own as "
            "MODULE:FUNCTION, for example my_filters:sharp."
        )
    try:
        found: Filter = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise CatalogError(f"filters: {name!r} cannot be imported: {error}.") from error
    return found
