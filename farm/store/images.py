"""Control images: which ones a tenant has uploaded. Their bytes are in S3, put there first."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, text

from farm.errors import NotFound

# The update changes nothing: without it a row that is there would not be returned.
INSERT = text("""
INSERT INTO images (tenant_id, sha256, width, height, bytes)
VALUES (:tenant_id, :sha256, :width, :height, :bytes)
ON CONFLICT (tenant_id, sha256) DO UPDATE SET bytes = excluded.bytes
RETURNING width, height, bytes, created_at
""")

FIND = text("""
SELECT width, height, bytes, created_at FROM images
WHERE tenant_id = :tenant_id AND sha256 = :sha256
""")

KNOWN = text("SELECT sha256 FROM images WHERE tenant_id = :tenant_id AND sha256 = ANY(:hashes)")


@dataclass(frozen=True)
class StoredImage:
    """An uploaded image."""

    id: str
    """the sha256 of its PNG's bytes, in hex"""
    width: int
    height: int
    bytes: int
    created_at: datetime


def insert_image(
    connection: Connection,
    tenant_id: uuid.UUID,
    sha256: bytes,
    *,
    width: int,
    height: int,
    size: int,
) -> StoredImage:
    """Note an image of `size` bytes; one that is there already stays as it is."""
    row = connection.execute(
        INSERT,
        {
            "tenant_id": tenant_id,
            "sha256": sha256,
            "width": width,
            "height": height,
            "bytes": size,
        },
    ).one()
    return StoredImage(sha256.hex(), row.width, row.height, row.bytes, row.created_at)


def get_image(connection: Connection, tenant_id: uuid.UUID, image_id: str) -> StoredImage:
    """Read one image.

    Raises:
        NotFound: there is none, or it is another tenant's.
    """
    wanted = {"tenant_id": tenant_id, "sha256": bytes.fromhex(image_id)}
    row = connection.execute(FIND, wanted).first()
    if row is None:
        raise NotFound(f"There is no image {image_id}.")
    return StoredImage(image_id, row.width, row.height, row.bytes, row.created_at)


def known_images(
    connection: Connection, tenant_id: uuid.UUID, image_ids: Iterable[str]
) -> set[str]:
    """Tell which of some images are a tenant's."""
    hashes = [bytes.fromhex(image_id) for image_id in image_ids]
    rows = connection.execute(KNOWN, {"tenant_id": tenant_id, "hashes": hashes})
    return {bytes(sha256).hex() for sha256 in rows.scalars()}
