"""Readiness of the servers as it was some seconds ago, for pages that wait for none of them."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from api import schemas

SECONDS = 5.0
"""Age from which on the servers are asked again, in seconds."""
OLD_SECONDS = 2 * SECONDS
"""Age from which on an answer tells nothing: nobody has asked for a while. Seconds."""
FIRST_SECONDS = 1.0
"""Time that a page waits for an answer if there is none, or an old one. Seconds."""


class RecentReadiness:
    """Asks the servers in a thread, so that a silent one delays nobody."""

    def __init__(self, ask: Callable[[], schemas.Readiness]) -> None:
        self._ask = ask
        self._thread = ThreadPoolExecutor(1, "readiness")
        self._lock = threading.Lock()
        self._asked: Future[schemas.Readiness] | None = None
        self._asked_at = 0.0
        self._known: schemas.Readiness | None = None
        self._known_at = -math.inf

    def get(self) -> schemas.Readiness | None:
        """Return the newest answer. None: there is none yet, or it is old."""
        with self._lock:
            self._take()
            if self._asked is None and time.monotonic() - self._asked_at > SECONDS:
                self._asked, self._asked_at = self._thread.submit(self._ask), time.monotonic()
            asked = self._asked if self._is_old() else None
        if asked is not None:
            wait([asked], FIRST_SECONDS)
        with self._lock:
            self._take()
            return None if self._is_old() else self._known

    def _is_old(self) -> bool:
        return time.monotonic() - self._known_at > OLD_SECONDS

    def problems(self) -> dict[str, str]:
        """Return the servers that do not answer, and why."""
        known = self.get()
        if known is None:
            return {"servers": "Redis, the storage or Postgres has not answered a check yet"}
        parts = {"redis": known.redis, "storage": known.s3}
        return {name: part.detail for name, part in parts.items() if part and not part.ok}

    def close(self) -> None:
        """End the thread, once the server that it asks has answered."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _take(self) -> None:
        if self._asked is not None and self._asked.done():
            if self._asked.exception() is None:
                self._known, self._known_at = self._asked.result(), time.monotonic()
            self._asked = None
