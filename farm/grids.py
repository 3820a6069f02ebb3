"""A grid's points, stored once: what all of them share, and what each axis of the grid gives.

A grid of 1,000 points with a long negative prompt would hold it 1,000 times otherwise.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

FEWEST = 8
"""Smaller grids are stored point by point"""


def packed(
    points: Sequence[Mapping[str, Any]],
    shared: Mapping[str, Any],
    grid: Mapping[str, Sequence[Any]],
) -> dict[str, Any] | None:
    """Lay out points by their axes.

    Args:
        points: `params` and `bucket` of each, the grid's last axis varying fastest.
        shared: parameters that the points may share.
        grid: its axes, with as many values as each has.

    Returns:
        What `unpacked` takes; None where it would not give the very same points.
    """
    if len(points) < FEWEST:
        return None
    lengths = [len(values) for values in grid.values()]
    axes = {}
    for place, name in enumerate(grid):
        stride = 1
        for length in lengths[place + 1 :]:
            stride *= length
        axes[name] = [points[index * stride]["params"][name] for index in range(lengths[place])]
    buckets = itertools.groupby(point["bucket"] for point in points)
    layout = {
        "names": list(points[0]["params"]),
        "axes": axes,
        "buckets": [[len([*group]), bucket] for bucket, group in buckets],
    }
    given = [{name: point[name] for name in ("params", "bucket")} for point in points]
    same = json.dumps([*unpacked(layout, shared)]) == json.dumps(given)
    return layout if same else None


def unpacked(layout: Mapping[str, Any], shared: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Give each point's `params` and `bucket`, in order."""
    axes = layout["axes"]
    buckets = itertools.chain.from_iterable(
        itertools.repeat(bucket, count) for count, bucket in layout["buckets"]
    )
    for values, bucket in zip(itertools.product(*axes.values()), buckets, strict=True):
        here = {**shared, **dict(zip(axes, values, strict=True))}
        yield {"params": {name: here[name] for name in layout["names"]}, "bucket": bucket}
