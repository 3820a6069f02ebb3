"""Thumbnails of images: made when somebody first looks at one, and stored next to the image."""

from __future__ import annotations

import io
import logging

from PIL import Image

from farm.errors import NotFound, Unavailable
from farm.storage import ArtifactName, Artifacts, NotStored

log = logging.getLogger(__name__)

PIXELS = 256
"""Longer side of a thumbnail at most."""
QUALITY = 80


def is_small(width: int, height: int) -> bool:
    """Return True if an image of this size needs no stored thumbnail: it is quick to make."""
    return max(width, height) <= PIXELS


def stored(artifacts: Artifacts, name: ArtifactName) -> bytes | None:
    """Read the stored thumbnail of an image. None: there is none.

    Raises:
        Unavailable: the storage does not answer.
    """
    try:
        return artifacts.get(name.thumbnail.key)
    except NotStored:
        return None


def make(artifacts: Artifacts, name: ArtifactName) -> bytes:
    """Make the thumbnail of an image, without storing it.

    Raises:
        NotFound: the image was removed, or cannot be read.
        Unavailable: the storage does not answer.
    """
    try:
        return small_webp(artifacts.get(name.key))
    except NotStored:
        raise NotFound("The image was removed.") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        log.warning("No thumbnail of job %s frame %d: %s", name.job_id, name.ordinal, error)
        raise NotFound("The image cannot be read.") from error


def make_once(artifacts: Artifacts, name: ArtifactName) -> bytes:
    """Make the thumbnail of an image and store it, unless another caller has done so.

    If it cannot be stored, it is made again next time.

    Raises:
        NotFound: the image was removed, or cannot be read.
        Unavailable: the storage does not answer.
    """
    made = stored(artifacts, name)
    if made is not None:
        return made
    made = make(artifacts, name)
    try:
        artifacts.put(name.thumbnail.key, made)
    except Unavailable as error:
        log.warning("A thumbnail could not be stored: %s", error)
    return made


def small_webp(content: bytes) -> bytes:
    """Return an image with at most PIXELS on its longer side, as WebP without metadata."""
    with Image.open(io.BytesIO(content)) as image:
        image.thumbnail((PIXELS, PIXELS))
        plain = image.convert("RGB")
    buffer = io.BytesIO()
    plain.save(buffer, format="WEBP", quality=QUALITY)
    return buffer.getvalue()
