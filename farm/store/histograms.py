"""Histograms of durations, as arrays of counts on the workers' rows.

An array may hold several histograms one after another, for example one for each priority.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

from farm.store import arrays

BOUNDS = tuple(0.25 * 2.0**power for power in range(13))
"""Upper bounds of the buckets, in seconds: 0.25 to 1024. The last bucket has no bound."""
WIDTH = len(BOUNDS) + 1


def place(seconds: float, which: int = 0) -> int:
    """Return the index of the bucket for a duration, in histogram `which` of an array."""
    return which * WIDTH + bisect_left(BOUNDS, seconds)


def written(counts: Counter[int]) -> str:
    """Write counts by index as an array for Postgres. It ends after the last count."""
    return arrays.numbers(counts[index] for index in range(max(counts, default=-1) + 1))


def quantile(counts: Sequence[int], share: float) -> float | None:
    """Estimate the duration that a share of the durations of a histogram stay below, in seconds.

    Within a bucket they are taken to be spread evenly, as Prometheus' histogram_quantile does.

    Args:
        counts: number of durations in each bucket.
        share: from 0 to 1.

    Returns:
        None if there are no durations. The largest bound if it is in the last bucket.
    """
    wanted = share * sum(counts)
    if wanted <= 0:
        return None
    below = 0
    for bound, low, count in zip(BOUNDS, (0.0, *BOUNDS), counts, strict=False):
        if count and below + count >= wanted:
            return low + (bound - low) * (wanted - below) / count
        below += count
    return BOUNDS[-1]


def cumulative(array: Sequence[int], which: int = 0) -> list[tuple[str, float]]:
    """Return one histogram of an array as Prometheus defines it.

    Returns:
        The bound of each bucket, and the number of durations up to that bound.
    """
    counts = [*array[which * WIDTH :], *[0] * WIDTH][:WIDTH]
    return [*zip([*map(str, BOUNDS), "+Inf"], map(float, accumulate(counts)), strict=True)]
