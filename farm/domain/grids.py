"""Compact storage of a grid's points: shared parameters once, and the values of each axis.

Without it, a grid of 1,000 points would store a long negative prompt 1,000 times.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import TypedDict

from pydantic import BaseModel, ConfigDict

FEWEST = 8
"""Minimum number of points for a layout. Smaller grids are stored point by point."""


class StoredPoint(TypedDict):
    """Point of a grid as JSON."""

    params: dict[str, object]
    bucket: int


class Layout(BaseModel):
    """Points of a grid, described by its axes. The last axis varies fastest."""

    model_config = ConfigDict(frozen=True)

    names: list[str]
    """Names of the parameters, in the order of an image's metadata text."""
    axes: dict[str, list[object]]
    buckets: list[tuple[int, int]]
    """Buckets of consecutive points: (number of points, bucket)."""

    def __len__(self) -> int:
        """Count the points."""
        return math.prod(map(len, self.axes.values()))

    def params(self, index: int, shared: Mapping[str, object]) -> dict[str, object]:
        """Return the parameters of a point, including the shared ones."""
        here = {}
        for name, values in reversed(self.axes.items()):
            index, place = divmod(index, len(values))
            here[name] = values[place]
        return {name: here[name] if name in here else shared[name] for name in self.names}

    def bucket(self, index: int) -> int:
        """Return the bucket of a point.

        Raises:
            IndexError: there is no such point.
        """
        for count, bucket in self.buckets:
            if index < count:
                return bucket
            index -= count
        raise IndexError(index)


class Listed(BaseModel):
    """Points that are no grid: the values that are not shared, one by one."""

    model_config = ConfigDict(frozen=True)

    names: list[str]
    """Names of the parameters, in the order of an image's metadata text."""
    each: list[tuple[dict[str, object], int]]
    """For each point the values of parameters that are not shared, and its bucket."""

    def __len__(self) -> int:
        """Count the points."""
        return len(self.each)

    def params(self, index: int, shared: Mapping[str, object]) -> dict[str, object]:
        """Return the parameters of a point, including the shared ones."""
        here = self.each[index][0]
        return {name: here[name] if name in here else shared[name] for name in self.names}

    def bucket(self, index: int) -> int:
        """Return the bucket of a point."""
        return self.each[index][1]


def listed(points: Sequence[StoredPoint], shared: Mapping[str, object]) -> Listed | None:
    """List points without the parameters that they share.

    Returns:
        The list. None if it would not reproduce the same points.
    """
    own = [
        {name: value for name, value in point["params"].items() if name not in shared}
        for point in points
    ]
    buckets = [point["bucket"] for point in points]
    found = Listed(names=list(points[0]["params"]), each=[*zip(own, buckets, strict=True)])
    gives = [found.params(index, shared) for index in range(len(points))]
    same = json.dumps(gives) == json.dumps([point["params"] for point in points])
    return found if same else None


def packed(
    points: Sequence[StoredPoint],
    shared: Mapping[str, object],
    grid: Mapping[str, Sequence[object]],
) -> Layout | None:
    """Build the layout of points.

    Args:
        points: the points; the grid's last axis varies fastest.
        shared: parameters that the points may share.
        grid: axes of the grid, each with its values.

    Returns:
        The layout. None if it would not reproduce the same points.
    """
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
