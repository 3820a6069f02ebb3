"""The rendering environment of this process: device, torch threads, versions of libraries."""

from __future__ import annotations

from importlib import metadata

from farm import __version__
from farm.imaging.provenance import RenderEnvironment
from farm.pipelines.family import LoadedPipeline
from farm.pipelines.runtime.devices import device_name, thread_count

LIBRARIES = ("torch", "diffusers", "transformers", "compel", "pillow", "numpy", "zlib-ng")


def environment_of(loaded: LoadedPipeline) -> RenderEnvironment:
    """Describe the environment in which this process renders with a loaded pipeline."""
    return RenderEnvironment(
        weights=loaded.weights,
        device=device_name(loaded.device),
        dtype=loaded.dtype,
        threads=thread_count(loaded.device),
        versions=library_versions(),
        options=dict(loaded.options),
    )


def library_versions() -> dict[str, str]:
    """Return the version of every library that influences the bytes of an image."""
    return {"farm": __version__, **{name: metadata.version(name) for name in LIBRARIES}}
