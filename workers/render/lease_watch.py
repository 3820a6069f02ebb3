"""Watch of a lease during its batch: reports progress, and checks that it is still wanted."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from farm.errors import Unavailable
from farm.pipelines.family import StopBatch
from farm.store import leases
from farm.store.claim import Lease
from farm.store.engine import Store, one_statement
from farm.store.leases import LeaseStatus

log = logging.getLogger(__name__)


class LeaseWatch:
    """Watches a lease from the first step of its batch until it has ended.

    `on_step` runs between two steps, so it only sets two numbers and reads a flag. A separate
    thread reports to Postgres, at most every `seconds`, and never delays the device.
    """

    def __init__(
        self,
        store: Store,
        lease: Lease,
        seconds: float,
        on_interactive: Callable[[], None] = lambda: None,
    ) -> None:
        """Watch a lease.

        Args:
            store: the store of the lease.
            lease: the lease of the batch that is denoised.
            seconds: minimum interval between two reports to Postgres.
            on_interactive: called when interactive frames are waiting.
        """
        self._store = store
        self._lease = lease
        self._seconds = seconds
        self._on_interactive = on_interactive
        self.step = (0, 0)
        self.draining = False
        """True once Postgres reported that the worker is draining."""
        self._other = 0
        self._unwanted = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._talk, name="lease-watch", daemon=True)

    def start(self) -> None:
        """Start the watch."""
        self._thread.start()

    def close(self) -> None:
        """End the watch."""
        self._over.set()

    def on_step(self, step: int, steps: int) -> None:
        """Record that `step` of `steps` is done.

        Raises:
            StopBatch: the lease is lost, or all its frames were cancelled.
        """
        self.step = (step, steps)
        if self._unwanted.is_set():
            raise StopBatch

    def on_other(self) -> None:
        """Record progress that is not a step of this batch.

        For example a picture was stored, or an interrupting batch completed a step.
        """
        self._other += 1

    def _talk(self) -> None:
        reported = (0, 0), 0
        while not self._over.wait(self._seconds):
            now = self.step, self._other
            if now != reported:
                news = self._report(*self.step)
                if news is None:
                    continue
                self.draining |= news.draining
                if news.urgent:
                    self._on_interactive()
                if not news.wanted:
                    self._unwanted.set()
                    return
            reported = now

    def _report(self, step: int, steps: int) -> LeaseStatus | None:
        try:
            with one_statement(self._store) as connection:
                return leases.report_step(connection, self._lease.id, step, steps)
        except Unavailable as error:
            # The lease is checked when the batch is done. Until then the batch may be wanted.
            log.warning("lease %s: progress was not reported: %s", self._lease.id, error)
        except Exception:
            log.exception("lease %s: progress was not reported", self._lease.id)
        return None
