"""Ladders: the buckets among which a claim chooses, and its choice for each number of frames.

Only frames whose job left its bucket open have such a choice: see `spec.FullSpec.repeatable`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def powers_up_to(most: int) -> list[int]:
    """Return the steps of a ladder without measurements: powers of two below `most`, and `most`."""
    return [*(2**power for power in range(most.bit_length()) if 2**power < most), most]


def padding_plan(steps: Sequence[int]) -> list[int]:
    """Return the bucket for 1, 2, … frames if no times are known: the smallest that holds all."""
    return [min(step for step in steps if step >= frames) for frames in range(1, max(steps) + 1)]


def fastest_plan(seconds: Mapping[int, float]) -> list[int]:
    """Return the bucket for 1, 2, … frames with which all of them are finished soonest.

    A bucket that is larger than the number of frames is padded. A smaller one leaves frames to the
    next batch. Of two that are equally fast, the larger one comes first: it ends more frames.

    Args:
        seconds: time of a batch by bucket. Bucket 1 must be included.
    """
    whole = [0.0]
    plan: list[int] = []
    for frames in range(1, max(seconds) + 1):
        costs = {step: time + whole[max(0, frames - step)] for step, time in seconds.items()}
        best = min(costs, key=lambda step: (costs[step], -step))
        whole.append(costs[best])
        plan.append(best)
    return plan
