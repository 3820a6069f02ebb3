"""Ladders: which bucket a batch gets, for each number of waiting frames."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farm.domain.ladder import fastest_plan, padding_plan, powers_up_to
from farm.pipelines.batch_plans import batch_plans, plans_for_a_second_batch
from farm.pipelines.catalog import Pipeline


@pytest.mark.parametrize(
    ("most", "steps"), [(1, [1]), (2, [1, 2]), (8, [1, 2, 4, 8]), (6, [1, 2, 4, 6])]
)
def test_without_measurements_the_steps_are_powers_of_two(most: int, steps: list[int]) -> None:
    assert powers_up_to(most) == steps


def test_without_times_a_batch_is_padded_to_the_next_step() -> None:
    assert padding_plan([1, 2, 4, 6]) == [1, 2, 4, 4, 6, 6]


def test_five_frames_take_eight_or_four_and_then_one() -> None:
    padding_is_cheap = {1: 1.0, 2: 1.2, 4: 1.6, 8: 2.5}
    assert fastest_plan(padding_is_cheap) == [1, 2, 4, 4, 8, 8, 8, 8]
    padding_costs = {1: 1.0, 2: 1.9, 4: 3.6, 8: 7.0}
    assert fastest_plan(padding_costs) == [1, 2, 2, 4, 4, 4, 4, 8]


TIMES = st.floats(0.1, 10.0)


@given(st.dictionaries(st.sampled_from([2, 3, 4, 6, 8]), TIMES), TIMES)
def test_no_other_order_of_batches_is_faster(others: dict[int, float], one: float) -> None:
    """Follow the plan, and compare with every other way of dividing the frames."""
    seconds = {1: one, **others}
    plan = fastest_plan(seconds)
    for frames in range(1, len(plan) + 1):
        left, time = frames, 0.0
        while left > 0:
            time += seconds[plan[left - 1]]
            left -= plan[left - 1]
        ways = itertools.chain.from_iterable(
            itertools.combinations_with_replacement(seconds, count)
            for count in range(1, frames + 1)
        )
        best = min(sum(seconds[step] for step in way) for way in ways if sum(way) >= frames)
        assert time == pytest.approx(best)


def entry(**values: Any) -> Pipeline:
    return Pipeline.model_validate({"source": "y", "bucket": {"default": 2, "64x64": 4}, **values})


MEASURED = [
    {"size": size, "bucket": bucket, "seconds": seconds, "memory_bytes": memory}
    for size, bucket, seconds, memory in (
        ("default", 1, 1.0, 120),
        ("default", 2, 1.5, 140),
        ("64x64", 1, 0.5, 110),
        ("64x64", 2, 0.9, 120),
        ("64x64", 4, 1.9, 140),
        ("64x64", 8, 1.9, 180),  # larger than the bucket: not used
    )
]


def test_each_size_has_a_plan() -> None:
    assert json.loads(batch_plans(entry())) == {"default": [1, 2], "64x64": [1, 2, 4, 4]}
    assert json.loads(batch_plans(entry(ladder=MEASURED))) == {
        "default": [1, 2],
        "64x64": [1, 2, 2, 2],  # two batches of 2 are faster than one of 4
    }


@pytest.mark.parametrize(
    ("memory", "plans"),
    [
        (300, {"default": [1, 2], "64x64": [1, 2, 2, 2]}),
        (195, {"default": [1], "64x64": [1, 2]}),  # 0.9 x 195 - 140: room for 35 more
        (100, {"default": [1], "64x64": [1]}),
    ],
)
def test_a_second_batch_is_no_larger_than_memory_allows(
    memory: int, plans: dict[str, list[int]]
) -> None:
    """A frame of the default size takes 20 bytes here, and one of 64x64 takes 10."""
    found = plans_for_a_second_batch(entry(ladder=MEASURED), "32x32", memory, {})
    # Sizes that are not listed may need more memory than the default one.
    assert json.loads(found) == {"default": [1], "64x64": plans["64x64"], "32x32": plans["default"]}


def test_without_measured_memory_one_frame_is_let_in() -> None:
    assert json.loads(plans_for_a_second_batch(entry(), "32x32", 10**12, {})) == {"default": [1]}


@pytest.mark.parametrize("ladder", [[], MEASURED])
def test_a_bucket_for_which_memory_ran_out_is_in_no_plan(ladder: list[dict[str, Any]]) -> None:
    limits = {"64x64": 2, "128x128": 2}
    plans = json.loads(batch_plans(entry(ladder=ladder), limits))
    assert plans == {"default": [1, 2], "64x64": [1], "128x128": [1]}
    second = json.loads(plans_for_a_second_batch(entry(ladder=ladder), "32x32", 10**12, limits))
    assert second.get("64x64", [1]) == [1]


def test_a_ladder_without_its_top_is_not_used() -> None:
    """Somebody has changed `bucket` since."""
    changed = entry(bucket={"default": 2, "64x64": 3}, ladder=MEASURED)
    assert json.loads(batch_plans(changed)) == {"default": [1, 2], "64x64": [1, 2, 3]}
