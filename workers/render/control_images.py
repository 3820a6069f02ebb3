"""Cache of decoded control images: the frames of a job often share one."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress

from cachetools import LRUCache
from PIL import Image

from farm.services.control_images import load_image
from farm.storage import Artifacts

KEPT_PIXELS = 64 * 2**20
"""Maximum size of the cache, in pixels of three bytes."""


class ImageCache:
    """Reads images of tenants from the storage, and keeps those used last."""

    def __init__(self, artifacts: Artifacts, kept_pixels: int = KEPT_PIXELS) -> None:
        self._artifacts = artifacts
        self._kept: LRUCache[tuple[uuid.UUID, str], Image.Image] = LRUCache(
            kept_pixels, getsizeof=lambda image: image.width * image.height
        )

    def get(self, tenant_id: uuid.UUID, image_id: str) -> Image.Image:
        """Return an image.

        Raises:
            RenderError: the storage does not hold it.
            Unavailable: the storage does not answer.
        """
        key = tenant_id, image_id
        image = self._kept.get(key)
        if image is None:
            image = load_image(self._artifacts, tenant_id, image_id)
            with suppress(ValueError):  # larger than the whole cache
                self._kept[key] = image
        return image


class BatchImages(Mapping[str, Image.Image]):
    """Images of a batch by ID. Each is read on access: all at once may not fit into memory."""

    def __init__(self, cache: ImageCache, tenants: Mapping[str, uuid.UUID]) -> None:
        """Look up images in a cache.

        Args:
            cache: the cache of the images.
            tenants: the tenant that owns an image, by image ID.
        """
        self._cache = cache
        self._tenants = tenants

    def __getitem__(self, image_id: str) -> Image.Image:
        """Return an image; see ImageCache.get."""
        return self._cache.get(self._tenants[image_id], image_id)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the IDs."""
        return iter(self._tenants)

    def __len__(self) -> int:
        """Count the images."""
        return len(self._tenants)
