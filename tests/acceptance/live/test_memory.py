"""A worker that renders for long does not grow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.farms import LiveFarm

PROC = Path("/proc")
WIDTHS = [64, 72, 80, 96, 128]
FRAMES = 50
"""of a job: a full batch of each width for each of two prompts"""
JOBS = 10
MOST = 1.05
"""Of the memory after the first job, when every size has been met. Measured: within 1.02."""

pytestmark = pytest.mark.skipif(not (PROC / "self/status").exists(), reason="there is no /proc")


def test_five_hundred_frames_of_mixed_sizes_take_no_more_memory_than_fifty(live: LiveFarm) -> None:
    seen = []
    for number in range(JOBS):
        job = live.ended(live.submit(**mixed(number))["id"])
        assert job["counts"]["succeeded"] == FRAMES
        seen.append((child_of(live), resident(child_of(live))))
    assert len({pid for pid, _ in seen}) == 1, "the child was replaced meanwhile"
    sizes = [size for _, size in seen]
    assert sizes[-1] <= MOST * sizes[0], f"bytes after each {FRAMES} frames: {sizes}"


def mixed(number: int) -> dict[str, Any]:
    """A job of prompts that no other has, in every size."""
    return {
        "prompts": [f"a red star, number {number}", f"ring number {number}"],
        "images_per_prompt": 5,
        "bucket": 5,
        "grid": {"width": WIDTHS},
        "steps": 1,
        "seed": number,
    }


def child_of(live: LiveFarm) -> int:
    """The process that owns the demo worker's pipeline."""
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
    """Bytes of a process that are in memory now."""
    lines = (PROC / str(pid) / "status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith("VmRSS:")]
    return int(line.split()[1]) * 1024
