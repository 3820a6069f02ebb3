"""Workers that are told to stop do so in time. A farm that was killed as a whole recovers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psycopg

from farm.cli.terminal.exit_codes import OK
from tests.acceptance.farms import LiveFarm
from tests.support.cli_runner import farm_process
from tests.support.waiting import wait_until

SLOW: dict[str, Any] = {"prompts": ["noise"], "step_seconds": 0.1}
ENDLESS: dict[str, Any] = {**SLOW, "bucket": 8}


@contextmanager
def worker_process(
    disturbed: LiveFarm, **env: str
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Run another worker of the lane. Return its process and its ID."""
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


def listed(disturbed: LiveFarm) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = disturbed.get("/v1/workers")["data"]
    return rows


def renders(disturbed: LiveFarm, worker_id: str) -> bool:
    found = [row for row in listed(disturbed) if row["id"] == worker_id]
    return bool(found and found[0]["batch"] and found[0]["batch"]["step"])


def both_busy(disturbed: LiveFarm, worker_id: str) -> list[str]:
    """Give every worker of the lane a batch that would take minutes. Return the jobs."""
    # Different steps, so that the jobs do not share a batch.
    jobs = [disturbed.submit(**ENDLESS, steps=steps, max_attempts=1)["id"] for steps in (1000, 999)]
    wait_until(lambda: renders(disturbed, worker_id), 60.0, "the second worker rendered")
    return jobs


def over(disturbed: LiveFarm, jobs: list[str]) -> None:
    for job_id in jobs:
        disturbed.client.post(f"/v1/jobs/{job_id}/cancel")


def test_a_worker_drained_from_afar_finishes_and_leaves(disturbed: LiveFarm) -> None:
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
    # Frames that it had claimed ahead were released; frames that it had begun were not.
    earlier = [attempt for frame in frames for attempt in frame["attempts"]]
    assert {attempt["reason"] for attempt in earlier} <= {"released"}
    assert len(earlier) in (0, 4)
    assert name in {frame["worker"] for frame in frames}  # its last batch was finished
    refused = disturbed.client.post(f"/v1/workers/{worker_id}/drain")
    assert refused.status_code == 404
    assert worker_id in refused.json()["detail"]


def test_a_second_sigterm_gives_the_batch_back_at_once(disturbed: LiveFarm) -> None:
    with worker_process(disturbed) as (process, worker_id):
        jobs = both_busy(disturbed, worker_id)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: draining(disturbed, worker_id), 30.0, "it drained")
        assert process.poll() is None  # it would finish its batch
        process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        assert process.wait(60) == 0
        assert time.monotonic() - started < 25
    given_back(disturbed, jobs)


def draining(disturbed: LiveFarm, worker_id: str) -> bool:
    return any(row["draining"] for row in listed(disturbed) if row["id"] == worker_id)


def given_back(disturbed: LiveFarm, jobs: list[str]) -> None:
    """Check that one frame was requeued uncharged, and that another worker may claim it."""
    frames = [frame for job_id in jobs for frame in disturbed.frames(job_id)]
    reasons = [attempt["reason"] for frame in frames for attempt in frame["attempts"]]
    over(disturbed, jobs)
    assert reasons == ["released"]
    assert {frame["state"] for frame in frames} <= {"ready", "running"}  # none is dead


def test_a_grace_that_ends_gives_the_batch_back(disturbed: LiveFarm) -> None:
    with worker_process(disturbed, FARM_GRACE_SECONDS="10") as (process, worker_id):
        jobs = both_busy(disturbed, worker_id)
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert 4 < time.monotonic() - started < 25
    given_back(disturbed, jobs)


def test_a_grace_holds_while_postgres_does_not_answer(disturbed: LiveFarm) -> None:
    with (
        worker_process(disturbed, FARM_GRACE_SECONDS="10") as (process, worker_id),
        psycopg.connect(disturbed.farm.env["FARM_DATABASE_URL"]) as connection,
    ):
        jobs = both_busy(disturbed, worker_id)
        # The next heartbeat waits for this lock until its statement is cancelled, after 30 s.
        connection.execute("SELECT FROM workers WHERE id = %s FOR UPDATE", (worker_id,))
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert time.monotonic() - started < 25
    over(disturbed, jobs)


def test_a_farm_killed_whole_goes_on_where_it_was(
    disturbed: LiveFarm, half_done: Sequence[str]
) -> None:
    """This folder's farm started on the data of a farm whose processes were all killed."""
    listed_now = disturbed.get("/v1/jobs", limit=200)["data"]
    assert {job["id"] for job in listed_now} >= {*half_done}
    for job_id in half_done:
        assert disturbed.ended(job_id)["status"] == "succeeded"
