"""Colours of latents: a picture of latents without the model that decodes them.

The VAE of the pipeline encodes some pictures of coloured patches, once, when the pipeline is
loaded. A map from a latent's channels, and their products, to colours is fitted to them by least
squares. So it fits every VAE, and knows nothing of what anybody renders.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from farm.pipelines.family import LoadedPipeline

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

PICTURES, SIDE = 24, 64
"""Number of pictures that are encoded, and their width and height in pixels."""
RIDGE = 1e-4
"""Weight that keeps the map small in directions that the pictures do not have."""
MULTIPLIED_CHANNELS = 16
"""Maximum number of channels whose products are used too."""
PACKED = 2
"""Rows and columns of a latent that some pipelines put into one place."""


class LatentColours:
    """A map from the channels of latents to colours."""

    def __init__(self, latents: Any, colours: Any) -> None:
        """Fit it.

        Args:
            latents: (places, channels).
            colours: (places, 3), from 0 to 255.
        """
        inputs = _features(latents)
        squares = inputs.T @ inputs / len(inputs)
        ridge = RIDGE * np.trace(squares) / len(squares) * np.eye(len(squares))
        self._channels = latents.shape[-1]
        self._map = np.linalg.solve(squares + ridge, inputs.T @ colours / len(inputs))

    def picture(self, latents: Any, size: tuple[int, int]) -> Image.Image | None:
        """Return a preview of latents, (rows, columns, channels), in this size.

        None: they have other channels, or are not finite.
        """
        rows, columns, channels = latents.shape
        if channels == PACKED**2 * self._channels:
            return self.picture(_unpacked(latents), size)
        if channels != self._channels or not np.isfinite(latents).all():
            return None
        colours = _features(latents) @ self._map
        pixels = np.clip(colours, 0, 255).round().astype(np.uint8).reshape(rows, columns, 3)
        return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def colours_of(loaded: LoadedPipeline) -> LatentColours | None:
    """Fit the colours of a loaded pipeline. None: it has no VAE that this knows."""
    pipe = loaded.pipes[0] if loaded.pipes else None
    vae = getattr(pipe, "vae", None) or getattr(pipe, "movq", None)
    if vae is None or not hasattr(vae, "encode"):
        return None
    try:
        pictures = patches()
        latents = _encoded(vae, pictures)
        loaded.reset_after_failure()  # an offloaded VAE returns to the CPU
        if latents.ndim != 4 or not np.isfinite(latents).all():
            return None
        rows, columns = latents.shape[2:]
        small = [
            np.asarray(each.resize((columns, rows), Image.Resampling.BOX), dtype=np.float64)
            for each in pictures
        ]
        grid = latents.transpose(0, 2, 3, 1)
        return LatentColours(grid.reshape(-1, grid.shape[-1]), np.concatenate(small).reshape(-1, 3))
    except Exception as error:  # there are no previews then, and everything else works
        log.warning("There are no previews of %s: %s", type(vae).__name__, error)
        return None


def patches() -> list[Image.Image]:
    """Return pictures of smooth colours and of flat patches, always the same."""
    random = np.random.default_rng(1)
    made = []
    for number in range(PICTURES):
        is_flat = number % 3 > 0
        cells = 2 + number % 4
        levels = [0, 64, 128, 192, 255] if is_flat else range(256)
        colours = random.choice(levels, (cells, cells, 3)).astype(np.uint8)
        way = Image.Resampling.NEAREST if is_flat else Image.Resampling.BICUBIC
        made.append(Image.fromarray(colours).resize((SIDE, SIDE), way))
    return made


def _encoded(vae: Any, pictures: list[Image.Image]) -> Any:
    """Encode pictures as the latents that a pipeline hands to its VAE's decoder."""
    import torch

    values = np.stack([np.asarray(each, dtype=np.float32) for each in pictures])
    pixels = torch.from_numpy(values).permute(0, 3, 1, 2) / 127.5 - 1
    dtype = vae.dtype
    # As diffusers does it: some VAEs overflow in half precision.
    widened = dtype == torch.float16 and bool(getattr(vae.config, "force_upcast", False))
    if widened:
        vae.to(torch.float32)
    try:
        with torch.inference_mode():
            found = vae.encode(pixels.to(vae.device, vae.dtype))
            latents = _scaled(vae, _mode(found))
    finally:
        if widened:
            vae.to(dtype)
    return latents.float().cpu().numpy()


def _mode(found: Any) -> torch.Tensor:
    mode: torch.Tensor = (
        found.latent_dist.mode() if hasattr(found, "latent_dist") else found.latents
    )
    return mode


def _scaled(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    if type(vae).__name__ == "VQModel":  # Kandinsky's decoder takes them as they are
        return latents
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    scale = getattr(vae.config, "scaling_factor", None) or 1.0
    return (latents - shift) * scale


def _features(latents: Any) -> Any:
    """Return for each place a one, the channels and, if they are few, their products."""
    flat = latents.reshape(-1, latents.shape[-1]).astype(np.float64)
    one = np.ones((len(flat), 1))
    if flat.shape[1] > MULTIPLIED_CHANNELS:
        return np.hstack([one, flat])
    rows, columns = np.triu_indices(flat.shape[1])
    return np.hstack([one, flat, flat[:, rows] * flat[:, columns]])


def _unpacked(latents: Any) -> Any:
    """Return packed latents as (2 x rows, 2 x columns, channels / 4), as Flux packs them."""
    rows, columns, channels = latents.shape
    parts = latents.reshape(rows, columns, channels // PACKED**2, PACKED, PACKED)
    apart = parts.transpose(0, 3, 1, 4, 2)
    return apart.reshape(PACKED * rows, PACKED * columns, channels // PACKED**2)


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
