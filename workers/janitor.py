"""The janitor: it expires leases, rings again for lanes where something waits, and prunes.

Any number run; the one that holds a lock in Postgres works, another takes over when it ends.
"""

from __future__ import annotations

import logging
import threading

from farm.context import Farm
from farm.errors import Unavailable
from farm.store import events, frames, lanes, workers
from farm.store.engine import Connection
from farm.store.leader import leadership

log = logging.getLogger(__name__)

FOLD_SECONDS = 86_400.0


class Janitor:
    """Sweeps every `sweep_seconds` while it leads."""

    def __init__(self, farm: Farm) -> None:
        self._farm = farm
        settings = farm.settings
        self._patience = max(settings.transaction_seconds, 3 * settings.sweep_seconds)

    def run(self, stop: threading.Event) -> None:
        """Sweep until `stop` is set; an outage of Postgres is logged and outlived."""
        while not stop.is_set():
            try:
                with leadership(self._farm.store, self._patience) as connection:
                    if connection is not None:
                        log.info("This janitor leads.")
                        self._lead(connection, stop)
            except Unavailable as error:
                log.warning("The janitor waits: %s", error)
            stop.wait(self._farm.settings.sweep_seconds)

    def _lead(self, connection: Connection, stop: threading.Event) -> None:
        while not stop.is_set():
            self.sweep(connection)
            stop.wait(self._farm.settings.sweep_seconds)

    def sweep(self, connection: Connection) -> None:
        """Do everything that is due once."""
        settings = self._farm.settings
        with connection.begin():
            expired = frames.expire(connection, settings.retry_seconds)
        with connection.begin():
            gone = workers.sweep(connection, settings.worker_timeout_seconds)
            workers.fold(connection, FOLD_SECONDS)
            waiting = lanes.claimable_lanes(connection)
        for lane in expired:
            log.warning("Leases of lane %s expired; their frames were returned.", lane)
        for name in gone:
            log.warning("Worker %s was not heard of: it counts as gone.", name)
        with connection.begin():
            events.prune(connection, settings.events_days)
        for pipeline in waiting:
            if not self._farm.bells.ring(pipeline):
                break
