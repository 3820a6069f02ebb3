"""Which bucket is worth its memory: batches of growing size are timed, size of picture by size."""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image
from pydantic import ValidationError

from farm.domain.spec import MAX_BUCKET, FrameSpec
from farm.errors import InvalidRequest
from farm.pipelines.family import Batch
from farm.pipelines.resolve import ResolvedPipeline, sample
from farm.pipelines.runtime.devices import is_out_of_memory, peak_memory, watch_peak_memory
from farm.pipelines.runtime.loading import free_what_is_left

if TYPE_CHECKING:
    from farm.pipelines.family import LoadedPipeline

DEFAULT = "default"
"""The bucket table's name for every size that it does not list"""
GROWTH = 1.02
"""Less than so much faster than the best before counts as no faster: that much is noise"""
PATIENCE = 2
"""Buckets in a row that bring no growth end a sweep: one of them may have been disturbed"""

OUT_OF_MEMORY = "out_of_memory"
NO_GROWTH = "no_growth"
MOST = "most"


@dataclass(frozen=True)
class Point:
    """One bucket, as it was measured."""

    bucket: int
    seconds: tuple[float, ...]
    """of each timed batch, in the order they ran"""
    peak_bytes: int
    """the most memory in use meanwhile: see devices.peak_memory"""

    @property
    def batch_seconds(self) -> float:
        """The median of the timed batches."""
        return statistics.median(self.seconds)

    @property
    def images_per_second(self) -> float:
        """Pictures a second, at the median."""
        return self.bucket / self.batch_seconds

    @property
    def seconds_per_image(self) -> float:
        """Seconds a picture, at the median."""
        return self.batch_seconds / self.bucket

    @property
    def spread(self) -> float:
        """From the fastest batch to the slowest, as a share of the median."""
        return (max(self.seconds) - min(self.seconds)) / self.batch_seconds


@dataclass(frozen=True)
class SweepResult:
    """One size of picture, and what each bucket gave."""

    width: int
    height: int
    names: tuple[str, ...]
    """under which the bucket table has the size: `64x64`, `default`"""
    points: tuple[Point, ...]
    ended: str
    """`most`: all were tried; `no_growth`; `out_of_memory`: at the bucket after the last point"""


@dataclass(frozen=True)
class SweepOptions:
    """How far a sweep goes, and how carefully."""

    most: int = 16
    """the largest bucket that is tried"""
    batches: int = 3
    """that are timed for each, after one that is not"""
    steps: int | None = None
    """denoising steps; None: as the pipeline's own default"""


def best_bucket(points: Sequence[Point], share: float) -> Point:
    """Choose the smallest bucket that reaches a share of the best pictures a second.

    Raises:
        ValueError: there are no points.
    """
    best = max(point.images_per_second for point in points)
    worthy = [point for point in points if point.images_per_second >= share * best]
    return min(worthy, key=lambda point: point.bucket)


def has_stopped_growing(points: Sequence[Point]) -> bool:
    """Whether the last buckets were no faster than the best before them."""
    if len(points) <= PATIENCE:
        return False
    best = max(point.images_per_second for point in points[:-PATIENCE])
    return all(point.images_per_second < best * GROWTH for point in points[-PATIENCE:])


def buckets(most: int) -> list[int]:
    """The buckets that are tried: the powers of two below `most`, and `most`."""
    powers = [2**power for power in range(MAX_BUCKET.bit_length()) if 2**power < most]
    return [*powers, most]


def sizes(
    resolved: ResolvedPipeline, added: Sequence[str] = ()
) -> dict[tuple[int, int], tuple[str, ...]]:
    """The sizes to measure, width and height, each with its names in the bucket table.

    Args:
        resolved: the pipeline.
        added: more sizes, each as `768x512`.

    Raises:
        InvalidRequest: a size is not written so, or is none that the pipeline renders.
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
        raise InvalidRequest(f"size {name!r}: write it as 768x512, in pixels.", param="size")
    size = int(width), int(height)
    if size[0] * size[1] > resolved.pipeline.max_pixels:
        most = resolved.pipeline.max_pixels
        raise InvalidRequest(
            f"size {name}: the pipeline renders at most {most} pixels.", param="size"
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
    """Time a size of picture at one bucket after another.

    Args:
        resolved: the pipeline.
        loaded: the same, pinned.
        size: width and height, in pixels.
        names: the size's names in the bucket table.
        effort: how far, and how carefully.
        on_batch: told of every batch that was rendered.

    Raises:
        InvalidRequest: the pipeline takes no such steps.
    """
    points: list[Point] = []
    ended = MOST
    for bucket in buckets(effort.most):
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
    """Time one bucket; None where memory runs out."""
    watch_peak_memory(loaded.device)
    seconds = []
    try:
        for batch in _batches(resolved, size, bucket, effort):
            started = time.perf_counter()
            resolved.family.denoise(loaded, batch)  # gives pictures: the device has finished
            seconds.append(time.perf_counter() - started)
            on_batch()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # what filled the memory stands in them
        loaded.reset_after_failure()
    else:
        return Point(bucket, tuple(seconds[1:]), peak_memory(loaded.device))
    free_what_is_left()
    return None


def _batches(
    resolved: ResolvedPipeline, size: tuple[int, int], bucket: int, effort: SweepOptions
) -> Iterator[Batch]:
    """The warm-up batch, then those that are timed; each has prompts of its own."""
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
