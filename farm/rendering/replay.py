"""Replay: render an image again from its metadata, and compare the pixels.

JPEG changes the rendered pixels. So the new rendering is also encoded as a JPEG, and the decoded
pixels of both are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageChops
from pydantic import ValidationError

from farm.domain.image_formats import FORMATS, Format
from farm.domain.spec import MAX_BUCKET, MAX_SEED, FrameSpec
from farm.errors import InvalidRequest
from farm.imaging.encoding import pixels_as_stored, read, read_pixels
from farm.imaging.provenance import Provenance
from farm.pipelines.catalog import Catalog, Pipeline
from farm.pipelines.family import Batch
from farm.pipelines.resolve import ResolvedPipeline, resolve_pipeline
from farm.pipelines.runtime.devices import device_of, prepare_torch
from farm.pipelines.runtime.loading import OPTIONS
from farm.process import limit_spinning
from farm.rendering.environment import environment_of
from farm.rendering.warmup import warm_up

if TYPE_CHECKING:
    from farm.pipelines.family import LoadedPipeline, StepHook

CPU = "cpu"
DTYPES = ("float32", "float16", "bfloat16")
MAX_THREADS = 1_024


@dataclass(frozen=True)
class Difference:
    """Difference of two images of the same size."""

    pixels: int
    """Number of pixels that differ."""
    largest: int
    """Largest difference of a channel, 1 to 255."""
    first: tuple[int, int]
    """Position (x, y) of the first different pixel, row by row from the top left."""
    box: tuple[int, int, int, int]
    """Left, top, right, bottom of the different area. Right and bottom are just outside."""


@dataclass(frozen=True)
class Replay:
    """An image, its new rendering, and their difference."""

    recorded: Provenance
    now: Provenance
    picture: Image.Image
    fresh: Image.Image
    """The new rendering, before encoding."""
    form: Format
    """Format of the image. For JPEG, the pixels of two JPEGs were compared."""
    difference: Difference | None
    """None if every pixel is the same."""
    notes: list[str]
    """Changes of the environment since the image was rendered, one sentence each."""

    @property
    def compared(self) -> str:
        """The compared data, as text."""
        return "pixels" if FORMATS[self.form].lossless else "pixels of the JPEG, encoded again"

    @property
    def identical(self) -> bool:
        """True if every pixel is the same."""
        return self.difference is None


FindImage = Callable[[str], Image.Image]
"""Function that returns the control image with an ID, as RGB, or raises InvalidRequest."""


def no_image(image_id: str) -> Image.Image:
    """Refuse every control image: for replays that need none."""
    raise InvalidRequest(
        f"The picture was rendered with control image {image_id}, which is missing here."
    )


def replay(
    content: bytes,
    catalog: Catalog,
    on_step: StepHook = lambda _done, _steps: None,
    find_image: FindImage = no_image,
    provenance: Provenance | None = None,
) -> Replay:
    """Render an image again with its bucket, dtype and, on a CPU, number of threads.

    Args:
        content: the bytes of a PNG, a JPEG or a WebP file.
        catalog: the catalog with its pipeline.
        on_step: called after every denoising step.
        find_image: returns its control images.
        provenance: its provenance, if the file does not hold it.

    Raises:
        InvalidRequest: the image has no provenance, the catalog has no such pipeline, or the
            sizes differ.
        CatalogError: the pipeline cannot be loaded.
    """
    if provenance is None:
        picture, recorded, form = read(content)
    else:
        picture, recorded, form = read_pixels(content), provenance, provenance.frame.format
    limit_spinning()
    entry = _entry(catalog, recorded)
    resolved = resolve_pipeline(recorded.frame.pipeline, entry)
    frame = _checked(picture, recorded, resolved)
    images = {name: find_image(name) for name in resolved.params_type.image_ids(frame.params)}
    prepare_torch(recorded.threads)
    loaded = resolved.family.load(resolved.pipeline)
    warm_up(resolved, loaded, only=frame)
    fresh = resolved.family.denoise(loaded, Batch([frame], on_step, images))[0]
    if fresh is None:
        raise InvalidRequest(
            "The pipeline's safety checker flags the new rendering, so nothing can be compared."
        )
    now = _provenance(recorded, loaded)
    difference = compare(picture, pixels_as_stored(fresh, form))
    return Replay(recorded, now, picture, fresh, form, difference, list(_notes(recorded, now)))


def _entry(catalog: Catalog, recorded: Provenance) -> Pipeline:
    """Return the catalog's entry, with the device and dtype that rendered the image."""
    name = recorded.frame.pipeline
    if name not in catalog.pipelines:
        names = ", ".join(sorted(catalog.pipelines))
        raise InvalidRequest(
            f"The picture was rendered by pipeline {name[:100]!r}, which is not in this catalog. "
            f"It has {names}. Set FARM_PIPELINES to the right catalog."
        )
    if recorded.dtype not in DTYPES:
        raise damaged(f"dtype {recorded.dtype[:40]!r}")
    entry = catalog.pipelines[name]
    anywhere = entry.model_copy(update={"device": "auto"})
    device = CPU if recorded.device.startswith(CPU) else device_of(anywhere)
    how = {"device": device, "dtype": recorded.dtype, **_options(recorded)}
    return entry.model_copy(update=how)


def _options(recorded: Provenance) -> dict[str, object]:
    """Return the options with which the pipeline was loaded, checked like those of an entry."""
    try:
        entry = Pipeline.model_validate({"source": "-", **recorded.options})
    except ValidationError as error:
        raise damaged(f"options: {error.errors()[0]['msg']}") from error
    return {name: getattr(entry, name) for name in OPTIONS}


def _checked(picture: Image.Image, recorded: Provenance, resolved: ResolvedPipeline) -> FrameSpec:
    """Check everything in the image's metadata, which may have any origin. Return the frame."""
    frame = recorded.frame
    if not 1 <= frame.bucket <= MAX_BUCKET:
        raise damaged(f"bucket {frame.bucket}")
    if not 0 <= frame.seed <= MAX_SEED:
        raise damaged(f"seed {frame.seed}")
    if not 0 <= recorded.threads <= MAX_THREADS:
        raise damaged(f"{recorded.threads} threads")
    try:
        # Without the catalog's defaults: parameters missing in an older PNG were not used.
        params = resolved.family_params.model_validate(frame.params)
    except ValidationError as error:
        raise damaged(error.errors()[0]["msg"].removeprefix("Value error, ")) from error
    if params.width * params.height > resolved.pipeline.max_pixels:
        raise damaged(f"{params.width}x{params.height} pixels")
    if picture.size != (params.width, params.height):
        raise InvalidRequest(
            f"The picture was resized: it is {picture.width}x{picture.height}, but was rendered as "
            f"{params.width}x{params.height}. Use the original file."
        )
    return frame.model_copy(update={"params": params.model_dump()})


def damaged(what: str) -> InvalidRequest:
    """Build the error for provenance that no worker wrote."""
    return InvalidRequest(f"The picture's metadata of the farm is damaged: {what}.")


def _provenance(recorded: Provenance, loaded: LoadedPipeline) -> Provenance:
    return Provenance(**dict(environment_of(loaded)), frame=recorded.frame)


def _notes(recorded: Provenance, now: Provenance) -> Iterator[str]:
    if now.weights != recorded.weights:
        yield (
            f"The weights of pipeline {now.frame.pipeline} have changed: {now.weights[:12]} here; "
            f"the picture was rendered with {recorded.weights[:12]}."
        )
    for name, then in (("device", recorded.device), ("dtype", recorded.dtype)):
        here = getattr(now, name)
        if here != then:
            yield f"The {name} is {here} here; it was {then}."
    if now.threads != recorded.threads:
        yield f"torch uses {now.threads} threads here; it used {recorded.threads}."
    for library in sorted(recorded.versions.keys() | now.versions.keys()):
        then, here = recorded.versions.get(library, "unknown"), now.versions.get(library, "unknown")
        if here != then:
            yield f"{library} is {here} here; it was {then}."


def compare(picture: Image.Image, fresh: Image.Image) -> Difference | None:
    """Compare two images pixel by pixel. Return None if they are the same.

    Raises:
        InvalidRequest: they have different modes, such as RGB and grey.
    """
    if picture.mode != fresh.mode:
        raise InvalidRequest(
            f"The picture was converted: its mode is {picture.mode}, but it was rendered as "
            f"{fresh.mode}. Use the original file."
        )
    channels = ImageChops.difference(picture, fresh).split()
    deepest = channels[0]
    for channel in channels[1:]:
        deepest = ImageChops.lighter(deepest, channel)
    box = deepest.getbbox()
    if box is None:
        return None
    values = deepest.tobytes()
    first = next(index for index, value in enumerate(values) if value)
    return Difference(
        pixels=len(values) - values.count(0),
        largest=max(values),
        first=(first % picture.width, first // picture.width),
        box=box,
    )


def read_picture(path: Path) -> bytes:
    """Read an image file.

    Raises:
        InvalidRequest: the file cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}.") from error
