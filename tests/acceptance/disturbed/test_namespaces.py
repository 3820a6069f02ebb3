"""Workers in containers of one machine: each counts its processes from 1."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.acceptance.farms import LiveFarm
from tests.support.waiting import wait_until

CONTAINER = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
LONG: dict[str, Any] = {
    "prompts": [f"noise {number}" for number in range(60)],
    "images_per_prompt": 4,
    "bucket": 4,
    "steps": 4,
    "step_seconds": 0.05,
    "width": 16,
    "height": 16,
}


def has_namespaces() -> bool:
    try:
        return (
            subprocess.run([*CONTAINER, "true"], check=False, capture_output=True).returncode == 0
        )
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not has_namespaces(), reason="this user may not create a PID namespace")
def test_equal_process_ids_never_return_the_frames_of_another_worker(disturbed: LiveFarm) -> None:
    with ExitStack() as stack:
        outer = [stack.enter_context(contained_worker(disturbed)) for _ in range(2)]
        names = contained(disturbed)
        job_id = disturbed.submit(**LONG)["id"]
        pids = wait_until(lambda: holding(disturbed, names), 60, "both hold a batch")
        assert pids is not None
        assert pids[0] == pids[1], "both children have the same process ID"
        os.kill(child_of(outer[0].pid), signal.SIGKILL)
        assert disturbed.ended(job_id)["status"] == "succeeded"
        frames = disturbed.frames(job_id)
    lost = [attempt for frame in frames for attempt in frame["attempts"]]
    # It also gave back the batch that it claimed ahead, and one that was still being stored.
    assert 1 <= len(lost) <= 3 * 4
    denoised = [each for each in lost if "was not being denoised" not in each["message"]]
    assert len(denoised) <= 4, "one batch at most was on the device"
    assert {attempt["reason"] for attempt in lost} == {"worker_lost"}
    assert len({attempt["worker"] for attempt in lost}) == 1


@contextmanager
def contained_worker(disturbed: LiveFarm) -> Iterator[subprocess.Popen[bytes]]:
    env = {**os.environ, **disturbed.farm.env, "OMP_NUM_THREADS": "1", "FARM_TORCH_THREADS": "1"}
    process = subprocess.Popen(
        [*CONTAINER, sys.executable, "-m", "farm.cli", "worker", "null"], env=env
    )
    try:
        yield process
    finally:
        for pid in children(process.pid):  # `unshare` does not pass the signal on
            os.kill(pid, signal.SIGTERM)
        assert process.wait(60) == 0, "it drains, and ends in order"


def contained(disturbed: LiveFarm) -> list[str]:
    """Wait for both workers. Return their names; both have process 1 as their parent."""

    def found() -> list[str] | None:
        rows = disturbed.get("/v1/workers")["data"]
        names = [row["name"] for row in rows if row["pid"] == 1 and row["state"] == "idle"]
        return names if len(names) == 2 else None

    names = wait_until(found, 60, "both workers are idle")
    assert names is not None
    return names


def holding(disturbed: LiveFarm, names: list[str]) -> list[int] | None:
    """Return the process IDs of the children that hold leases, once both workers do."""
    with psycopg.connect(disturbed.farm.servers.database_url) as connection:
        rows = connection.execute(
            "SELECT DISTINCT w.name, l.pid FROM leases l JOIN workers w ON w.id = l.worker_id"
            " WHERE w.name = ANY(%s)",
            [names],
        ).fetchall()
    return [pid for _, pid in rows] if len(rows) == 2 else None


def child_of(outer: int) -> int:
    """Return the render process of a contained worker, as this namespace counts."""
    [worker] = children(outer)
    [child] = [
        pid
        for pid in children(worker)
        if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    return child


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(word) for task in tasks for word in (task / "children").read_text().split()]
