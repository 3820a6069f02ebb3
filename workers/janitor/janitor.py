"""The janitor: expires leases, rings again for lanes with waiting frames, and cleans up.

Several janitors may run. The leader holds a lock in Postgres; another takes over when it ends.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from farm.context import Farm
from farm.errors import Unavailable
from farm.process import beat, set_ready
from farm.services import operations
from farm.store import (
    actions,
    events,
    exports,
    faults,
    history,
    job_commands,
    lanes,
    leases,
    limits,
    retention,
    sessions,
    tenants,
    unanswered,
    usage,
    webhooks,
    workers,
)
from farm.store import operations as stored_operations
from farm.store.engine import Connection
from farm.store.leadership import leadership
from workers.janitor.leader_thread import LeaderThread
from workers.janitor.storage_cleaner import StorageCleaner

log = logging.getLogger(__name__)

ARCHIVE_SECONDS = 86_400.0
LOOK_AGAIN_SECONDS = 60.0
"""Interval between two checks for shards that missed their event, in seconds."""
RECORD_SECONDS = 20.0
"""Interval in which lanes are sampled, and faults and usage noted. Each minute has one sample."""
INPUTS_PER_SWEEP = 10
"""Inputs that one sweep deletes, each with its lines."""
ROWS_PER_SWEEP = 5000
"""Maximum number of rows of removed jobs that a sweep deletes per table.

Also the maximum number of requeued frames that it updates after their jobs.
"""

MAX_REST_SECONDS = 10.0
"""Maximum pause between two tries while Postgres does not answer, in seconds."""

END_SECONDS = 5.0


@dataclass
class JanitorStatus:
    """State of a janitor, for its port. Its thread writes this; any thread may read it."""

    turned_at: float = field(default_factory=time.monotonic)
    """Time of the last turn of its loop, on the monotonic clock. A turn needs no server."""
    leading: bool = False
    """True while it is the leader."""
    swept_at: float | None = None
    """End of its last sweep, as a Unix time."""


class Janitor:
    """Sweeps every `sweep_seconds` while it is the leader."""

    def __init__(self, farm: Farm) -> None:
        self.status = JanitorStatus()
        self._farm = farm
        settings = farm.settings
        self._look_again_at = 0.0
        self._record_at = 0.0
        self._patience = max(settings.transaction_seconds, 3 * settings.sweep_seconds)

    def run(self, stop: threading.Event) -> None:
        """Sweep until `stop` is set. An outage of Postgres is logged, and does not end it."""
        pace = self._farm.settings.sweep_seconds
        threads = [
            LeaderThread("storage-work", StorageCleaner(self._farm).step, pace, stop),
            LeaderThread("operations", partial(operations.take_turn, self._farm), pace, stop),
        ]
        for thread in threads:
            thread.start()
        failures = 0
        while not stop.is_set():
            self._turn()
            try:
                with leadership(self._farm.store, self._patience) as connection:
                    failures = 0
                    set_ready(self._farm.settings.run_dir, ready=True)
                    if connection is not None:
                        log.info("This janitor is the leader.")
                        self._lead(connection, threads, stop)
            except Unavailable as error:
                failures += 1
                log.warning("The janitor waits for Postgres: %s", error)
            stop.wait(self._rest(failures))
        for thread in threads:
            thread.join(END_SECONDS)

    def _turn(self) -> None:
        self.status.turned_at = time.monotonic()
        beat(self._farm.settings.run_dir)

    def _rest(self, failures: int) -> float:
        """Random pause before the next try in seconds, so that janitors do not try together."""
        pace = self._farm.settings.sweep_seconds
        longest = min(pace * 2 ** min(failures, 10), MAX_REST_SECONDS)
        return random.uniform(0, longest) if failures else pace  # noqa: S311 - no secret

    def _lead(
        self, connection: Connection, threads: Sequence[LeaderThread], stop: threading.Event
    ) -> None:
        for thread in threads:
            thread.lead(True)
        self.status.leading = True
        try:
            while not stop.is_set():
                self._turn()
                self.sweep(connection)
                self.status.swept_at = time.time()
                stop.wait(self._farm.settings.sweep_seconds)
        finally:
            self.status.leading = False
            for thread in threads:
                thread.lead(False)

    def sweep(self, connection: Connection) -> None:
        """Run each task of a sweep once."""
        settings = self._farm.settings
        for job_id, missed in job_commands.cancel_late_jobs(connection):
            log.info("Job %s missed its deadline, %s: it was cancelled.", job_id, missed)
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
        with connection.begin():
            limits.fold_device_use(connection, ROWS_PER_SWEEP)
        for lane in expired:
            log.warning("Leases of lane %s expired; their frames were requeued.", lane)
        for name in gone:
            log.warning("Worker %s sent no heartbeat; it counts as gone.", name)
        with connection.begin():
            events.prune(connection, settings.events_days)
            actions.prune(connection, settings.actions_days, ROWS_PER_SWEEP)
            stored_operations.prune(connection, settings.actions_days, ROWS_PER_SWEEP)
            sessions.prune(connection)
            unanswered.prune(connection)
        for pipeline in waiting:
            if not self._farm.bells.ring(pipeline):
                break
        if due:
            self._farm.bells.ring_exporter()
        job_commands.follow(connection, ROWS_PER_SWEEP)
        tenants.delete_of_removed(connection)
        with connection.begin():
            removed = retention.remove_due(connection, settings.retention_days)
            retention.remove_exports(connection, settings.retention_days)
        with connection.begin():
            for webhook_id, tenant_id, why in webhooks.disable_failing(connection):
                about = {"webhook": str(webhook_id), "reason": why}
                events.append(connection, tenant_id, "webhook.disabled", about)
        webhooks.clean_up(connection, ROWS_PER_SWEEP)
        if time.monotonic() >= self._record_at:
            with connection.begin():
                history.sample(connection)
            with connection.begin():
                faults.note(connection, settings.actions_days)
            with connection.begin():
                usage.account(connection)
            self._record_at = time.monotonic() + RECORD_SECONDS
        with connection.begin():
            retention.delete_inputs(connection, settings.retention_days, INPUTS_PER_SWEEP)
        with connection.begin():
            retention.delete_rows(connection, ROWS_PER_SWEEP)
            retention.forget_keys(connection, ROWS_PER_SWEEP)
        if removed:
            log.info("Removed %d jobs whose retention time is over.", len(removed))
