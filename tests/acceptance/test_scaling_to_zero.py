"""Workers are started and stopped as KEDA would do it: by the chart's query, down to none.

The simulation does what KEDA and its autoscaler do: it asks the query at each interval, goes from
no worker to one by itself, adds what is missing, and stops one at a time, with SIGTERM. It chooses
at random whom it stops, busy or not.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
import pytest

from farm.config import Settings
from farm.context import Farm, open_farm
from farm.pipelines.families.null import write_checkpoint
from farm.services.audit import audited
from tests.helm.charts import by_kind, objects
from tests.integration.test_migrations import env_of
from tests.support.store import sql, submit
from tests.support.waiting import wait_until

pytestmark = pytest.mark.slow

POLL_SECONDS = 1.0
COOLDOWN_SECONDS = 4.0
WINDOW_SECONDS = 3.0
"""Time over which the greatest wish counts before a worker is stopped."""
MOST = 4
DRAIN_SECONDS = 4
"""Time in which the waiting work shall be done."""


@dataclass
class Worker:
    """A worker process, with the folder of its signs of life."""

    process: subprocess.Popen[bytes]
    run_dir: Path
    started: float = field(default_factory=time.monotonic)
    ready: float | None = None
    """Time at which it had loaded its pipeline."""


class Scaler(threading.Thread):
    """KEDA and its autoscaler, for one lane."""

    def __init__(self, url: str, env: Mapping[str, str], folder: Path) -> None:
        super().__init__(name="scaler")
        self._url, self._env, self._folder = url, env, folder
        self._drawn = random.Random(7)
        self._stop_asked = threading.Event()
        self.workers: list[Worker] = []
        """Workers that were not told to stop."""
        self.stopped: list[Worker] = []
        self.most = 0
        """Greatest number of workers at once."""

    def run(self) -> None:
        wishes: deque[tuple[float, int]] = deque()
        active_at = float("-inf")
        with psycopg.connect(self._url, autocommit=True) as connection:
            while not self._stop_asked.wait(POLL_SECONDS):
                [value] = connection.execute(query()).fetchone() or [0]
                now, wish = time.monotonic(), min(int(value), MOST)
                wishes.append((now, wish))
                while wishes[0][0] < now - WINDOW_SECONDS:
                    wishes.popleft()
                if wish > 0:
                    active_at = now
                if now - active_at > COOLDOWN_SECONDS:
                    while self.workers:
                        self._end_one()
                elif wish > len(self.workers):
                    self._start(wish - len(self.workers) if self.workers else 1)
                elif max(1, *(each for _, each in wishes)) < len(self.workers):
                    self._end_one()
                self._look()

    def close(self) -> None:
        self._stop_asked.set()
        self.join()
        while self.workers:
            self._end_one()
        for worker in self.stopped:
            assert worker.process.wait(60) == 0

    def _look(self) -> None:
        self.most = max(self.most, len(self.workers))
        for worker in self.workers:
            if worker.ready is None and (ready := worker.run_dir / "ready").exists():
                # A file's time is on the clock of the day.
                worker.ready = time.monotonic() - (time.time() - ready.stat().st_mtime)

    def _start(self, number: int) -> None:
        for _ in range(number):
            run_dir = self._folder / f"run-{uuid.uuid4()}"
            run_dir.mkdir()
            process = subprocess.Popen(
                [sys.executable, "-m", "farm.cli", "worker", "null"],
                env={**self._env, "FARM_RUN_DIR": str(run_dir)},
                stderr=subprocess.DEVNULL,
            )
            self.workers.append(Worker(process, run_dir))

    def _end_one(self) -> None:
        worker = self.workers.pop(self._drawn.randrange(len(self.workers)))
        worker.process.terminate()
        self.stopped.append(worker)


def query() -> str:
    """Return the query that the chart gives to KEDA for a lane with the name null."""
    more = (
        "--set=pipelines.null.catalog.source=x",
        "--set=pipelines.null.worker.scaling.enabled=true",
        f"--set=pipelines.null.worker.scaling.drainSeconds={DRAIN_SECONDS}",
        "--set=scaler.existingSecret=x",
    )
    [scaled] = by_kind(objects("minimal", more=more), "ScaledObject").values()
    asked: str = scaled["spec"]["triggers"][0]["metadata"]["query"]
    return asked


@pytest.fixture
def lane(settings: Settings, tmp_path: Path) -> Iterator[Farm]:
    """A farm whose catalog has one pipeline, without a worker."""
    write_checkpoint(tmp_path / "null")
    catalog = tmp_path / "pipelines.toml"
    catalog.write_text(
        '[pipelines.null]\nsource = "null"\ndevice = "cpu"\nbucket = {default = 4}\n'
    )
    opened = open_farm(settings.model_copy(update={"pipelines": catalog}))
    yield opened
    opened.close()


@pytest.fixture
def env(lane: Farm, tmp_path: Path) -> dict[str, str]:
    return {
        **os.environ,
        **env_of(lane.settings),
        "FARM_PIPELINES": str(lane.settings.pipelines),
        "FARM_SCRATCH_DIR": str(tmp_path / "scratch"),
        "FARM_HEARTBEAT_SECONDS": "1",
    }


@contextmanager
def janitor(env: Mapping[str, str]) -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-m", "farm.cli", "janitor"], env=env)
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def scaler(lane: Farm, env: dict[str, str], tmp_path: Path) -> Iterator[Scaler]:
    with janitor(env):
        running = Scaler(lane.settings.database_url.get_secret_value(), env, tmp_path)
        running.start()
        yield running
        running.close()


def burst(lane: Farm, tenant: uuid.UUID, jobs: int, frames: int) -> list[uuid.UUID]:
    """Submit jobs whose frames take 0.4 s for each batch of four."""
    fields = {"pipeline": "null", "prompts": ["x"], "steps": 8, "step_seconds": 0.05}
    return [submit(lane, tenant, **fields, images_per_prompt=frames) for _ in range(jobs)]


def ended(lane: Farm) -> bool:
    return bool(sql(lane, "SELECT bool_and(status IN ('succeeded', 'partial')) FROM jobs")[0][0])


def test_bursts_are_rendered_by_workers_that_come_and_go(
    lane: Farm, scaler: Scaler, tenant: uuid.UUID
) -> None:
    """Nothing is lost, no attempt is charged, and at the end there is no worker."""
    for jobs in (40, 1, 60):
        burst(lane, tenant, jobs, frames=8)
        wait_until(lambda: ended(lane), 240, "the burst is rendered")
    wait_until(lambda: not scaler.workers, 60, "the lane is at zero")
    for worker in scaler.stopped:
        assert worker.process.wait(60) == 0, "each ended by itself"
    assert scaler.most > 1
    total, succeeded = sql(lane, "SELECT sum(total), sum(succeeded) FROM jobs")[0]
    assert total == succeeded == 101 * 8
    charged = sql(lane, "SELECT max(attempt - uncharged) FROM frames")[0][0]
    assert charged == 1, "each frame was charged for the attempt that succeeded"
    assert audited(lane).ok


def test_work_on_a_lane_at_zero_is_claimed_after_one_interval_and_one_load(
    lane: Farm, scaler: Scaler, tenant: uuid.UUID
) -> None:
    burst(lane, tenant, jobs=1, frames=4)
    wait_until(lambda: ended(lane), 120, "the first job is rendered")
    wait_until(lambda: not scaler.workers, 60, "the lane is at zero")
    for worker in scaler.stopped:
        worker.process.wait(60)
    submitted = time.monotonic()
    burst(lane, tenant, jobs=1, frames=4)
    claimed = "SELECT bool_and(cursor > 0) FROM jobs"
    wait_until(lambda: bool(sql(lane, claimed)[0][0]), 60, "it is claimed")
    taken = time.monotonic() - submitted
    [worker] = scaler.workers
    wait_until(lambda: worker.ready is not None, 10, "the scaler has seen that it is ready")
    assert worker.ready is not None
    load = worker.ready - worker.started
    print(f"claimed after {taken:.1f} s; interval {POLL_SECONDS} s, load {load:.1f} s")  # noqa: T201
    assert worker.started - submitted <= POLL_SECONDS + 0.5
    assert taken <= POLL_SECONDS + load + 1.0
