"""The supervisor of `farm up`: keeps its children running, and ends them in order."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Self

from farm.local.child import POLL_SECONDS, ManagedProcess, Program

logger = logging.getLogger(__name__)

HASTENED_SECONDS = 3.0


class Supervisor:
    """Restarts children that end, with back-off. At the end of the block it stops them all.

    One thread starts every child and lives as long as they do, because the kernel ends a child
    together with the thread that started it.
    """

    def __init__(self) -> None:
        self.children: list[ManagedProcess] = []
        self._changed = threading.Condition()
        self._closed = False
        self._hastened = threading.Event()
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._hastened_by_signals():
            for stage in sorted({child.program.stage for child in self.children}):
                self.stop(*(child for child in self.children if child.program.stage == stage))
            self._closed = True
            self._thread.join()

    def start(self, program: Program, *, lasting: bool = True) -> ManagedProcess:
        """Start a child. Without `lasting`, it is not restarted before `ready` has returned."""
        child = ManagedProcess(program)
        child.lasting = lasting
        with self._changed:
            self.children.append(child)
            self._changed.notify_all()
        return child

    def ready(self, child: ManagedProcess, seconds: float) -> ManagedProcess:
        """Wait until `child` serves. Raise StackError if it ends, or after `seconds`."""
        deadline = time.monotonic() + seconds
        while not child.serves():
            if child.outcome is not None and not child.lasting:
                raise child.failure(f"ended at its start ({child.outcome})")
            if time.monotonic() > deadline:
                raise child.failure(f"was not ready after {seconds:.0f} s")
            self._pause(POLL_SECONDS)
        child.lasting = True
        return child

    def stop(self, *children: ManagedProcess) -> None:
        """Stop children together, without restart: stop signal, grace period, then SIGKILL."""
        with self._changed:
            for child in children:
                child.wanted = False
                child.signal(child.program.stop_signal)
        asked = time.monotonic()
        killed: set[ManagedProcess] = set()
        while running := [child for child in children if child.alive]:
            for child in set(running) - killed:
                if time.monotonic() - asked > self._grace(child):
                    logger.warning("%s did not stop in time, so it is killed", child.name)
                    child.end_group()
                    killed.add(child)
            self._pause(POLL_SECONDS / 2)

    def forget(self, child: ManagedProcess) -> None:
        """Stop a child, and remove it from the list."""
        self.stop(child)
        with self._changed:
            self.children.remove(child)

    def hasten(self) -> None:
        """Shorten the grace period of children that are being stopped."""
        self._hastened.set()

    def _grace(self, child: ManagedProcess) -> float:
        grace = child.program.grace
        return min(grace, HASTENED_SECONDS) if self._hastened.is_set() else grace

    def _pause(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait(seconds)

    def _run(self) -> None:
        while not self._closed:
            with self._changed:
                for child in self.children:
                    child.tend()
                self._changed.wait(POLL_SECONDS)

    @contextmanager
    def _hastened_by_signals(self) -> Iterator[None]:
        """During the stop, make Ctrl-C and SIGTERM shorten the grace period, not abort the stop."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def hasten(_number: int, _frame: FrameType | None) -> None:
            self.hasten()

        before = [(sign, signal.signal(sign, hasten)) for sign in (signal.SIGINT, signal.SIGTERM)]
        try:
            yield
        finally:
            for sign, handler in before:
                signal.signal(sign, handler)
