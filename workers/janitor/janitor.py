"""The janitor: it expires leases, rings again for lanes where something waits, and tidies up.

Any number run; the one that holds a lock in Postgres works, another takes over when it ends.
"""

from __future__ import annotations

import logging
import random
import threading
import time

from farm.context import Farm
from farm.errors import Unavailable
from farm.store import events, exports, jobs, lanes, leases, retention, sessions, tenants, workers
from farm.store.engine import Connection
from farm.store.leadership import leadership
from workers.janitor.storage_cleaner import StorageWork

log = logging.getLogger(__name__)

ARCHIVE_SECONDS = 86_400.0
LOOK_AGAIN_SECONDS = 60.0
"""Between two checks of shards that may have missed their event."""
INPUTS_PER_SWEEP = 10
"""Each with its lines"""
ROWS_PER_SWEEP = 5000
"""Rows of removed jobs that a sweep deletes from each table, at most; and requeued frames that it
lets follow their jobs"""

MAX_REST_SECONDS = 10.0
"""Between two tries while Postgres is away."""

END_SECONDS = 5.0


class Janitor:
    """Sweeps every `sweep_seconds` while it leads."""

    def __init__(self, farm: Farm) -> None:
        self._farm = farm
        settings = farm.settings
        self._look_again_at = 0.0
        self._patience = max(settings.transaction_seconds, 3 * settings.sweep_seconds)

    def run(self, stop: threading.Event) -> None:
        """Sweep until `stop` is set; an outage of Postgres is logged and outlived."""
        storage = StorageWork(self._farm, stop)
        storage.start()
        failures = 0
        while not stop.is_set():
            try:
                with leadership(self._farm.store, self._patience) as connection:
                    failures = 0
                    if connection is not None:
                        log.info("This janitor leads.")
                        self._lead(connection, storage, stop)
            except Unavailable as error:
                failures += 1
                log.warning("The janitor waits: %s", error)
            stop.wait(self._rest(failures))
        storage.join(END_SECONDS)

    def _rest(self, failures: int) -> float:
        """Seconds before the next try, drawn so that not all janitors try at once."""
        pace = self._farm.settings.sweep_seconds
        longest = min(pace * 2 ** min(failures, 10), MAX_REST_SECONDS)
        return random.uniform(0, longest) if failures else pace  # noqa: S311 - no secret

    def _lead(self, connection: Connection, storage: StorageWork, stop: threading.Event) -> None:
        storage.lead(True)
        try:
            while not stop.is_set():
                self.sweep(connection)
                stop.wait(self._farm.settings.sweep_seconds)
        finally:
            storage.lead(False)

    def sweep(self, connection: Connection) -> None:
        """Do everything that is due once."""
        settings = self._farm.settings
        with connection.begin():
            expired = leases.expire(connection, settings.retry_seconds)
        with connection.begin():
            gone = workers.sweep(connection, settings.worker_timeout_seconds)
            workers.archive(connection, ARCHIVE_SECONDS)
            waiting = lanes.claimable_lanes(connection)
            if time.monotonic() >= self._look_again_at:
                exports.look_again(connection)
                self._look_again_at = time.monotonic() + LOOK_AGAIN_SECONDS
            due = exports.any_due(connection)
        for lane in expired:
            log.warning("Leases of lane %s expired; their frames were requeued.", lane)
        for name in gone:
            log.warning("Worker %s was not heard of: it counts as gone.", name)
        with connection.begin():
            events.prune(connection, settings.events_days)
            sessions.prune(connection)
        for pipeline in waiting:
            if not self._farm.bells.ring(pipeline):
                break
        if due:
            self._farm.bells.ring_chores()
        jobs.follow(connection, ROWS_PER_SWEEP)
        tenants.delete_of_removed(connection)
        with connection.begin():
            removed = retention.remove_due(connection, settings.retention_days)
            retention.remove_exports(connection, settings.retention_days)
        with connection.begin():
            retention.delete_inputs(connection, settings.retention_days, INPUTS_PER_SWEEP)
        with connection.begin():
            retention.delete_rows(connection, ROWS_PER_SWEEP)
        if removed:
            log.info("Removed %d jobs that ended long ago.", len(removed))
