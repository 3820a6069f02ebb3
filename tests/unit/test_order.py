"""The order of claims of a job whose lines have different settings."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farm.domain.groups import LONGEST, PLACES_OF_CHUNK, SHORTEST, Order, ordered


def order_of(keys: list[int], images: int = 1, number: int | None = None, bucket: int = 8) -> Order:
    """Order places whose keys are given."""
    found = np.array(keys)
    return ordered(len(keys), images, bucket, number or max(keys) + 1, lambda a, b: found[a:b])


def ordinals(order: Order) -> list[int]:
    """List the ordinals in the order of claims."""
    return [
        int(place) * order.images + image
        for _, places in order.chunks()
        for place in places
        for image in range(order.images)
    ]


def test_places_of_a_key_stand_together_in_the_order_of_the_file() -> None:
    order = order_of([0, 1, 0, 2, 1, 0])
    assert ordinals(order) == [0, 2, 5, 1, 4, 3]
    assert [(group.first, group.stop, group.run) for group in order.groups] == [
        (0, 3, 0),
        (3, 5, 1),
        (5, 6, 2),
    ]


def test_the_first_frame_of_a_job_is_claimed_first() -> None:
    assert ordinals(order_of([2, 0, 1, 2]))[:2] == [0, 3]


def test_images_of_a_place_stay_together() -> None:
    order = order_of([0, 1, 0], images=2)
    assert ordinals(order) == [0, 1, 4, 5, 2, 3]
    assert (order.longest(2), order.totals(2)) == ([4, 2], [4, 2])


def test_groups_end_with_their_stretch() -> None:
    order = order_of([number % 2 for number in range(SHORTEST + 4)])
    assert order.stretch == SHORTEST
    assert [(group.first, group.stop) for group in order.groups] == [
        (0, SHORTEST // 2),
        (SHORTEST // 2, SHORTEST),
        (SHORTEST, SHORTEST + 2),
        (SHORTEST + 2, SHORTEST + 4),
    ]


@pytest.mark.parametrize(
    ("keys", "bucket", "places"),
    [(1, 8, SHORTEST), (100, 8, 12_800), (40, 64, 40_960), (999, 8, LONGEST)],
)
def test_a_stretch_is_longer_if_there_are_many_keys_or_large_batches(
    keys: int, bucket: int, places: int
) -> None:
    assert order_of([0], number=keys, bucket=bucket).stretch == places
    assert order_of([0], 4, keys, bucket).stretch == places
    assert order_of([0], 3 * LONGEST, keys, bucket).stretch == 3 * LONGEST, "one place at least"


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=50).map(lambda keys: keys * 300),
    st.integers(1, 3),
)
def test_every_frame_is_claimed_once_and_with_its_key(keys: list[int], images: int) -> None:
    order = order_of(keys, images, number=6)
    claimed = ordinals(order)
    assert sorted(claimed) == [*range(len(keys) * images)]
    assert [group.first for group in order.groups[1:]] == [
        group.stop for group in order.groups[:-1]
    ]
    for group in order.groups:
        assert {keys[at // images] for at in claimed[group.first : group.stop]} == {group.run}
    for number in range(0, len(claimed), order.stretch):
        stretch = claimed[number : number + order.stretch]
        assert (min(stretch), max(stretch)) == (number, number + len(stretch) - 1)
    assert all(len(places) <= PLACES_OF_CHUNK for _, places in order.chunks())
