"""The one hook on every denoising step: it reports progress and ends batches nobody wants."""

from __future__ import annotations

import logging
import threading
from types import TracebackType

from farm.errors import Unavailable
from farm.families.base import StopBatch
from farm.store import leases
from farm.store.claim import Lease
from farm.store.engine import Store, transaction

log = logging.getLogger(__name__)


class LeaseWatch:
    """Watches a lease while its batch is rendered.

    `on_step` runs between two steps, so it only sets two numbers and looks at a flag; a thread of
    its own talks to Postgres, at most every `seconds`, and never holds up the device.
    """

    def __init__(self, store: Store, lease: Lease, seconds: float) -> None:
        self._store = store
        self._lease = lease
        self._seconds = seconds
        self.step = (0, 0)
        self._stored = 0
        self._unwanted = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._talk, name="lease-watch", daemon=True)

    def __enter__(self) -> LeaseWatch:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()

    def on_step(self, step: int, steps: int) -> None:
        """Note that `step` of `steps` is done.

        Raises:
            StopBatch: the lease is lost, or every frame of it was cancelled.
        """
        self.step = (step, steps)
        if self._unwanted.is_set():
            raise StopBatch

    def on_stored(self) -> None:
        """Note that another picture is stored: the batch moves on, however slow the storage is."""
        self._stored += 1

    def _talk(self) -> None:
        reported = (0, 0), 0
        while not self._over.wait(self._seconds):
            now = self.step, self._stored
            if now != reported and not self._report(*self.step):
                self._unwanted.set()
                return
            reported = now

    def _report(self, step: int, steps: int) -> bool:
        try:
            with transaction(self._store) as connection:
                return leases.touch(connection, self._lease.id, step, steps)
        except Unavailable as error:
            # The lease decides when the batch is done; until then it may still be wanted.
            log.warning("lease %s: progress was not reported: %s", self._lease.id, error)
            return True
