"""A thread of the leading janitor for work that must not delay the sweep of leases.

If two janitors lead for a moment, the work is done twice, and must do no harm.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable

from farm.errors import Unavailable

log = logging.getLogger(__name__)

MAX_REST_SECONDS = 60.0
"""Maximum pause after a failure, in seconds."""


class LeaderThread:
    """Thread that repeats a step while its janitor is the leader."""

    def __init__(
        self,
        name: str,
        step: Callable[[Callable[[], bool]], bool],
        pace_seconds: float,
        stop: threading.Event,
    ) -> None:
        """Prepare the thread.

        Args:
            name: what it does, for the log.
            step: does a part of the work, as long as the function that it gets returns True. It
                returns True if there is more to do now.
            pace_seconds: pause between two steps if there is nothing to do, in seconds.
            stop: ends the thread once it is set.
        """
        self._name = name
        self._step = step
        self._pace = pace_seconds
        self._stop = stop
        self._leads = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread. It ends once `stop` is set."""
        self._thread.start()

    def lead(self, leads: bool) -> None:
        """Set whether the janitor is the leader. The thread works only then."""
        if leads:
            self._leads.set()
        else:
            self._leads.clear()

    def join(self, seconds: float) -> None:
        """Wait for the thread to end. One that waits for a server ends with the process."""
        self._thread.join(seconds)

    def _goes_on(self) -> bool:
        return self._leads.is_set() and not self._stop.is_set()

    def _run(self) -> None:
        failures = 0
        while not self._stop.is_set():
            more = False
            if self._leads.wait(self._pace):
                try:
                    more = self._step(self._goes_on)
                    failures = 0
                except Unavailable as error:
                    failures += 1
                    log.warning("The work of %s is postponed: %s", self._name, error)
                except Exception:
                    failures += 1
                    log.exception("The work of %s is postponed", self._name)
            rest = min(self._pace * 2 ** min(failures, 10), MAX_REST_SECONDS)
            if not (more and self._goes_on()):
                pause = random.uniform(rest / 2, rest) if failures else self._pace  # noqa: S311
                self._stop.wait(pause)
