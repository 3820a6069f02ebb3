"""Running rivals: workers on the same servers, and a process that submits."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import psycopg

from farm.local import commands
from farm.process import cores
from tests.benchmarks.rivals import results
from tests.benchmarks.stand import DEVELOPMENT, ROOT, BenchServers, wait_closely

MODULES = "tests.benchmarks.rivals"


def _words(line: str) -> list[str]:
    return line.format(modules=MODULES, cores=cores()).split()


CELERY = (
    " worker --pool prefork --concurrency {cores} --without-gossip --without-mingle "
    "--without-heartbeat --loglevel WARNING"
)
WORKERS: Mapping[str, list[list[str]]] = {
    "celery": [_words("celery -A {modules}.celery_plain_app" + CELERY)],
    "celery by hand": [_words("celery -A {modules}.celery_app" + CELERY)],
    "procrastinate": [
        _words("procrastinate --app {modules}.procrastinate_app.app worker --concurrency 20")
        for _ in range(cores())
    ],
    "dramatiq": [_words("dramatiq {modules}.dramatiq_app --processes {cores} --threads 8")],
}
WARM_UP = 50
"""Number of tasks before the measurement."""


@dataclass
class Rival:
    """A rival with running workers. `rate` runs tasks and returns tasks per second."""

    name: str
    database: psycopg.Connection[Any]
    env: Mapping[str, str]
    """Variables of its databases."""
    _submitter: subprocess.Popen[str]
    _runs: int = 0

    def rate(self, count: int) -> float:
        """Submit tasks, and wait until each has its row."""
        self._runs += 1
        started = time.monotonic()
        self._say(f"{self._runs} {count}")
        wait_closely(lambda: self.done(self._runs) == count, f"{self.name} did {count} tasks")
        seconds = time.monotonic() - started
        self.heard("submitted")
        return count / seconds

    def heard(self, word: str) -> None:
        assert self._submitter.stdout is not None
        told = self._submitter.stdout.readline().strip()
        assert told == word, f"{self.name} said {told!r}"

    def _say(self, line: str) -> None:
        assert self._submitter.stdin is not None
        self._submitter.stdin.write(f"{line}\n")
        self._submitter.stdin.flush()

    def done(self, run: int) -> int:
        """Count the finished tasks of a run."""
        time.sleep(0.02)  # counting takes time of the measurement
        count = results.COUNT_OF_CELERY if self.name == "celery" else results.COUNT
        return int(self.database.execute(count, (run,)).fetchone()[0])  # type: ignore[index]


def installed(name: str) -> bool:
    """Return True if a rival can run here. The extra `bench` installs the missing ones."""
    return find_spec(name.split()[0]) is not None


@contextmanager
def running_rival(stand: BenchServers, name: str, task: str = "nothing") -> Iterator[Rival]:
    """Run a rival on its own database, warmed up."""
    number = next(stand.numbers)
    env = {
        "BENCH_DATABASE_URL": stand.database(f"rival_{number}"),
        "BENCH_REDIS_URL": stand.redis(number),
    }
    with ExitStack() as stack:
        database = stack.enter_context(psycopg.connect(env["BENCH_DATABASE_URL"], autocommit=True))
        database.execute(results.CREATE)
        whole = commands.environment(stand.folder, {**stand.servers.env, **DEVELOPMENT, **env})
        whole["PYTHONPATH"] = str(ROOT)
        if name == "procrastinate":
            schema = ["procrastinate", "--app", f"{MODULES}.procrastinate_app.app", "schema"]
            subprocess.run(
                [sys.executable, "-m", *schema, "--apply"],
                env=whole,
                cwd=ROOT,
                check=True,
                capture_output=True,
            )
        for argv in WORKERS[name]:
            stack.enter_context(stand.python(name, [sys.executable, "-m", *argv], env))
        submitter = stack.enter_context(_submitting(name, task, whole))
        rival = Rival(name, database, env, submitter)
        rival.heard("ready")
        if name == "celery":
            wait_closely(lambda: _has_results(database), "Celery made its table")
        rival.rate(WARM_UP)
        yield rival


def _has_results(database: psycopg.Connection[Any]) -> bool:
    found = database.execute("SELECT to_regclass('celery_taskmeta') IS NOT NULL").fetchone()
    return bool(found and found[0])


@contextmanager
def _submitting(name: str, task: str, env: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, "-m", f"{MODULES}.submit", name, task]
    with subprocess.Popen(
        argv, env=dict(env), cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        try:
            yield process
        finally:
            process.kill()
