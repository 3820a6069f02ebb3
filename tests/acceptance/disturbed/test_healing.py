"""Workers that are asked to leave do, and in time; a farm that was killed whole goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from farm.cli.exits import OK
from farm.envfile import load_env
from tests.acceptance.farms import ENDED, QUICK, Live, null_catalog
from tests.commanding import farm_process
from tests.waiting import wait_until

SLOW: dict[str, Any] = {"prompts": ["noise"], "step_seconds": 0.1}
ENDLESS: dict[str, Any] = {**SLOW, "bucket": 8}


@contextmanager
def worker_process(disturbed: Live, **env: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Run another worker of the lane; gives its process and its id."""
    one = {"OMP_NUM_THREADS": "1", "FARM_TORCH_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "farm.cli", "worker", "null"],
        env={**os.environ, **disturbed.farm.env, **one, **env},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:

        def idle() -> str | None:
            found = [row for row in listed(disturbed) if row["pid"] == process.pid]
            return str(found[0]["id"]) if found and found[0]["state"] == "idle" else None

        worker_id = wait_until(idle, 60.0, "the second worker was ready")
        assert worker_id is not None
        yield process, worker_id
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def listed(disturbed: Live) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = disturbed.get("/v1/workers")["data"]
    return rows


def renders(disturbed: Live, worker_id: str) -> bool:
    found = [row for row in listed(disturbed) if row["id"] == worker_id]
    return bool(found and found[0]["batch"] and found[0]["batch"]["step"])


def both_busy(disturbed: Live, worker_id: str) -> list[str]:
    """Give every worker of the lane a batch that would take minutes; returns the jobs."""
    # Not the same steps: else both would ride in one batch.
    jobs = [disturbed.submit(**ENDLESS, steps=steps, max_attempts=1)["id"] for steps in (1000, 999)]
    wait_until(lambda: renders(disturbed, worker_id), 60.0, "the second worker rendered")
    return jobs


def over(disturbed: Live, jobs: list[str]) -> None:
    for job_id in jobs:
        disturbed.client.post(f"/v1/jobs/{job_id}/cancel")


def test_a_worker_drained_from_afar_finishes_and_leaves(disturbed: Live) -> None:
    with worker_process(disturbed) as (process, worker_id):
        job = disturbed.submit(**SLOW, images_per_prompt=48, steps=8, bucket=4, max_attempts=1)
        wait_until(lambda: renders(disturbed, worker_id), 60.0, "the second worker rendered")
        name = next(row["name"] for row in listed(disturbed) if row["id"] == worker_id)
        env = {**disturbed.farm.env, "FARM_API_KEY": disturbed.farm.api_key}
        drained = farm_process("workers", "drain", name, "--json", env=env)
        assert drained.code == OK
        assert drained.json["draining"] is True
        assert process.wait(60) == 0
        assert worker_id not in [row["id"] for row in listed(disturbed)]
    assert disturbed.ended(job["id"])["status"] == "succeeded"
    frames = disturbed.frames(job["id"])
    # What it had claimed ahead was given back; nothing that it had begun was.
    earlier = [attempt for frame in frames for attempt in frame["attempts"]]
    assert {attempt["reason"] for attempt in earlier} <= {"released"}
    assert len(earlier) in (0, 4)
    assert name in {frame["worker"] for frame in frames}  # its last batch was finished
    refused = disturbed.client.post(f"/v1/workers/{worker_id}/drain")
    assert refused.status_code == 404
    assert worker_id in refused.json()["detail"]


def test_a_second_sigterm_gives_the_batch_back_at_once(disturbed: Live) -> None:
    with worker_process(disturbed) as (process, worker_id):
        jobs = both_busy(disturbed, worker_id)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: draining(disturbed, worker_id), 30.0, "it drained")
        assert process.poll() is None  # it would finish its batch
        process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        assert process.wait(30) == 0
        assert time.monotonic() - started < 10
    given_back(disturbed, jobs)


def draining(disturbed: Live, worker_id: str) -> bool:
    return any(row["draining"] for row in listed(disturbed) if row["id"] == worker_id)


def given_back(disturbed: Live, jobs: list[str]) -> None:
    """Check that one frame was returned, at no charge, and that another worker may take it."""
    frames = [frame for job_id in jobs for frame in disturbed.frames(job_id)]
    reasons = [attempt["reason"] for frame in frames for attempt in frame["attempts"]]
    over(disturbed, jobs)
    assert reasons == ["released"]
    assert {frame["state"] for frame in frames} <= {"ready", "running"}  # none is dead


def test_a_grace_that_ends_gives_the_batch_back(disturbed: Live) -> None:
    with worker_process(disturbed, FARM_GRACE_SECONDS="10") as (process, worker_id):
        jobs = both_busy(disturbed, worker_id)
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert 4 < time.monotonic() - started < 10
    given_back(disturbed, jobs)


def descendants(pid: int) -> list[int]:
    """Every process below one, itself first."""
    listing = subprocess.run(
        ["ps", "--no-headers", "-e", "-o", "pid,ppid"], capture_output=True, text=True, check=True
    ).stdout.split()
    parents = dict(zip(map(int, listing[::2]), map(int, listing[1::2]), strict=True))
    found = [pid]
    for parent in found:
        found += [child for child, of in parents.items() if of == parent]
    return found


@contextmanager
def farm_up(data: Path, catalog: Path) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    """Run `farm up` on a folder, in a process of its own, until it is ready."""
    places = ["--data", str(data), "--pipelines", str(catalog)]
    process = subprocess.Popen(
        [sys.executable, "-m", "farm.cli", "up", "--port", "0", *places],
        env={**os.environ, **QUICK},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert process.stdout is not None
        assert any(b"Farm is ready" in line for line in process.stdout)
        headers = {"Authorization": f"Bearer {(data / 'api-key').read_text().strip()}"}
        with httpx.Client(
            base_url=load_env(data)["FARM_API_URL"], headers=headers, timeout=30
        ) as client:
            yield process, client
    finally:
        process.terminate()
        process.communicate(timeout=60)


def test_a_farm_killed_whole_goes_on_where_it_was(tmp_path: Path) -> None:
    data, catalog = tmp_path / "data", null_catalog(tmp_path)
    body = {**SLOW, "pipeline": "null", "images_per_prompt": 8, "bucket": 8}
    with farm_up(data, catalog) as (process, client):
        answers = [client.post("/v1/jobs", json=body).raise_for_status() for _ in range(4)]
        jobs = [answer.json()["id"] for answer in answers]

        def some_done() -> bool:
            found = [client.get(f"/v1/jobs/{job_id}").json() for job_id in jobs]
            return any(job["counts"]["succeeded"] for job in found)

        wait_until(some_done, 120.0, "some frames were done")
        process.send_signal(signal.SIGSTOP)  # it is to start nothing again meanwhile
        for pid in reversed(descendants(process.pid)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
    with farm_up(data, catalog) as (_, client):
        listed_now = client.get("/v1/jobs", params={"limit": 200}).json()["data"]
        assert {job["id"] for job in listed_now} >= set(jobs)

        def all_ended() -> bool:
            found = [client.get(f"/v1/jobs/{job_id}").json() for job_id in jobs]
            return all(job["status"] in ENDED for job in found)

        wait_until(all_ended, 180.0, "every job ended")
        for job_id in jobs:
            assert client.get(f"/v1/jobs/{job_id}").json()["status"] == "succeeded"
