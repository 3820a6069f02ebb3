"""Control images: uploaded by a tenant, named by their content, read by workers.

An image's ID is the sha256 of the stored PNG, so an ID means the same picture forever.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Collection

from botocore.exceptions import ClientError
from PIL import Image

from farm.context import Farm
from farm.domain.image_formats import is_image_id
from farm.errors import RenderError, Unavailable
from farm.imaging.uploads import decoded, normalised
from farm.storage import Artifacts
from farm.store import control_images as stored
from farm.store.control_images import StoredImage
from farm.store.engine import Transaction, transaction

NO_SUCH_KEY = "NoSuchKey"


KEY = re.compile(r"images/([0-9a-f-]{36})/([0-9a-f]{64})\.png")


def images_prefix(tenant_id: uuid.UUID) -> str:
    """Prefix of the storage keys of a tenant's images."""
    return f"images/{tenant_id}/"


def image_key(tenant_id: uuid.UUID, image_id: str) -> str:
    """Storage key of an image: its tenant, and the hash of its bytes."""
    return f"{images_prefix(tenant_id)}{image_id}.png"


def parse_image_key(key: str) -> tuple[uuid.UUID, str] | None:
    """Parse an image's key into (tenant, ID). Return None for any other key."""
    found = KEY.fullmatch(key)
    try:
        return (uuid.UUID(found[1]), found[2]) if found else None
    except ValueError:
        return None


def upload(farm: Farm, tenant_id: uuid.UUID, content: bytes, content_type: str) -> StoredImage:
    """Check an image, convert it to the stored form, and store it.

    A second upload of the same content changes nothing, and returns the same image.

    Raises:
        UnsupportedMediaType: `content_type` is not a supported type.
        InvalidRequest: the file has another type, is damaged, or is outside the limits.
        Unavailable: Postgres or the storage does not answer, or the image is being deleted.
    """
    image = normalised(content, content_type, max_pixels=farm.settings.max_image_pixels)
    sha256 = image.sha256
    with transaction(farm.store) as connection:
        stored.begin_image(
            connection,
            tenant_id,
            sha256,
            width=image.width,
            height=image.height,
            size=len(image.content),
        )
    farm.artifacts.put(image_key(tenant_id, sha256.hex()), image.content)
    with transaction(farm.store) as connection:
        return stored.finish_image(connection, tenant_id, sha256)


def get_image(farm: Farm, tenant_id: uuid.UUID, image_id: str) -> StoredImage:
    """Return an image of a tenant.

    Raises:
        NotFound: the image does not exist, or belongs to another tenant.
    """
    with transaction(farm.store) as connection:
        return stored.get_image(connection, tenant_id, image_id)


def missing_images(connection: Transaction, tenant_id: uuid.UUID, ids: Collection[str]) -> set[str]:
    """Return the IDs that name no image of a tenant, and all texts that are no IDs."""
    known = stored.known_images(connection, tenant_id, filter(is_image_id, ids))
    return set(ids) - known


def load_image(artifacts: Artifacts, tenant_id: uuid.UUID, image_id: str) -> Image.Image:
    """Read an image from the storage, check its hash, and decode it as RGB.

    Raises:
        RenderError: the storage does not hold it, or holds other content under its key.
        Unavailable: the storage does not answer.
    """
    try:
        content = artifacts.get(image_key(tenant_id, image_id))
    except Unavailable as error:
        if _is_missing(error):
            raise RenderError(f"The storage holds no image {image_id}.") from error
        raise
    return decoded(content, image_id)


def _is_missing(error: Unavailable) -> bool:
    cause = error.__cause__
    return isinstance(cause, ClientError) and cause.response["Error"]["Code"] == NO_SUCH_KEY
