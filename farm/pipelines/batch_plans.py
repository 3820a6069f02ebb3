"""The buckets among which a worker's claims choose, for each number of waiting frames."""

from __future__ import annotations

import json
from collections.abc import Mapping

from farm.domain.ladder import fastest_plan, padding_plan
from farm.pipelines.catalog import Pipeline, Step

USABLE = 0.9
"""Share of a device's memory that two batches may take together. The rest is fragmentation."""


def batch_plans(pipeline: Pipeline, too_large: Mapping[str, int] | None = None) -> str:
    """Return the plans for a device without a batch on it.

    Args:
        pipeline: the entry of the catalog.
        too_large: the smallest bucket, by image size, for which this worker's memory was too small.

    Returns:
        JSON: the buckets for 1, 2, … frames, by image size, as pg_temp.claim reads it.
    """
    limits = too_large or {}
    plans = {}
    for size in dict.fromkeys([*pipeline.bucket, *limits]):
        listed = size if size in pipeline.bucket else "default"
        fitting = [step for step in pipeline.steps(listed) if step < limits.get(size, step + 1)]
        plans[size] = _plan(pipeline.measured(listed), fitting or [1])
    return json.dumps(plans)


def plans_for_a_second_batch(
    pipeline: Pipeline, default_size: str, memory_bytes: int, too_large: Mapping[str, int]
) -> str:
    """Return the plans for a batch that interrupts a full one, so that both fit in memory.

    Without measured memory such a batch has one frame.

    Args:
        pipeline: the entry of the catalog.
        default_size: the image size that `default` was measured with, such as `512x512`. Other
            sizes that the bucket table does not list may need more memory.
        memory_bytes: memory of the device that this process may use.
        too_large: see batch_plans.
    """
    measured = {size: pipeline.measured(size) for size in pipeline.bucket}
    peaks = [step.memory_bytes for steps in measured.values() for step in steps.values()]
    plans = {"default": [1]}
    if not all(measured.values()) or not all(peaks):
        return json.dumps(plans)
    room = USABLE * memory_bytes - max(peaks)
    measured.setdefault(default_size, measured.pop("default"))
    for size, steps in measured.items():
        idle = _idle_bytes(steps)
        fitting = [
            frames
            for frames, step in steps.items()
            if step.memory_bytes - idle <= room and frames < too_large.get(size, frames + 1)
        ]
        plans[size] = _plan(steps, fitting or [1])
    return json.dumps(plans)


def _plan(measured: Mapping[int, Step], steps: list[int]) -> list[int]:
    if not measured:
        return padding_plan(steps)
    return fastest_plan({step: measured[step].seconds for step in steps})


def _idle_bytes(steps: Mapping[int, Step]) -> int:
    """Extrapolate the memory in use without a batch, from those of one frame and of two."""
    if 2 not in steps:
        return 0
    return max(0, 2 * steps[1].memory_bytes - steps[2].memory_bytes)
