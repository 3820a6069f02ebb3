"""Thumbnails of images: made when somebody first looks at one, and stored next to the image."""

from __future__ import annotations

import io
import logging

from PIL import Image

from farm.domain.image_formats import WEBP
from farm.errors import NotFound, Unavailable
from farm.storage import ArtifactName, Artifacts, NotStored, media_type_of

log = logging.getLogger(__name__)

PIXELS = 256
"""Longer side of a thumbnail at most. An image that is not larger is its own thumbnail."""
QUALITY = 80

Thumbnail = tuple[bytes, str]
"""A file, and its media type."""


def is_small(width: int, height: int) -> bool:
    """Return True if an image of this size is its own thumbnail."""
    return max(width, height) <= PIXELS


def stored(artifacts: Artifacts, name: ArtifactName, *, small: bool) -> Thumbnail | None:
    """Read the thumbnail of an image, or the image itself if it is small. None: not made yet.

    Raises:
        NotFound: a small image is not stored any more.
        Unavailable: the storage does not answer.
    """
    try:
        if small:
            return artifacts.get(name.key), media_type_of(name.key)
        return artifacts.get(name.thumbnail.key), WEBP
    except NotStored:
        if small:
            raise NotFound("The image was removed.") from None
        return None


def make(artifacts: Artifacts, name: ArtifactName) -> Thumbnail:
    """Make the thumbnail of an image and store it, unless another caller has done so.

    If it cannot be stored, it is made again next time.

    Raises:
        NotFound: the image was removed, or cannot be read.
        Unavailable: the storage does not answer.
    """
    made = stored(artifacts, name, small=False)
    if made is not None:
        return made
    try:
        content = small_webp(artifacts.get(name.key))
    except NotStored:
        raise NotFound("The image was removed.") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        log.warning("No thumbnail of job %s frame %d: %s", name.job_id, name.ordinal, error)
        raise NotFound("The image cannot be read.") from error
    try:
        artifacts.put(name.thumbnail.key, content)
    except Unavailable as error:
        log.warning("A thumbnail could not be stored: %s", error)
    return content, WEBP


def small_webp(content: bytes) -> bytes:
    """Return an image with at most PIXELS on its longer side, as WebP without metadata."""
    with Image.open(io.BytesIO(content)) as image:
        image.thumbnail((PIXELS, PIXELS))
        plain = image.convert("RGB")
    buffer = io.BytesIO()
    plain.save(buffer, format="WEBP", quality=QUALITY)
    return buffer.getvalue()
