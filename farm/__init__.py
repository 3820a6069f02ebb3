"""The farm: a distributed render farm for text-to-image diffusion."""

__version__ = "0.1.0"
