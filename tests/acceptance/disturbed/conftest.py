"""One farm for the tests of this folder, which stop and kill its processes.

It is started twice. All processes of the first start are killed during jobs; the second continues.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from farm.config import load_env
from tests.acceptance.farms import QUICK, LiveFarm, null_catalog, running
from tests.support.waiting import wait_until

SLOW_JOB = {
    "pipeline": "null",
    "prompts": ["noise"],
    "images_per_prompt": 8,
    "bucket": 8,
    "steps": 10,
    "step_seconds": 0.1,
}


@dataclass(frozen=True)
class Killed:
    """A farm whose processes were all killed: its folder and its jobs."""

    data: Path
    catalog: Path
    job_ids: Sequence[str]


@pytest.fixture(scope="package")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    folder = tmp_path_factory.mktemp("disturbed")
    data, catalog = folder / "farm", null_catalog(folder)
    with farm_up(data, catalog) as (process, client):
        answers = [client.post("/v1/jobs", json=SLOW_JOB).raise_for_status() for _ in range(4)]
        job_ids = [answer.json()["id"] for answer in answers]

        def some_done() -> bool:
            found = [client.get(f"/v1/jobs/{job_id}").json() for job_id in job_ids]
            return any(job["counts"]["succeeded"] for job in found)

        wait_until(some_done, 120.0, "some frames were done")
        process.send_signal(signal.SIGSTOP)  # it must restart nothing during this
        for pid in reversed(descendants(process.pid)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
    return Killed(data, catalog, job_ids)


@pytest.fixture(scope="package")
def half_done(killed: Killed) -> Sequence[str]:
    """Return the jobs that were half done when everything was killed."""
    return killed.job_ids


@pytest.fixture(scope="package")
def disturbed(killed: Killed) -> Iterator[LiveFarm]:
    """Run a farm with a pipeline that loads at once and only waits in each step."""
    with running(killed.data, "null", killed.catalog) as farm:
        yield farm


def descendants(pid: int) -> list[int]:
    """List a process and all its descendants."""
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
    """Run `farm up` on a folder in a separate process. Return when it is ready."""
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
