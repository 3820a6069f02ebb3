"""The file formats in which an image can be stored, with their properties."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Format = Literal["png", "jpeg", "webp"]

PNG, JPEG, WEBP = "image/png", "image/jpeg", "image/webp"

IMAGE_ID = r"^[0-9a-f]{64}$"
"""Pattern of an image's ID for JSON Schema. The ID is the sha256 of the stored image."""


@dataclass(frozen=True)
class Kind:
    """One file format."""

    media_type: str
    extension: str
    """Extension of files and keys, without the dot."""
    max_side: int
    """Maximum width or height in the format's specification, in pixels."""
    lossless: bool


# PNG: 4 bytes without the sign bit (W3C PNG, 11.2.1); JPEG: 2 bytes (ITU T.81, B.2.2); WebP: 14
# bits, minus one (RFC 9649, 3.4). The farm always writes lossless WebP.
FORMATS: dict[Format, Kind] = {
    "png": Kind(PNG, "png", 2**31 - 1, lossless=True),
    "jpeg": Kind(JPEG, "jpg", 65_535, lossless=False),
    "webp": Kind(WEBP, "webp", 16_383, lossless=True),
}

BY_EXTENSION: dict[str, Format] = {kind.extension: name for name, kind in FORMATS.items()}


def is_image_id(word: str) -> bool:
    """Return True if a text has the form of an image's ID."""
    return re.fullmatch(IMAGE_ID[1:-1], word) is not None


def media_type_of(content: bytes) -> str | None:
    """Return the media type of a file, from its first bytes. None if it is not an allowed type."""
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return PNG
    if content.startswith(b"\xff\xd8\xff"):
        return JPEG
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return WEBP
    return None
