"""The control images of the last batches, decoded and kept: a job's frames often share one."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress

from cachetools import LRUCache
from PIL import Image

from farm.services.control_images import load_image
from farm.storage import Artifacts

KEPT_PIXELS = 64 * 2**20
"""of three bytes each"""


class ImageCache:
    """Fetches a tenant's images from the storage, and remembers those used last."""

    def __init__(self, artifacts: Artifacts, kept_pixels: int = KEPT_PIXELS) -> None:
        self._artifacts = artifacts
        self._kept: LRUCache[tuple[uuid.UUID, str], Image.Image] = LRUCache(
            kept_pixels, getsizeof=lambda image: image.width * image.height
        )

    def get(self, tenant_id: uuid.UUID, image_id: str) -> Image.Image:
        """Give an image.

        Raises:
            RenderError: the storage does not hold it.
            Unavailable: the storage does not answer.
        """
        key = tenant_id, image_id
        image = self._kept.get(key)
        if image is None:
            image = load_image(self._artifacts, tenant_id, image_id)
            with suppress(ValueError):  # larger than all that may be kept
                self._kept[key] = image
        return image


class BatchImages(Mapping[str, Image.Image]):
    """The images of a batch by id, each fetched when it is asked for: all at once may not fit."""

    def __init__(self, cache: ImageCache, tenants: Mapping[str, uuid.UUID]) -> None:
        """Look images up in a cache.

        Args:
            cache: where they are.
            tenants: whose each image is, by its id.
        """
        self._cache = cache
        self._tenants = tenants

    def __getitem__(self, image_id: str) -> Image.Image:
        """Give an image; see ImageCache.get."""
        return self._cache.get(self._tenants[image_id], image_id)

    def __iter__(self) -> Iterator[str]:
        """Go through the ids."""
        return iter(self._tenants)

    def __len__(self) -> int:
        """Count the images."""
        return len(self._tenants)
