"""Processes die during a job. The job ends as without the fault, and its events record it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest

from tests.acceptance.farms import LiveFarm
from tests.support.waiting import wait_until

FRAMES = 16
LONG: dict[str, Any] = {
    "prompts": ["noise"],
    "images_per_prompt": FRAMES,
    "seed": 5,
    "steps": 12,
    "step_seconds": 0.08,
    "bucket": 4,
}
"""A job of four batches of one second each."""


def parent_of(disturbed: LiveFarm) -> int:
    pid = disturbed.farm.children["worker null-1"].pid
    assert pid is not None
    return pid


def child_of(pid: int) -> int:
    """Return the worker's spawned child, the process that owns the device."""
    listing = subprocess.run(
        ["ps", "--no-headers", "-o", "pid,args", "--ppid", str(pid)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    spawned = [
        line
        for line in listing
        if "billiard.spawn" in line and "tracker" not in line.split("spawn_main")[0]
    ]
    assert len(spawned) == 1, listing
    return int(spawned[0].split()[0])


def all_succeeded_once(disturbed: LiveFarm, job_id: str) -> list[dict[str, Any]]:
    """Compare the job's end with the database, and its pictures with the storage."""
    job = disturbed.ended(job_id, 180.0)
    assert job["status"] == "succeeded", job
    frames = disturbed.frames(job_id)
    assert [frame["state"] for frame in frames] == ["succeeded"] * FRAMES
    with psycopg.connect(disturbed.farm.servers.database_url) as connection:
        rows = connection.execute(
            "SELECT item ->> 0, count(*) FROM events, jsonb_array_elements(data -> 'frames') item"
            " WHERE job_id = %s AND kind = 'frames.succeeded' GROUP BY 1",
            [job_id],
        ).fetchall()
    assert sorted(int(ordinal) for ordinal, _ in rows) == list(range(FRAMES))
    assert {count for _, count in rows} == {1}
    return frames


def reasons(frames: list[dict[str, Any]]) -> set[str]:
    return {attempt["reason"] for frame in frames for attempt in frame["attempts"]}


def was_denoised(attempt: dict[str, Any]) -> bool:
    return "was not being denoised" not in attempt["message"]


def test_the_child_is_killed(disturbed: LiveFarm) -> None:
    job_id = disturbed.submit(**LONG)["id"]
    disturbed.halfway(job_id)
    parent = parent_of(disturbed)
    os.kill(child_of(parent), signal.SIGKILL)
    frames = all_succeeded_once(disturbed, job_id)
    assert reasons(frames) == {"worker_lost"}
    lost = [frame for frame in frames if frame["attempts"]]
    assert 1 <= len(lost) <= 3 * 4, "also the batch claimed ahead, and one that was being stored"
    assert len([each for each in lost if was_denoised(each["attempts"][0])]) <= 4
    assert all(frame["attempt"] == 2 for frame in lost)
    assert "SIGKILL" in lost[0]["attempts"][0]["message"]
    assert disturbed.farm.children["worker null-1"].pid == parent


def test_the_parent_is_killed(disturbed: LiveFarm) -> None:
    job_id = disturbed.submit(**LONG)["id"]
    disturbed.halfway(job_id)
    parent = parent_of(disturbed)
    child = child_of(parent)
    os.kill(parent, signal.SIGKILL)
    frames = all_succeeded_once(disturbed, job_id)
    assert reasons(frames) == {"lease_expired"}
    assert disturbed.farm.children["worker null-1"].pid != parent
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_valkey_is_killed_with_its_data(disturbed: LiveFarm) -> None:
    job_id = disturbed.submit(**LONG)["id"]
    disturbed.halfway(job_id)
    valkey = disturbed.farm.servers.valkey
    before = valkey.restarts
    data = disturbed.farm.data / "valkey"
    assert data.is_dir()
    for path in sorted(data.rglob("*"), reverse=True):
        if path.is_file() and path.suffix in {".aof", ".rdb", ".manifest"}:
            path.unlink()
    valkey.kill()
    second = disturbed.submit(**LONG)["id"]  # its bell may get lost
    wait_until(lambda: valkey.restarts > before, 30.0, "Valkey was started again")
    assert reasons(all_succeeded_once(disturbed, job_id)) == set()
    assert reasons(all_succeeded_once(disturbed, second)) == set()


@contextmanager
def another_worker(disturbed: LiveFarm) -> Iterator[subprocess.Popen[bytes]]:
    env = {**os.environ, **disturbed.farm.env, "OMP_NUM_THREADS": "1", "FARM_TORCH_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "farm.cli", "worker", "null"],
        env=env,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGCONT)
        process.terminate()
        process.wait(60)


def test_a_stopped_worker_comes_back_too_late(disturbed: LiveFarm) -> None:
    """Its lease expires, another worker renders the frames, and its late result is dropped."""
    with another_worker(disturbed) as process:

        def seen() -> dict[str, Any]:
            workers = disturbed.get("/v1/workers")["data"]
            found = [row for row in workers if row["pid"] == process.pid]
            return found[0] if found else {"state": "unknown", "batch": None}

        wait_until(lambda: seen()["state"] == "idle", 60.0, "the second worker was ready")
        job_id = disturbed.submit(**LONG)["id"]
        wait_until(lambda: seen()["batch"], 60.0, "the second worker held a lease")
        name = seen()["name"]
        os.killpg(process.pid, signal.SIGSTOP)
        frames = all_succeeded_once(disturbed, job_id)
        lost = [frame for frame in frames if frame["attempts"]]
        assert reasons(frames) == {"lease_expired"}
        assert {row["worker"] for frame in lost for row in frame["attempts"]} == {name}
        assert all(frame["worker"] != name for frame in lost)

        os.killpg(process.pid, signal.SIGCONT)
        after = disturbed.ended(disturbed.submit(**LONG)["id"], 180.0)
        assert after["status"] == "succeeded"
        assert disturbed.frames(job_id) == frames


def test_sigterm_finishes_the_batch_and_leaves(disturbed: LiveFarm) -> None:
    job_id = disturbed.submit(**LONG)["id"]
    disturbed.halfway(job_id)
    worker = disturbed.farm.children["worker null-1"]
    before = worker.restarts
    worker.signal(signal.SIGTERM)
    wait_until(lambda: worker.restarts > before, 60.0, "the worker left and was started again")
    assert reasons(all_succeeded_once(disturbed, job_id)) == set()


def test_an_idle_worker_finds_work_while_redis_is_silent(disturbed: LiveFarm) -> None:
    def idle() -> bool:
        return all(worker["state"] == "idle" for worker in disturbed.get("/v1/workers")["data"])

    wait_until(idle, 60.0, "every worker is idle")
    valkey = disturbed.farm.children["valkey"].pid
    assert valkey is not None
    os.kill(valkey, signal.SIGSTOP)
    try:
        for _ in range(2):  # the second turn meets a child that has already answered a knock
            asked = disturbed.submit(prompts=["noise"], steps=1, priority="interactive")
            assert disturbed.ended(asked["id"], 20.0)["status"] == "succeeded"
    finally:
        os.kill(valkey, signal.SIGCONT)
