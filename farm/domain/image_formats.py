"""The kinds of file that a picture can be stored as, and what follows from each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Format = Literal["png", "jpeg", "webp"]


@dataclass(frozen=True)
class Kind:
    """One kind of file."""

    media_type: str
    extension: str
    """of files and of keys, without the dot"""
    max_side: int
    """pixels, as its own specification has it"""
    lossless: bool


# PNG: 4 bytes, less the sign (W3C PNG, 11.2.1); JPEG: 2 bytes (ITU T.81, B.2.2); WebP: 14 bits,
# less one (RFC 9649, 3.4). WebP files are always written lossless here.
FORMATS: dict[Format, Kind] = {
    "png": Kind("image/png", "png", 2**31 - 1, lossless=True),
    "jpeg": Kind("image/jpeg", "jpg", 65_535, lossless=False),
    "webp": Kind("image/webp", "webp", 16_383, lossless=True),
}

BY_EXTENSION: dict[str, Format] = {kind.extension: name for name, kind in FORMATS.items()}
