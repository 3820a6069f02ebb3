"""Warm-up: compile every declared shape of the catalog's buckets before the first claim."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from PIL import Image

from farm.domain.spec import FrameSpec
from farm.errors import CatalogError, RenderError
from farm.pipelines.family import Batch, LoadedPipeline
from farm.pipelines.params import Params
from farm.pipelines.resolve import ResolvedPipeline, sample
from farm.pipelines.runtime.compile_cache import graphs_kept
from farm.pipelines.runtime.compiling import compile_no_more
from farm.pipelines.runtime.devices import is_out_of_memory
from farm.pipelines.runtime.loading import free_what_is_left
from farm.pipelines.runtime.slots import SlotTest

log = logging.getLogger(__name__)

STEPS = 5
"""Number of steps. The smallest number of which a refiner, which takes a fifth, gets one."""


@dataclass(frozen=True)
class Shape:
    """Shape of a batch. Each shape is compiled separately."""

    width: int
    height: int
    bucket: int


def shape_of(frame: FrameSpec) -> Shape:
    """Return the shape of a frame."""
    return Shape(frame.params["width"], frame.params["height"], frame.bucket)


@dataclass
class CompiledShapes:
    """The compiled shapes, and the others that were already logged."""

    shapes: set[Shape] = field(default_factory=set)

    def warn_if_uncompiled(self, name: str, frame: FrameSpec) -> None:
        """Log once per shape that it was not declared, and is rendered without compiling."""
        shape = shape_of(frame)
        if self.shapes and shape not in self.shapes:
            self.shapes.add(shape)
            log.warning(
                "Pipeline %s is not compiled for %dx%d at bucket %d, so such batches are slower. "
                "To change that, add the size to `bucket` in its catalog entry",
                name,
                shape.width,
                shape.height,
                shape.bucket,
            )


def warm_up(
    resolved: ResolvedPipeline, loaded: LoadedPipeline, only: FrameSpec | None = None
) -> CompiledShapes:
    """Render an image of every declared shape, with and without guidance, and discard it.

    Afterwards this process compiles nothing more. Other shapes are rendered without compiling, so
    an image's bits depend only on its spec. If the pipeline is not compiled, this does nothing.

    Args:
        resolved: the pipeline.
        loaded: the same pipeline, loaded.
        only: compile only the shape of this frame, if it is a declared one.

    Raises:
        CatalogError: the pipeline cannot be compiled; the message says why.
    """
    if not resolved.pipeline.compile:
        return CompiledShapes()
    started = time.monotonic()
    shapes = set(declared_shapes(resolved))
    if only is not None:
        shapes &= {shape_of(only)}
    with graphs_kept(resolved.name, resolved.pipeline):
        for shape in sorted(shapes, key=lambda shape: (shape.width, shape.height, shape.bucket)):
            _compile_for(resolved, loaded, shape)
    compile_no_more(is_anything_compiled=bool(shapes))
    seconds = time.monotonic() - started
    log.info("%s compiled for %d shapes in %.1f s", resolved.name, len(shapes), seconds)
    return CompiledShapes(shapes)


def _compile_for(resolved: ResolvedPipeline, loaded: LoadedPipeline, shape: Shape) -> None:
    for params in _variants(resolved, shape):
        try:
            resolved.family.denoise(loaded, _batch(resolved, shape, params))
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise CatalogError(
                f"{resolved.pipeline.source} cannot be compiled for {shape.width}x{shape.height} "
                f"at bucket {shape.bucket}: {reason}"
            ) from error


def default_shape(resolved: ResolvedPipeline) -> Shape:
    """Return the shape of the entry's default size, at its bucket."""
    fields = resolved.params_type.model_fields
    width, height = fields["width"].default, fields["height"].default
    return Shape(width, height, resolved.pipeline.bucket_for(width, height))


def declared_shapes(resolved: ResolvedPipeline) -> Iterator[Shape]:
    """Yield every size of the bucket table, at each bucket that the farm may choose for it.

    These are the measured ones, or else the table's bucket and the powers of two below it.
    """
    fields = resolved.params_type.model_fields
    for size in resolved.pipeline.bucket:
        if size == "default":
            width, height = fields["width"].default, fields["height"].default
        else:
            width, height = (int(side) for side in size.split("x"))
            size = f"{width}x{height}" if f"{width}x{height}" in resolved.pipeline.bucket else size
        for bucket in resolved.pipeline.steps(size):
            yield Shape(width, height, bucket)


def _variants(resolved: ResolvedPipeline, shape: Shape) -> Iterator[Params]:
    """Yield parameters that together reach every graph of a shape: with and without guidance."""
    fields = resolved.params_type.model_fields
    given: dict[str, object] = {"width": shape.width, "height": shape.height}
    given |= {name: STEPS for name in ("steps", "prior_steps") if name in fields}
    given |= sample(resolved.params_type)
    guided = [{}, {"guidance_scale": 1.0}] if "guidance_scale" in fields else [{}]
    for change in guided:
        yield resolved.params({**given, **change})


def _batch(resolved: ResolvedPipeline, shape: Shape, params: Params) -> Batch:
    frame = FrameSpec(
        pipeline=resolved.name,
        prompt="",
        seed=0,
        bucket=shape.bucket,
        params=params.model_dump(),
    )
    picture = Image.new("RGB", (shape.width, shape.height))
    return Batch(
        [frame], images=dict.fromkeys(resolved.params_type.image_ids(frame.params), picture)
    )


def slot_test(resolved: ResolvedPipeline, loaded: LoadedPipeline) -> SlotTest:
    """Test that an image's bits do not depend on its slot, for the entry's default size and bucket.

    If memory runs out, the result is open: a smaller bucket is tested when a batch uses it.

    Raises:
        CatalogError: the bits depend on the slot with every setting that was tried.
    """
    slots, is_short = SlotTest(resolved.name, resolved.family, resolved.params_type), False
    if loaded.pipes:
        shape = default_shape(resolved)
        params = next(_variants(resolved, shape))
        try:
            slots.threads(loaded, _batch(resolved, shape, params).frames[0])
        except RenderError as error:
            raise CatalogError(error.message) from error
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log.warning(
                "Memory runs out for pipeline %s at its default size and bucket", resolved.name
            )
            is_short = True
    if is_short:
        free_what_is_left()  # not earlier: the error still referred to the results
    return slots
