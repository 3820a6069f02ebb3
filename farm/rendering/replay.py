"""Rendering a picture again from its own text, and comparing the pixels.

A JPEG's pixels are not those that were rendered: the new rendering is made a JPEG too, and what
comes back from both is compared.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageChops
from pydantic import ValidationError

from farm.domain.image_formats import FORMATS, Format
from farm.domain.spec import MAX_BUCKET, MAX_SEED, FrameSpec
from farm.errors import InvalidRequest
from farm.imaging.encoding import pixels_as_stored, read
from farm.imaging.provenance import Provenance
from farm.pipelines.catalog import Catalog, Pipeline
from farm.pipelines.family import Batch
from farm.pipelines.resolve import ResolvedPipeline, resolve_pipeline
from farm.pipelines.runtime.devices import device_of, prepare_torch
from farm.pipelines.runtime.loading import OPTIONS
from farm.rendering.environment import environment_of
from farm.rendering.warmup import warm_up

if TYPE_CHECKING:
    from farm.pipelines.family import LoadedPipeline, StepHook

CPU = "cpu"
DTYPES = ("float32", "float16", "bfloat16")
MAX_THREADS = 1_024


@dataclass(frozen=True)
class Difference:
    """Where two pictures of the same size differ."""

    pixels: int
    """how many differ"""
    largest: int
    """the largest difference of a channel, of 255"""
    first: tuple[int, int]
    """x and y of the first that differs, row by row from the top left"""
    box: tuple[int, int, int, int]
    """left, top, right, bottom around all that differ; right and bottom are just outside"""


@dataclass(frozen=True)
class Replay:
    """A picture beside its new rendering."""

    recorded: Provenance
    now: Provenance
    picture: Image.Image
    fresh: Image.Image
    """as it was rendered, whatever the format"""
    form: Format
    """the picture's; of a JPEG what was compared are the pixels of two JPEGs"""
    difference: Difference | None
    """None: every pixel is the same"""
    notes: list[str]
    """What is not as it was when the picture was rendered, a sentence each"""

    @property
    def compared(self) -> str:
        """What was compared, in words."""
        return "pixels" if FORMATS[self.form].lossless else "pixels of the JPEG, encoded again"

    @property
    def identical(self) -> bool:
        """Whether every pixel is the same."""
        return self.difference is None


FindImage = Callable[[str], Image.Image]
"""Gives the control image of an id, as RGB; raises InvalidRequest where it has none."""


def no_image(image_id: str) -> Image.Image:
    """Find no image: for pictures that need none."""
    raise InvalidRequest(f"The picture was steered by image {image_id}, which is not at hand.")


def replay(
    content: bytes,
    catalog: Catalog,
    on_step: StepHook = lambda _done, _steps: None,
    find_image: FindImage = no_image,
) -> Replay:
    """Render a picture again, as it was: bucket, dtype, and on a CPU the number of threads.

    Args:
        content: the bytes of a PNG, a JPEG or a WebP.
        catalog: where its pipeline is looked up.
        on_step: called after every denoising step.
        find_image: gives the control images that steered it.

    Raises:
        InvalidRequest: the picture holds no provenance, the catalog has no such pipeline, or the
            sizes differ.
        CatalogError: the pipeline cannot be loaded.
    """
    picture, recorded, form = read(content)
    # Read once, when torch is loaded: threads that spin slow a busy machine down manyfold.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    entry = _entry(catalog, recorded)
    resolved = resolve_pipeline(recorded.frame.pipeline, entry)
    frame = _checked(picture, recorded, resolved)
    images = {name: find_image(name) for name in resolved.params_type.image_ids(frame.params)}
    prepare_torch(recorded.threads)
    loaded = resolved.family.load(entry)
    warm_up(resolved, loaded, only=frame)
    fresh = resolved.family.denoise(loaded, Batch([frame], on_step, images))[0]
    if fresh is None:
        raise InvalidRequest("The pipeline's safety checker flags this picture here.")
    now = _provenance(recorded, loaded)
    difference = compare(picture, pixels_as_stored(fresh, form))
    return Replay(recorded, now, picture, fresh, form, difference, list(_notes(recorded, now)))


def _entry(catalog: Catalog, recorded: Provenance) -> Pipeline:
    """The catalog's entry, bound to the device and dtype that the picture was rendered with."""
    name = recorded.frame.pipeline
    if name not in catalog.pipelines:
        names = ", ".join(sorted(catalog.pipelines))
        raise InvalidRequest(
            f"The picture was rendered by pipeline {name[:100]!r}, which this catalog does not "
            f"have; it has {names}. FARM_PIPELINES names another catalog."
        )
    if recorded.dtype not in DTYPES:
        raise damaged(f"dtype {recorded.dtype[:40]!r}")
    entry = catalog.pipelines[name]
    anywhere = entry.model_copy(update={"device": "auto"})
    device = CPU if recorded.device.startswith(CPU) else device_of(anywhere)
    how = {"device": device, "dtype": recorded.dtype, **_options(recorded)}
    return entry.model_copy(update=how)


def _options(recorded: Provenance) -> dict[str, Any]:
    """How the pipeline was loaded, checked as a catalog entry's own options are."""
    try:
        entry = Pipeline.model_validate({"source": "-", **recorded.options})
    except ValidationError as error:
        raise damaged(f"options: {error.errors()[0]['msg']}") from error
    return {name: getattr(entry, name) for name in OPTIONS}


def _checked(picture: Image.Image, recorded: Provenance, resolved: ResolvedPipeline) -> FrameSpec:
    """The frame, with everything that the picture claims checked: it may come from anywhere."""
    frame = recorded.frame
    if not 1 <= frame.bucket <= MAX_BUCKET:
        raise damaged(f"bucket {frame.bucket}")
    if not 0 <= frame.seed <= MAX_SEED:
        raise damaged(f"seed {frame.seed}")
    if not 0 <= recorded.threads <= MAX_THREADS:
        raise damaged(f"{recorded.threads} threads")
    try:
        # Not with the catalog's defaults: what an older PNG leaves out, its worker left out.
        params = resolved.family_params.model_validate(frame.params)
    except ValidationError as error:
        raise damaged(error.errors()[0]["msg"].removeprefix("Value error, ")) from error
    if params.width * params.height > resolved.pipeline.max_pixels:
        raise damaged(f"{params.width}x{params.height} pixels")
    if picture.size != (params.width, params.height):
        raise InvalidRequest(
            f"The picture differs in size: it is {picture.width}x{picture.height}, and was "
            f"rendered as {params.width}x{params.height}."
        )
    return frame.model_copy(update={"params": params.model_dump()})


def damaged(what: str) -> InvalidRequest:
    """The error for provenance that no worker wrote."""
    return InvalidRequest(f"The picture's text of the farm is damaged: {what}.")


def _provenance(recorded: Provenance, loaded: LoadedPipeline) -> Provenance:
    return Provenance(**dict(environment_of(loaded)), frame=recorded.frame)


def _notes(recorded: Provenance, now: Provenance) -> Iterator[str]:
    if now.weights != recorded.weights:
        yield (
            f"The weights of pipeline {now.frame.pipeline} are not those that rendered it: "
            f"{now.weights[:12]} now, {recorded.weights[:12]} then."
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
    """Compare two pictures pixel by pixel; None where they are the same.

    Raises:
        InvalidRequest: they are of different kinds, such as RGB and grey.
    """
    if picture.mode != fresh.mode:
        raise InvalidRequest(
            f"The picture differs in kind: it is {picture.mode}, and was rendered as {fresh.mode}."
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
    """Read a picture's file.

    Raises:
        InvalidRequest: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}.") from error
