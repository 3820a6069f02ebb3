"""A grid's points, stored once: what all of them share, and what each axis of the grid gives.

A grid of 1,000 points with a long negative prompt would hold it 1,000 times otherwise.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

FEWEST = 8
"""Smaller grids are stored point by point"""


class Layout(BaseModel):
    """Points by their axes, the last varying fastest."""

    model_config = ConfigDict(frozen=True)

    names: list[str]
    """Of the parameters, in the order in which a picture's text has them"""
    axes: dict[str, list[Any]]
    buckets: list[tuple[int, int]]
    """How many points one after the other have which bucket"""

    def __len__(self) -> int:
        """Count the points."""
        return math.prod(map(len, self.axes.values()))

    def params(self, index: int, shared: Mapping[str, Any]) -> dict[str, Any]:
        """Give the parameters of a point, with what all points share."""
        here = {}
        for name, values in reversed(self.axes.items()):
            index, place = divmod(index, len(values))
            here[name] = values[place]
        return {name: here[name] if name in here else shared[name] for name in self.names}

    def bucket(self, index: int) -> int:
        """Give the bucket of a point.

        Raises:
            IndexError: there is no such point.
        """
        for count, bucket in self.buckets:
            if index < count:
                return bucket
            index -= count
        raise IndexError(index)


def packed(
    points: Sequence[Mapping[str, Any]],
    shared: Mapping[str, Any],
    grid: Mapping[str, Sequence[Any]],
) -> Layout | None:
    """Lay out points by their axes.

    Args:
        points: `params` and `bucket` of each, the grid's last axis varying fastest.
        shared: parameters that the points may share.
        grid: its axes, with as many values as each has.

    Returns:
        The layout; None where it would not give the very same points, or there are few.
    """
    if len(points) < FEWEST:
        return None
    axes, stride = {}, len(points)
    for name, values in grid.items():
        stride //= len(values)
        axes[name] = [points[place * stride]["params"][name] for place in range(len(values))]
    buckets = itertools.groupby(point["bucket"] for point in points)
    layout = Layout(
        names=list(points[0]["params"]),
        axes=axes,
        buckets=[(len([*group]), bucket) for bucket, group in buckets],
    )
    gives = [layout.params(index, shared) for index in range(len(points))]
    same = json.dumps(gives) == json.dumps([point["params"] for point in points])
    return layout if same else None
