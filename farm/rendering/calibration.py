"""Calibration: time batches of growing size, for each image size, to find the best bucket."""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image
from pydantic import ValidationError

from farm.domain.ladder import powers_up_to
from farm.domain.spec import FrameSpec
from farm.errors import InvalidRequest
from farm.pipelines.catalog import Step
from farm.pipelines.family import Batch
from farm.pipelines.resolve import ResolvedPipeline, sample
from farm.pipelines.runtime.devices import is_out_of_memory, peak_memory, watch_peak_memory
from farm.pipelines.runtime.loading import free_what_is_left

if TYPE_CHECKING:
    from farm.pipelines.family import LoadedPipeline

DEFAULT = "default"
"""Name in the bucket table for every size that it does not list."""
GROWTH = 1.02
"""Minimum speed-up over the best bucket before, as a factor. A smaller one is noise."""
PATIENCE = 2
"""Buckets in a row without growth that end a sweep. One alone may have been disturbed."""

OUT_OF_MEMORY = "out_of_memory"
NO_GROWTH = "no_growth"
MOST = "most"


@dataclass(frozen=True)
class Point:
    """Measurement of one bucket."""

    bucket: int
    seconds: tuple[float, ...]
    """Seconds of each timed batch, in the order they ran."""
    peak_bytes: int
    """Peak memory during the batches, in bytes: see devices.peak_memory."""

    @property
    def batch_seconds(self) -> float:
        """Median of the timed batches, in seconds."""
        return statistics.median(self.seconds)

    @property
    def images_per_second(self) -> float:
        """Images per second, at the median."""
        return self.bucket / self.batch_seconds

    @property
    def seconds_per_image(self) -> float:
        """Seconds per image, at the median."""
        return self.batch_seconds / self.bucket

    @property
    def spread(self) -> float:
        """Difference of the slowest and the fastest batch, as a share of the median."""
        return (max(self.seconds) - min(self.seconds)) / self.batch_seconds


@dataclass(frozen=True)
class SweepResult:
    """Measurements of every bucket for one image size."""

    width: int
    height: int
    names: tuple[str, ...]
    """Names of the size in the bucket table, for example `64x64` or `default`."""
    points: tuple[Point, ...]
    ended: str
    """Reason for the end: `most` (all were tried), `no_growth`, or `out_of_memory` (at the bucket
    after the last point)."""


@dataclass(frozen=True)
class SweepOptions:
    """Extent and precision of a sweep."""

    most: int = 16
    """Largest bucket that is tried."""
    batches: int = 3
    """Number of timed batches per bucket, after one that is not timed."""
    steps: int | None = None
    """Number of denoising steps. None uses the pipeline's default."""


def best_bucket(points: Sequence[Point], share: float) -> Point:
    """Choose the smallest bucket that reaches a share of the best images per second.

    Raises:
        ValueError: there are no points.
    """
    best = max(point.images_per_second for point in points)
    worthy = [point for point in points if point.images_per_second >= share * best]
    return min(worthy, key=lambda point: point.bucket)


def ladder_of(name: str, points: Sequence[Point], top: int) -> list[Step]:
    """Return the catalog's ladder of the size `name`: every measured bucket up to `top`."""
    return [
        Step(
            size=name,
            bucket=point.bucket,
            seconds=float(f"{point.batch_seconds:.4g}"),
            memory_bytes=point.peak_bytes,
        )
        for point in points
        if point.bucket <= top
    ]


def has_stopped_growing(points: Sequence[Point]) -> bool:
    """Return True if the last buckets were no faster than the best before them."""
    if len(points) <= PATIENCE:
        return False
    best = max(point.images_per_second for point in points[:-PATIENCE])
    return all(point.images_per_second < best * GROWTH for point in points[-PATIENCE:])


def sizes(
    resolved: ResolvedPipeline, added: Sequence[str] = ()
) -> dict[tuple[int, int], tuple[str, ...]]:
    """Return the sizes to measure, as (width, height), with their names in the bucket table.

    Args:
        resolved: the pipeline.
        added: more sizes, for example `768x512`.

    Raises:
        InvalidRequest: a size has another form, or the pipeline cannot render it.
    """
    fields = resolved.params_type.model_fields
    found: dict[tuple[int, int], tuple[str, ...]] = {}
    for name in dict.fromkeys([*resolved.pipeline.bucket, *added]):
        if name == DEFAULT:
            size = (fields["width"].default, fields["height"].default)
        else:
            size = _checked_size(resolved, name)
        found[size] = (*found.get(size, ()), name)
    return found


def _checked_size(resolved: ResolvedPipeline, name: str) -> tuple[int, int]:
    width, _, height = name.partition("x")
    if not (width.isdecimal() and height.isdecimal()) or name.startswith("0") or "x0" in name:
        raise InvalidRequest(
            f"size {name!r}: write width and height in pixels, for example 768x512.", param="size"
        )
    size = int(width), int(height)
    if size[0] * size[1] > resolved.pipeline.max_pixels:
        most = resolved.pipeline.max_pixels
        raise InvalidRequest(
            f"size {name}: the pipeline renders at most {most} pixels. Choose a smaller size.",
            param="size",
        )
    _frames(resolved, size, 1, 0, None)
    return size


def sweep(
    resolved: ResolvedPipeline,
    loaded: LoadedPipeline,
    size: tuple[int, int],
    names: tuple[str, ...],
    effort: SweepOptions,
    on_batch: Callable[[], None] = lambda: None,
) -> SweepResult:
    """Time one image size at one bucket after another.

    Args:
        resolved: the pipeline.
        loaded: the same pipeline, loaded.
        size: width and height, in pixels.
        names: the size's names in the bucket table.
        effort: extent and precision of the sweep.
        on_batch: called after every rendered batch.

    Raises:
        InvalidRequest: the pipeline does not accept that number of steps.
    """
    points: list[Point] = []
    ended = MOST
    for bucket in powers_up_to(effort.most):
        point = _measured(resolved, loaded, size, bucket, effort, on_batch)
        if point is None:
            ended = OUT_OF_MEMORY
            break
        points.append(point)
        if has_stopped_growing(points) and bucket < effort.most:
            ended = NO_GROWTH
            break
    return SweepResult(*size, names, tuple(points), ended)


def _measured(
    resolved: ResolvedPipeline,
    loaded: LoadedPipeline,
    size: tuple[int, int],
    bucket: int,
    effort: SweepOptions,
    on_batch: Callable[[], None],
) -> Point | None:
    """Time one bucket. Return None if memory runs out."""
    watch_peak_memory(loaded.device)
    seconds = []
    try:
        for batch in _batches(resolved, size, bucket, effort):
            started = time.perf_counter()
            resolved.family.denoise(loaded, batch)  # returns images: the device has finished
            seconds.append(time.perf_counter() - started)
            on_batch()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # the frames hold what filled the memory
        loaded.reset_after_failure()
    else:
        return Point(bucket, tuple(seconds[1:]), peak_memory(loaded.device))
    free_what_is_left()
    return None


def _batches(
    resolved: ResolvedPipeline, size: tuple[int, int], bucket: int, effort: SweepOptions
) -> Iterator[Batch]:
    """Yield the warm-up batch, then the timed ones. Each has its own prompts."""
    picture = Image.new("RGB", size)
    for number in range(1 + effort.batches):
        frames = _frames(resolved, size, bucket, number, effort.steps)
        image_ids = resolved.params_type.image_ids(frames[0].params)
        yield Batch(frames, images=dict.fromkeys(image_ids, picture))


def _frames(
    resolved: ResolvedPipeline, size: tuple[int, int], bucket: int, number: int, steps: int | None
) -> list[FrameSpec]:
    given = {**sample(resolved.params_type), "width": size[0], "height": size[1]}
    if steps is not None:
        given["steps"] = steps
    try:
        params = resolved.params(given).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        what = first["msg"].removeprefix("Value error, ")
        raise InvalidRequest(f"{where}: {what}.", param=where) from error
    return [
        FrameSpec(
            pipeline=resolved.name,
            prompt=f"picture {number} of {place}",
            seed=place,
            bucket=bucket,
            params=params,
        )
        for place in range(bucket)
    ]
