"""Use case of history: what each lane did over a time, as points for charts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import groupby, pairwise

from farm.context import Farm
from farm.domain.spec import Priority
from farm.errors import InvalidRequest
from farm.store import histograms, history
from farm.store.engine import reads
from farm.store.history import Sample

RANGES = {
    "15m": timedelta(minutes=15),
    "1h": timedelta(hours=1),
    "6h": timedelta(hours=6),
    "24h": timedelta(hours=24),
    "7d": timedelta(days=7),
    "30d": timedelta(days=30),
    "400d": timedelta(days=400),
}


@dataclass(frozen=True)
class Span:
    """A time that is looked at, divided into points."""

    since: datetime
    until: datetime
    step: int
    """Seconds between the stored samples."""
    seconds: int
    """Seconds of a point, a multiple of `step`."""


@dataclass(frozen=True)
class Point:
    """A lane over some time that ends at `at`."""

    at: datetime
    waiting: dict[str, int]
    """Mean number of frames that waited, by priority."""
    workers: float
    """Mean number, like those below."""
    able: float
    rendering: float
    loading: float
    failed: float
    draining: float
    frames_per_second: float
    """Frames that succeeded."""
    failed_attempts: int
    expired: int
    """Batches whose lease expired: their worker was lost."""
    busy: float | None
    """Busy share of the devices, while there was work. None: there was none."""
    wait_p50: float | None
    """Seconds from a job's submission to its first claim that half of the jobs waited less than."""
    wait_p95: float | None
    stages: dict[str, float] | None
    """Seconds of each stage for a frame. None: none succeeded."""


@dataclass(frozen=True)
class LaneHistory:
    """Points of a lane, oldest first. Where nothing was recorded, points are missing."""

    pipeline: str
    points: list[Point]


def span_of(
    word: str = "1h",
    since: datetime | None = None,
    until: datetime | None = None,
    points: int = 96,
) -> Span:
    """Divide a time into points.

    Args:
        word: a key of RANGES: the time until now.
        since: begin, in place of `word`.
        until: end; default now.
        points: number of points at most.

    Raises:
        InvalidRequest: the time is unknown, or it ends before it begins.
    """
    now = datetime.now(UTC)
    oldest = now - timedelta(days=history.STEPS[3600])
    end = now if until is None else max(oldest, min(until, now))
    if since is None:
        if word not in RANGES:
            raise InvalidRequest(f"range: use one of {', '.join(RANGES)}.", param="range")
        since = end - RANGES[word]
    since = max(since, oldest)
    if since >= end:
        raise InvalidRequest("from: this time is not before the end.", param="from")
    age_days = (now - since).total_seconds() / 86_400
    step = next((each for each, days in history.STEPS.items() if age_days <= days), 3600)
    length = (end - since).total_seconds()
    return Span(since, end, step, step * max(1, math.ceil(length / points / step)))


def read_history(farm: Farm, pipelines: Sequence[str], span: Span) -> list[LaneHistory]:
    """Read what some lanes did over a time."""
    before = span.since - timedelta(seconds=span.seconds)  # the first difference begins there
    with reads(farm.store) as connection:
        samples = history.read(
            connection, pipelines, before, span.until, step=span.step, span=span.seconds
        )
    found = {name: [*each] for name, each in groupby(samples, key=lambda each: each.pipeline)}
    return [
        LaneHistory(
            name, [_point(a, b) for a, b in pairwise(found.get(name, ())) if _joins(a, b, span)]
        )
        for name in pipelines
    ]


def _joins(before: Sample, after: Sample, span: Span) -> bool:
    """Return True if the difference of two samples is of one point. Sums fall with a new farm."""
    seconds = (after.at - before.at).total_seconds()
    return seconds < 1.5 * span.seconds and after.succeeded >= before.succeeded


def _point(before: Sample, after: Sample) -> Point:
    seconds = (after.at - before.at).total_seconds()
    frames = after.succeeded - before.succeeded
    work = after.work_seconds - before.work_seconds
    waits = _waits(before, after)
    attempts = (after.requeued + after.dead) - (before.requeued + before.dead)
    stages = None
    if frames > 0:
        stages = {
            name: max(0.0, getattr(after, f"{name}_seconds") - getattr(before, f"{name}_seconds"))
            / frames
            for name in ("denoise", "encode", "put", "commit")
        }
    busy = None
    if work > 0:
        busy = min(1.0, max(0.0, (after.denoise_seconds - before.denoise_seconds) / work))
    return Point(
        at=after.at,
        waiting={each.wire: after.waiting[each] for each in Priority},
        workers=after.workers,
        able=after.able,
        rendering=after.rendering,
        loading=after.loading,
        failed=after.failed,
        draining=after.draining,
        frames_per_second=frames / seconds,
        failed_attempts=max(0, attempts),
        expired=max(0, after.expired - before.expired),
        busy=busy,
        wait_p50=histograms.quantile(waits, 0.5),
        wait_p95=histograms.quantile(waits, 0.95),
        stages=stages,
    )


def _waits(before: Sample, after: Sample) -> list[int]:
    """Return the histogram of the waits between two samples, of all priorities together."""
    width = histograms.WIDTH
    counts = [0] * width
    for sign, each in ((1, after.wait_buckets), (-1, before.wait_buckets)):
        for index, count in enumerate(each):
            counts[index % width] += sign * count
    return [max(0, count) for count in counts]
