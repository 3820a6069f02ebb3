"""Colours of latents: a picture of latents without a model that decodes them.

A map from a latent's channels, and their products, to colours is learned from pictures that are
rendered anyway, by least squares. So it fits every VAE.
"""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
from PIL import Image

LEARNED_PICTURES = 64
"""Pictures from which colours are learned. Then they are good enough, and nothing is copied."""
RIDGE = 1e-3
"""Weight that keeps the map small while few colours have been seen."""


MULTIPLIED_CHANNELS = 16
"""Maximum number of channels whose products are used too."""


class LatentColours:
    """A map from the channels of latents to colours, by least squares."""

    def __init__(self) -> None:
        self._pictures = 0
        self._squares: Any = None
        self._products: Any = None
        self._lock = threading.Lock()  # two batches may overlap

    @property
    def is_learned(self) -> bool:
        """True once it has seen enough pictures."""
        return self._pictures >= LEARNED_PICTURES

    def learn(self, latents: Any, picture: Image.Image) -> None:
        """Learn from a finished picture.

        Args:
            latents: its last latents, (height, width, channels), of any size.
            picture: the decoded picture.
        """
        height, width, _ = latents.shape
        small = picture.convert("RGB").resize((width, height), Image.Resampling.BOX)
        colours = np.asarray(small, dtype=np.float64).reshape(-1, 3)
        inputs = _features(latents)
        with self._lock:
            if self._squares is None:
                self._squares = np.zeros((inputs.shape[1], inputs.shape[1]))
                self._products = np.zeros((inputs.shape[1], 3))
            # Each picture counts the same, whatever its size.
            self._squares += inputs.T @ inputs / len(inputs)
            self._products += inputs.T @ colours / len(inputs)
            self._pictures += 1

    def picture(self, latents: Any, size: tuple[int, int]) -> Image.Image | None:
        """Return a preview of latents in this size. None: nothing has been learned yet."""
        height, width, _ = latents.shape
        with self._lock:
            if self._squares is None:
                return None
            ridge = RIDGE * self._pictures * np.eye(len(self._squares))
            map_to_colours = np.linalg.solve(self._squares + ridge, self._products)
        colours = (_features(latents) @ map_to_colours).reshape(height, width, 3)
        image = Image.fromarray(np.clip(colours, 0, 255).round().astype(np.uint8))
        return image.resize(size, Image.Resampling.BICUBIC)


def _features(latents: Any) -> Any:
    """Return for each place a one, the channels and, if they are few, their products."""
    flat = latents.reshape(-1, latents.shape[-1]).astype(np.float64)
    one = np.ones((len(flat), 1))
    if flat.shape[1] > MULTIPLIED_CHANNELS:
        return np.hstack([one, flat])
    rows, columns = np.triu_indices(flat.shape[1])
    return np.hstack([one, flat, flat[:, rows] * flat[:, columns]])


def as_grid(latents: Any, width: int, height: int) -> Any:
    """Return latents as (batch, rows, columns, channels), or None if they are no picture.

    Args:
        latents: (batch, channels, rows, columns), or packed as (batch, rows * columns, channels).
        width: width of the picture, in pixels.
        height: height of the picture, in pixels.
    """
    if latents.ndim == 4:
        return latents.transpose(0, 2, 3, 1)
    if latents.ndim != 3:
        return None
    batch, places, channels = latents.shape
    scale = math.sqrt(width * height / places)
    rows, columns = round(height / scale), round(width / scale)
    return latents.reshape(batch, rows, columns, channels) if rows * columns == places else None
