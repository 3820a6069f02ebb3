"""Runs rows: load, faults, recovery, and the checks at the end."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from unittest import mock

import boto3
from pydantic import SecretStr

from farm.config import Settings
from farm.storage import Artifacts
from tests.chaos.checks import Findings, check
from tests.chaos.load import Load
from tests.chaos.rows import ROWS, Row
from tests.chaos.scene import ChaosRun, Skipped
from tests.chaos.stack import READY_SECONDS, Stack, running_stack
from tests.chaos.truth import DatabaseProbe
from tests.support.waiting import wait_until

RECOVERY_SECONDS = 180.0
SETTLE_SECONDS = 900.0
DEMO_FRAMES = 12
BULK = 20
"""Number of the row with a bulk job, during which all other faults happen."""


@dataclass
class Result:
    """Result of a row, one line of the table."""

    number: int
    fault: str
    times: int = 0
    findings: Findings = field(default_factory=Findings)
    recoveries: list[float] = field(default_factory=list)
    seconds: float = 0.0
    skipped: str | None = None

    @property
    def ok(self) -> bool:
        found = self.findings
        return not (self.skipped or found.problems or found.lost or found.doubled)


@dataclass
class Chaos:
    """A running farm, and the seed of all random choices."""

    stack: Stack
    truth: DatabaseProbe
    artifacts: Artifacts
    seed: int
    poison_attempts: int
    """Number of attempts of a poison frame."""

    def ready(self) -> None:
        """Wait until every worker has loaded its pipeline."""
        pids = [worker.pid for worker in self.stack.workers("null") + self.stack.workers("demo")]
        wait_until(
            lambda: [row["state"] for row in self.truth.workers(pids)] == ["idle"] * len(pids),
            READY_SECONDS,
            "every worker was ready",
        )

    def run(self, number: int, times: int, bulk_frames: int = 0) -> Result:
        """Run one row.

        Args:
            number: number of the row.
            times: number of injections; fewer if the row has a lower maximum.
            bulk_frames: number of frames of the bulk job, for row 20.
        """
        row, started = ROWS[number], time.monotonic()
        result = Result(row.number, row.fault)
        load = Load(self.stack, f"row {number}", f"{self.seed} load {number}")
        load.poison_attempts = self.poison_attempts
        rng = Random(f"{self.seed} row {number}")
        scene = ChaosRun(self.stack, self.truth, load, rng)
        try:
            if number == BULK:
                load.null(bulk_frames, priority="bulk")
            elif row.steady and self.stack.workers("demo"):
                load.demo(DEMO_FRAMES)
            with row.around(scene):
                with scene.noting_errors():
                    self._disturb(row, scene, min(times, row.most), result)
                with scene.noting_errors():
                    self._settle()
        except Skipped as skipped:
            result.skipped = str(skipped)
            with scene.noting_errors():
                self._settle()  # its load had begun
        result.findings = check(self.truth, self.artifacts, load.name, load.accepted)
        result.findings.problems += scene.problems + load.problems
        result.seconds = time.monotonic() - started
        load.close()
        return result

    def _disturb(self, row: Row, scene: ChaosRun, times: int, result: Result) -> None:
        with scene.load.steady() if row.steady else nullcontext():
            for _ in range(times):
                if row.steady:
                    self._rendering()
                    scene.pause(0.0, 0.5)
                else:
                    self._done()
                    scene.idle(self.stack.workers("null"))
                row.inject(scene)
                result.times += 1
                result.recoveries.append(self._recovered(row))

    def _rendering(self) -> None:
        wait_until(self.truth.holders, RECOVERY_SECONDS, "frames were rendered")

    def _done(self) -> None:
        wait_until(lambda: not self.truth.outstanding(), RECOVERY_SECONDS, "all was done")

    def _recovered(self, row: Row) -> float:
        """Wait until the next frame succeeds, or all are done. Return the seconds."""
        ended = time.time()
        if not row.steady:
            self._done()
            return time.time() - ended
        at = wait_until(
            lambda: self.truth.next_success(ended), RECOVERY_SECONDS, "a frame succeeded again"
        )
        assert at is not None
        return at - ended

    def _settle(self) -> None:
        wait_until(lambda: not self.truth.outstanding(), SETTLE_SECONDS, "every job was terminal")


@contextmanager
def chaos(data: Path, seed: int, short: bool = False) -> Iterator[Chaos]:
    """Run a farm for chaos on the folder `data`.

    A `short` one has no worker for the demo's lane, and a poison frame gets one attempt. A frame
    that ended its process waits several times the load time before its next attempt.
    """
    with (
        running_stack(data, Random(seed), demo_workers=0 if short else 1) as stack,
        credentials(stack.servers.env),
    ):
        servers = stack.servers
        truth = DatabaseProbe(servers.database_url)
        settings = Settings(
            database_url=SecretStr(servers.database_url),
            s3_endpoint_url=servers.s3_endpoint_url,
            s3_bucket=servers.s3_bucket,
        )
        artifacts = Artifacts(settings)
        running = Chaos(stack, truth, artifacts, seed, 1 if short else 3)
        try:
            running.ready()
            yield running
        finally:
            artifacts.close()
            truth.close()


@contextmanager
def credentials(env: Mapping[str, str]) -> Iterator[None]:
    """Let boto3 use a farm's keys in the block. boto3 caches the first keys that it reads."""
    variables = {name: value for name, value in env.items() if name.startswith("AWS_")}
    with mock.patch.dict(os.environ, variables), mock.patch.object(boto3, "DEFAULT_SESSION", None):
        yield
