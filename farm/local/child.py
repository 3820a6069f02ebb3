"""One child process of `farm up`: starting, watching and ending it."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from farm.local.errors import StackError
from farm.local.processes import signal_group

logger = logging.getLogger(__name__)

LAUNCH = Path(__file__).with_name("launch.py")
LOG_BYTES = 10 * 2**20
FIRST_DELAY = 0.2
MAX_DELAY = 10.0
STEADY_SECONDS = 30.0
FAILURES_SHOWN = 3
POLL_SECONDS = 0.1


class Stage(IntEnum):
    """Order of stopping children: lowest first. Each stage waits until the one before has ended."""

    WORKER = 0
    FRONT = 1
    SEAWEEDFS = 2
    VALKEY = 3
    POSTGRES = 4


@dataclass(frozen=True)
class Program:
    """A program to run, with its settings. `argv[0]` is an absolute path."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str]
    log: Path
    stage: Stage
    ready: Callable[[], bool] = lambda: True
    """Readiness probe: returns True if the program serves. An exception means not yet."""
    cwd: Path | None = None
    user: int = -1
    """User ID to run as, if started by root. -1 keeps the current user."""
    stop_signal: signal.Signals = signal.SIGTERM
    grace: float = 15.0
    """Seconds between `stop_signal` and SIGKILL."""
    orphan_signal: signal.Signals = signal.SIGKILL
    """Signal that the program receives if `farm up` itself is killed."""


def launched(
    argv: Sequence[str], user: int = -1, orphan_signal: signal.Signals = signal.SIGKILL
) -> list[str]:
    """Build a command line that runs `argv` as `user`, and ends with the thread that starts it."""
    start = [sys.executable, "-I", "-S", str(LAUNCH)]
    return [*start, str(os.getpid()), str(int(orphan_signal)), str(user), *argv]


class ManagedProcess:
    """A running program. The supervisor's thread starts and reaps it; any thread may read it."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.name = program.name
        self.pid: int | None = None
        self.restarts = 0
        self.wanted = True
        self.lasting = False
        """True if it is started again when it ends. Set once it has been ready."""
        self.outcome: str | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._next_start = 0.0
        self._failures = 0

    @property
    def alive(self) -> bool:
        """True if the process runs now."""
        return self.pid is not None

    def serves(self) -> bool:
        """Return True if the process runs and its readiness probe passes."""
        # Any error of a client library means not ready yet.
        with suppress(Exception):
            return self.alive and self.program.ready()
        return False

    def kill(self) -> None:
        """Send SIGKILL to the process, as a crash would; it is then started again."""
        self.signal(signal.SIGKILL)

    def signal(self, sign: signal.Signals) -> None:
        """Send a signal to the process, if it runs."""
        if self.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, sign)

    def end_group(self) -> None:
        """Send SIGKILL to the process and everything it started."""
        if self.pid is not None:
            signal_group(self.pid, signal.SIGKILL)

    def last_lines(self, count: int = 15) -> str:
        """Return the last lines of the log, to show when the process fails."""
        if not self.program.log.is_file():
            return ""
        with self.program.log.open(errors="replace") as file:
            return "".join(deque(file, count)).rstrip()

    def tend(self) -> None:
        """Reap the process if it ended, and start it if it is due. Called by the supervisor."""
        if self._process is not None and _has_ended(self._process):
            self._reap(self._process)
        due = self.wanted and time.monotonic() >= self._next_start
        if due and self._process is None and (self.lasting or self.outcome is None):
            self._start()

    def _start(self) -> None:
        program = self.program
        if program.log.is_file() and program.log.stat().st_size > LOG_BYTES:
            program.log.replace(program.log.with_suffix(".old.log"))
        with program.log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603  the argv is ours
                launched(program.argv, program.user, program.orphan_signal),
                env=dict(program.env),
                cwd=program.cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
        self.restarts += self.outcome is not None
        self._started = time.monotonic()
        self.pid = self._process.pid

    def _reap(self, process: subprocess.Popen[bytes]) -> None:
        # Before reaping: until then no other group can get this ID.
        signal_group(process.pid, signal.SIGKILL)
        self.pid, self._process = None, None
        code = process.wait()
        self.outcome = f"signal {-code}" if code < 0 else f"exit code {code}"
        if self.wanted and self.lasting:
            self._schedule()

    def _schedule(self) -> None:
        now = time.monotonic()
        if now - self._started >= STEADY_SECONDS:
            self._failures = 0
        delay = min(FIRST_DELAY * 2**self._failures, MAX_DELAY)
        self._failures += 1
        self._next_start = now + delay
        logger.warning(
            "%s ended (%s); it is started again in %.1f s", self.name, self.outcome, delay
        )
        if self._failures % FAILURES_SHOWN == 0:
            logger.warning(
                "%s keeps ending; the last lines of %s:\n%s",
                self.name,
                self.program.log,
                self.last_lines(),
            )

    def failure(self, what: str) -> StackError:
        """Build the error for the user: name, `what` went wrong, and the last lines of the log."""
        lines = self.last_lines()
        return StackError(f"{self.name} {what}. Last lines of its log {self.program.log}:\n{lines}")


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    if not hasattr(os, "waitid"):  # macOS before Python 3.13
        return process.poll() is not None
    look = os.WEXITED | os.WNOHANG | os.WNOWAIT
    return os.waitid(os.P_PID, process.pid, look) is not None
