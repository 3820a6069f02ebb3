"""The buckets among which a worker's claims choose, for each number of waiting frames."""

from __future__ import annotations

import json
from collections.abc import Mapping

from farm.domain.ladder import fastest_plan, padding_plan
from farm.pipelines.catalog import Pipeline, Step

USABLE = 0.9
"""Share of a device's memory that two batches may take together. The rest is fragmentation."""


def batch_plans(pipeline: Pipeline) -> str:
    """Return the plans for a device without a batch on it.

    Returns:
        JSON: the buckets for 1, 2, … frames, by image size, as pg_temp.claim reads it.
    """
    return json.dumps({size: _plan(pipeline, size) for size in pipeline.bucket})


def plans_for_a_second_batch(pipeline: Pipeline, memory_bytes: int) -> str:
    """Return the plans for a batch that interrupts a full one, so that both fit in memory.

    Without measured memory such a batch has one frame.

    Args:
        pipeline: the entry of the catalog.
        memory_bytes: memory of the device that this process may use.
    """
    measured = [pipeline.measured(size) for size in pipeline.bucket]
    peaks = [step.memory_bytes for steps in measured for step in steps.values()]
    if not all(measured) or not all(peaks):
        return json.dumps({"default": [1]})
    room = USABLE * memory_bytes - max(peaks)
    plans = {}
    for size, steps in zip(pipeline.bucket, measured, strict=True):
        own = {frames: step.memory_bytes - _idle_bytes(steps) for frames, step in steps.items()}
        fitting = [frames for frames in own if own[frames] <= room]
        seconds = {frames: steps[frames].seconds for frames in fitting or [1]}
        plans[size] = fastest_plan(seconds)
    return json.dumps(plans)


def _plan(pipeline: Pipeline, size: str) -> list[int]:
    measured = pipeline.measured(size)
    if not measured:
        return padding_plan(pipeline.steps(size))
    return fastest_plan({frames: step.seconds for frames, step in measured.items()})


def _idle_bytes(steps: Mapping[int, Step]) -> int:
    """Extrapolate the memory in use without a batch, from those of one frame and of two."""
    one, two = steps[1].memory_bytes, steps.get(2, steps[1]).memory_bytes
    return max(0, 2 * one - two)
