"""Control images: the rows of the images that tenants have uploaded. Their bytes are in S3."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, text

from farm.errors import NotFound, Unavailable

# The row prevents storing and deleting an object at the same time: its state is `arriving` before
# the first byte is stored, and `removing` until the object is deleted.
BEGIN = text("""
INSERT INTO control_images (tenant_id, sha256, width, height, bytes, state)
VALUES (:tenant_id, :sha256, :width, :height, :bytes, 'arriving')
ON CONFLICT (tenant_id, sha256) DO UPDATE
SET created_at = CASE control_images.state
  WHEN 'stored' THEN control_images.created_at ELSE clock_timestamp()
END
WHERE control_images.state <> 'removing'
RETURNING state
""")

FINISH = text("""
UPDATE control_images SET state = 'stored'
WHERE tenant_id = :tenant_id AND sha256 = :sha256 AND state <> 'removing'
RETURNING width, height, bytes, created_at
""")

FIND = text("""
SELECT width, height, bytes, created_at FROM control_images
WHERE tenant_id = :tenant_id AND sha256 = :sha256 AND state = 'stored'
""")

LIST = text("""
SELECT sha256, width, height, bytes, created_at FROM control_images
WHERE tenant_id = :tenant_id AND state = 'stored'
  AND (CAST(:after AS bytea) IS NULL OR sha256 > :after)
ORDER BY sha256 LIMIT :limit
""")

KNOWN = text("""
SELECT sha256 FROM control_images
WHERE tenant_id = :tenant_id AND sha256 = ANY(:hashes) AND state = 'stored'
""")

REMOVE = text("""
UPDATE control_images SET state = 'removing'
WHERE tenant_id = :tenant_id AND sha256 = :sha256 AND state = 'stored' RETURNING sha256
""")

REMOVED = text("SELECT tenant_id, sha256 FROM control_images WHERE state = 'removing' LIMIT :limit")

# Objects of unknown tenants are left: they may belong to another farm in the same bucket.
DISOWN = text("""
INSERT INTO control_images (tenant_id, sha256, width, height, bytes, state)
SELECT t.id, d.sha256, 0, 0, 0, 'removing'
FROM unnest(CAST(:tenant_ids AS uuid[]), CAST(:hashes AS bytea[])) AS d (tenant_id, sha256)
JOIN tenants t ON t.id = d.tenant_id
ON CONFLICT (tenant_id, sha256) DO UPDATE SET state = 'removing'
WHERE control_images.state = 'arriving'
  AND control_images.created_at < clock_timestamp() - make_interval(secs => :old)
""")

FORGET = text("""
DELETE FROM control_images
WHERE tenant_id = :tenant_id AND sha256 = :sha256 AND state = 'removing'
""")


BEING_DELETED = "This image is being deleted. Send it again in a few seconds."


@dataclass(frozen=True)
class StoredImage:
    """An uploaded image."""

    id: str
    """SHA-256 of its PNG's bytes, in hex."""
    width: int
    height: int
    bytes: int
    created_at: datetime


def begin_image(
    connection: Connection,
    tenant_id: uuid.UUID,
    sha256: bytes,
    *,
    width: int,
    height: int,
    size: int,
) -> None:
    """Record that an image of `size` bytes is about to be stored.

    Raises:
        Unavailable: the same image is being deleted.
    """
    values = {"tenant_id": tenant_id, "sha256": sha256}
    values |= {"width": width, "height": height, "bytes": size}
    if connection.execute(BEGIN, values).first() is None:
        raise Unavailable(BEING_DELETED)


def finish_image(connection: Connection, tenant_id: uuid.UUID, sha256: bytes) -> StoredImage:
    """Record that an image is stored. The row of an image stored before does not change.

    Raises:
        Unavailable: it was deleted during the upload.
    """
    wanted = {"tenant_id": tenant_id, "sha256": sha256}
    row = connection.execute(FINISH, wanted).first()
    if row is None:
        raise Unavailable(BEING_DELETED)
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


def list_images(
    connection: Connection, tenant_id: uuid.UUID, *, limit: int, after: str | None = None
) -> list[StoredImage]:
    """Read a page of a tenant's images, by id."""
    beginning = bytes.fromhex(after) if after is not None else None
    values = {"tenant_id": tenant_id, "limit": limit, "after": beginning}
    return [
        StoredImage(row.sha256.hex(), row.width, row.height, row.bytes, row.created_at)
        for row in connection.execute(LIST, values)
    ]


def remove_image(connection: Connection, tenant_id: uuid.UUID, image_id: str) -> None:
    """Remove an image. It is hidden at once, and its object is deleted soon.

    Raises:
        NotFound: there is none, or it is another tenant's.
    """
    wanted = {"tenant_id": tenant_id, "sha256": bytes.fromhex(image_id)}
    if connection.execute(REMOVE, wanted).first() is None:
        raise NotFound(f"There is no image {image_id}.")


def removed_images(connection: Connection, limit: int) -> list[tuple[uuid.UUID, str]]:
    """List images whose objects may be deleted, as (tenant, id)."""
    rows = connection.execute(REMOVED, {"limit": limit})
    return [(row.tenant_id, row.sha256.hex()) for row in rows]


def disown(
    connection: Connection, images: Iterable[tuple[uuid.UUID, str]], old_seconds: float
) -> None:
    """Mark stored objects without a row as removed images, by (tenant, id).

    Images whose upload began more than `old_seconds` ago, and did not end, are marked too.
    """
    pairs = list(images)
    values = {
        "tenant_ids": [tenant_id for tenant_id, _ in pairs],
        "hashes": [bytes.fromhex(image_id) for _, image_id in pairs],
        "old": old_seconds,
    }
    connection.execute(DISOWN, values)


def forget_image(connection: Connection, tenant_id: uuid.UUID, image_id: str) -> None:
    """Delete the row of a removed image. Nothing is left of it."""
    wanted = {"tenant_id": tenant_id, "sha256": bytes.fromhex(image_id)}
    connection.execute(FORGET, wanted)


def known_images(
    connection: Connection, tenant_id: uuid.UUID, image_ids: Iterable[str]
) -> set[str]:
    """Return those of the given images that belong to a tenant."""
    hashes = [bytes.fromhex(image_id) for image_id in image_ids]
    rows = connection.execute(KNOWN, {"tenant_id": tenant_id, "hashes": hashes})
    return {bytes(sha256).hex() for sha256 in rows.scalars()}
