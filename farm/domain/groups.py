"""The order in which the frames of a job are claimed whose lines have different settings.

Frames of one batch_key should share batches, wherever their lines are in the file. So the places of
a job are cut into stretches, and within a stretch those with one key are claimed together: a group.
A place is an ordinal divided by `images_per_prompt`. Stretches are claimed in order, so the shards
of a dataset become whole while the job renders.

A position is the number of a frame in the order of claims, from 0. The cursor counts positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SHORTEST, LONGEST = 10_000, 100_000
"""Minimum and maximum number of frames in a stretch."""
BATCHES_OF_GROUP = 16
"""Full batches of a group, on average. Its last batch is short."""
MOST_KEYS, MOST_PLACES = 2**15 - 1, 2**31 - 1
"""Most batch keys and places that the columns of `job_groups` and `job_order` can hold."""
PLACES_OF_CHUNK = 1000
"""Places in a row of `job_order`."""

Places: TypeAlias = "NDArray[np.int32]"


@dataclass(frozen=True)
class Group:
    """Positions whose frames share a batch_key."""

    first: int
    stop: int
    run: int
    """Index of the key in the job's runs."""


@dataclass(frozen=True)
class Order:
    """The groups of a job, in the order of claims. Equal jobs have equal orders."""

    images: int
    """Frames of each place: `images_per_prompt`."""
    stretch: int
    """Frames of a stretch; the last one may have fewer."""
    groups: Sequence[Group]
    places: Sequence[Places]
    """The places of each stretch."""

    def chunks(self) -> Iterator[tuple[int, Places]]:
        """Yield the places in chunks, each with its first position."""
        first = 0
        for places in self.places:
            for start in range(0, len(places), PLACES_OF_CHUNK):
                chunk = places[start : start + PLACES_OF_CHUNK]
                yield first, chunk
                first += len(chunk) * self.images

    def longest(self, runs: int) -> list[int]:
        """Return the number of frames of the longest group of each key."""
        found = [0] * runs
        for group in self.groups:
            found[group.run] = max(found[group.run], group.stop - group.first)
        return found

    def totals(self, runs: int) -> list[int]:
        """Return the number of frames of each key."""
        found = [0] * runs
        for group in self.groups:
            found[group.run] += group.stop - group.first
        return found


def ordered(
    count: int,
    images: int,
    bucket: int,
    keys: int,
    key_of: Callable[[int, int], NDArray[np.int64]],
) -> Order:
    """Form the groups of a job.

    Args:
        count: number of places.
        images: frames of each place.
        bucket: frames of the largest batch.
        keys: number of keys.
        key_of: returns the keys of the places from the first number up to the second one: integers
            from 0 to `keys` - 1.
    """
    import numpy as np

    size = max(1, min(max(SHORTEST, keys * BATCHES_OF_GROUP * bucket), LONGEST) // images)
    groups: list[Group] = []
    stretches: list[Places] = []
    position = 0
    for first in range(0, count, size):
        of_places = key_of(first, min(first + size, count))
        found, seen, sizes = np.unique(of_places, return_index=True, return_counts=True)
        # The key that occurs first is claimed first. So a job's first frame is its first claim.
        rank = np.empty(keys, np.int64)
        in_order = np.argsort(seen)
        rank[found[in_order]] = np.arange(len(found))
        stretches.append((np.argsort(rank[of_places], kind="stable") + first).astype(np.int32))
        for place in in_order:
            stop = position + int(sizes[place]) * images
            groups.append(Group(position, stop, int(found[place])))
            position = stop
    return Order(images, size * images, groups, stretches)
