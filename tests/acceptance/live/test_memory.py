"""A worker's memory does not grow in a long run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.farms import LiveFarm

PROC = Path("/proc")
WIDTHS = [64, 72, 80, 96, 128]
FRAMES = 50
"""Frames of a job: a full batch of each width for each of two prompts."""
JOBS = 10
MOST = 1.05
"""Maximum memory, as a multiple of the memory after the first job. Measured: within 1.02.

The first job already has every size.
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (PROC / "self/status").exists(), reason="there is no /proc"),
]


def test_five_hundred_frames_of_mixed_sizes_take_no_more_memory_than_fifty(live: LiveFarm) -> None:
    seen = []
    for number in range(JOBS):
        job = live.ended(live.submit(**mixed(number))["id"])
        assert job["counts"]["succeeded"] == FRAMES
        seen.append((child_of(live), resident(child_of(live))))
    assert len({pid for pid, _ in seen}) == 1, "the child was replaced during the test"
    sizes = [size for _, size in seen]
    assert sizes[-1] <= MOST * sizes[0], f"bytes after each {FRAMES} frames: {sizes}"


def mixed(number: int) -> dict[str, Any]:
    """Build a job of every size, with prompts that no other job has."""
    return {
        "prompts": [f"a red star, number {number}", f"ring number {number}"],
        "images_per_prompt": 5,
        "bucket": 4,
        "grid": {"width": WIDTHS},
        "steps": 1,
        "seed": number,
    }


def child_of(live: LiveFarm) -> int:
    """Return the process that owns the demo worker's pipeline."""
    worker = next(row for row in live.get("/v1/workers")["data"] if row["pipeline"] == "demo")
    [child] = [
        pid
        for pid in children(worker["pid"])
        if b"spawn_main" in (PROC / str(pid) / "cmdline").read_bytes()
    ]
    return child


def children(pid: int) -> Iterator[int]:
    for thread in (PROC / str(pid) / "task").iterdir():
        yield from map(int, (thread / "children").read_text().split())


def resident(pid: int) -> int:
    """Return a process's resident memory, in bytes."""
    lines = (PROC / str(pid) / "status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith("VmRSS:")]
    return int(line.split()[1]) * 1024
