"""Filters: what may reject a picture, which is then drawn again with another seed.

A filter is a function of a picture and its spec: a built-in one by its name, or MODULE:FUNCTION of
the operator's own. It says whether to keep the picture, and a score that people see.
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
"""Standard deviation of the luminance, of 255, below which a picture is flat"""

NEAR = 6
"""Bits, of 64, in which the perceptual hashes of near-duplicates differ at most"""


class Verdict(NamedTuple):
    """What a filter says of a picture."""

    keep: bool
    score: float
    why: str = ""
    perceptual_hash: int | None = None
    """A perceptual hash of 64 bits: then it is kept only where no kept picture of its job has one
    that differs in `NEAR` bits or fewer"""


Filter = Callable[["Image.Image", FrameSpec], Verdict]


def blank(image: Image.Image, spec: FrameSpec) -> Verdict:  # noqa: ARG001 - every filter has it
    """Reject a picture of one colour, or nearly so."""
    from PIL import ImageStat

    deviation = float(ImageStat.Stat(image.convert("L")).stddev[0])
    return Verdict(deviation >= FLAT, deviation, f"its luminance deviates by less than {FLAT:g}")


def near_duplicate(image: Image.Image, spec: FrameSpec) -> Verdict:  # noqa: ARG001
    """Reject a picture that looks like another one of its job, by imagehash's phash."""
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
            f"filters: there is no {name!r}; there are {', '.join(BUILT_IN)}, or MODULE:FUNCTION."
        )
    try:
        found: Filter = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise CatalogError(f"filters: {name!r} cannot be imported: {error}.") from error
    return found
