"""Claims of interactive frames that arrive while a less urgent batch is denoised."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Collection

from farm.context import Farm
from farm.errors import Unavailable
from farm.store.claim import Lease
from workers.render.claims import Claims
from workers.render.identity import Identity

log = logging.getLogger(__name__)

VAIN_SECONDS, MAX_VAIN_SECONDS = 5.0, 40.0
"""Time after a claim in vain in which only a bell leads to another one, in seconds: of the first
claim in vain, and the maximum. It is doubled for each further one.

The lease watch reports interactive frames also if none of them may interrupt.
"""
DEAF_SECONDS = 1.0
"""Pause after Redis did not answer, in seconds. The lease watch reports such frames anyway."""


class InteractiveClaims:
    """Listens for interactive frames, and claims them, in a thread. The step hook only checks."""

    def __init__(self, farm: Farm, identity: Identity, claims: Claims, plans: str) -> None:
        self._farm = farm
        self._identity = identity
        self._claims = claims
        self._plans = plans
        """Plans of open buckets for a device that holds another batch."""
        self._listening = threading.Event()
        self._told = threading.Event()
        self._claiming = threading.Lock()
        self._taken = threading.Condition()
        self._lease: Lease | None = None
        self._without: Collection[uuid.UUID] = ()
        self._vain_until = 0.0
        self._vain_seconds = VAIN_SECONDS
        self._reported = False
        """True if the lease watch led to the next claim."""
        self._over = False
        self._thread: threading.Thread | None = None

    def listen(self, without: Collection[uuid.UUID] = ()) -> None:
        """Claim a batch as soon as one waits, until `rest`. Leave out these tenants."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._listen, name="urgent", daemon=True)
            self._thread.start()
        self._without = without
        self._listening.set()

    def rest(self) -> None:
        """Claim nothing until `listen`. A claim in progress may still bring a batch."""
        self._listening.clear()

    def close(self) -> None:
        """End the thread."""
        self._over = True
        self._listening.set()
        if self._thread is not None:
            self._thread.join()

    def notify(self) -> None:
        """Report that interactive frames wait. Any thread may call it."""
        if time.monotonic() >= self._vain_until:
            self._reported = True
            self._told.set()

    def look_again(self) -> None:
        """Claim again at the next `listen`, whether a bell rings or not."""
        self._told.set()

    def take_last(self) -> Lease | None:
        """Return a batch claimed at the very end. No other is claimed before the next block."""
        with self._claiming:
            return self.take()

    def take(self) -> Lease | None:
        """Return the claimed batch, if there is one. Never waits for Postgres or Redis."""
        if self._lease is None:
            return None
        with self._taken:
            lease, self._lease = self._lease, None
            self._taken.notify()
        return lease

    def _listen(self) -> None:
        while True:
            self._listening.wait()
            if self._over:
                return
            try:
                if self._told.is_set() or self._farm.bells.await_urgent(self._identity.pipeline):
                    self._claim()
            except Unavailable as error:
                log.debug("%s receives no bells: %s", self._identity.name, error)
                self._told.wait(DEAF_SECONDS)
            except Exception:
                log.exception("%s failed to check for interactive frames", self._identity.name)
                self._told.wait(DEAF_SECONDS)

    def _claim(self) -> None:
        """Claim a batch and wait until it is taken."""
        with self._claiming:
            if self._over or not self._listening.is_set():
                self._told.set()  # the loop claims the most urgent first, or has claimed ahead
                return
            self._told.clear()
            self._lease = self._claims.claim_interactive(self._plans, self._without)
            if self._lease is None:
                self._vain_until = time.monotonic() + self._vain_seconds
                if self._reported:
                    self._vain_seconds = min(2 * self._vain_seconds, MAX_VAIN_SECONDS)
            else:
                self._vain_seconds = VAIN_SECONDS
            self._reported = False
        with self._taken:
            self._taken.wait_for(lambda: self._lease is None)
