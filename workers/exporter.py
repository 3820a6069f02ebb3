"""The exporter: a process without a device. It writes datasets shard by shard, on its own lane."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from celery.exceptions import SecurityWarning
from celery.signals import setup_logging, worker_ready, worker_shutting_down

from farm.bells import EXPORTER_LANE, EXPORTER_TASK, make_app
from farm.config import Settings
from farm.context import Farm, open_farm
from farm.errors import FarmError, Unavailable, one_line
from farm.process import beat, set_ready, set_up_logs
from farm.services.exports.shard_writer import ShardWriter, Stopped
from farm.store import exports
from farm.store.engine import one_statement
from farm.store.exports import Shard

log = logging.getLogger(__name__)

MAX_CHARACTERS = 500
"""Maximum length of a shard's error message, in characters."""
POLL_SECONDS = 5.0
END_SECONDS = 5.0
MAX_CONCURRENT_SHARDS = 2
"""Bells that one process answers at the same time."""


class Exporter:
    """Writes shards whose frames have ended: several at a time, each of a different tenant."""

    def __init__(self, farm: Farm, name: str) -> None:
        self._farm = farm
        self._name = name
        self._leaves = threading.Event()
        self._claiming = threading.Lock()
        self._busy: set[uuid.UUID] = set()
        """Tenants of the shards that are being written."""

    def leave(self) -> None:
        """Stop soon. The current shards are released, and another process writes them again."""
        self._leaves.set()

    def answer(self) -> None:
        """Answer a bell: write shards until none is due."""
        try:
            while not self._leaves.is_set() and (shard := self._claim()) is not None:
                try:
                    self._write(shard)
                finally:
                    with self._claiming:
                        self._busy.discard(shard.tenant_id)
        except Unavailable as error:
            log.warning("%s waits for the next bell: %s", self._name, error)

    def poll(self) -> None:
        """Look for work regularly until `leave`: a bell may be lost, or Redis may not answer."""
        while not self._leaves.wait(POLL_SECONDS):
            beat(self._farm.settings.run_dir)
            try:
                with one_statement(self._farm.store) as connection:
                    due = exports.any_due(connection)
                if due:
                    self.answer()
            except Unavailable as error:
                log.warning("%s could not check for due shards: %s", self._name, error)
            except Exception:
                log.exception("%s failed to check for due shards", self._name)

    def _claim(self) -> Shard | None:
        with self._claiming:
            with one_statement(self._farm.store) as connection:
                shard = exports.claim_shard(
                    connection, self._name, self._farm.settings.lease_seconds, self._busy
                )
            if shard is not None:
                self._busy.add(shard.tenant_id)
            return shard

    def _write(self, shard: Shard) -> None:
        try:
            with self._held(shard) as lost:
                writer = ShardWriter(
                    self._farm, lambda: not (self._leaves.is_set() or lost.is_set())
                )
                files, pictures, missing = writer.write(shard)
            with one_statement(self._farm.store) as connection:
                held = exports.finish(connection, shard, files, rows=pictures, missing=missing)
            if not held:
                log.warning("%s lost the lease of %s; another process writes it", self._name, shard)
        except Stopped:
            log.info("%s stopped writing %s", self._name, shard)
            with one_statement(self._farm.store) as connection:
                exports.give_back(connection, shard)
        except Exception as error:
            log.exception("%s could not write %s", self._name, shard)
            said = error.message if isinstance(error, FarmError) else type(error).__name__
            why = one_line(said, MAX_CHARACTERS)
            # A server that does not answer comes back. A deleted picture does not.
            counts = not (isinstance(error, Unavailable) and error.retryable)
            with one_statement(self._farm.store) as connection:
                exports.fail(connection, shard, why, counts=counts)

    @contextmanager
    def _held(self, shard: Shard) -> Iterator[threading.Event]:
        """Renew a shard's lease in the block. Yield an event, set once the lease may be lost."""
        over, lost = threading.Event(), threading.Event()
        seconds = self._farm.settings.lease_seconds
        ends_at = time.monotonic() + seconds

        def renew() -> None:
            nonlocal ends_at
            while not over.wait(seconds / 4):
                beat(self._farm.settings.run_dir)  # this shard may occupy the thread of `poll`
                asked = time.monotonic()
                try:
                    with one_statement(self._farm.store) as connection:
                        if not exports.renew(connection, shard, seconds):
                            lost.set()
                            return
                    ends_at = asked + seconds
                except Unavailable as error:
                    log.warning("%s: the lease of %s was not renewed: %s", self._name, shard, error)
                    if time.monotonic() >= ends_at:  # another process may write it now
                        lost.set()
                        return

        thread = threading.Thread(target=renew, name="shard-lease", daemon=True)
        thread.start()
        try:
            yield lost
        finally:
            over.set()
            thread.join()


def run_exporter(settings: Settings) -> int:
    """Run an exporter until SIGTERM. Return the exit code."""
    farm = open_farm(settings)
    host = socket.gethostname()
    exporter = Exporter(farm, f"exporter-{os.getpid()}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until Celery handles it
    app = make_app(settings)

    @setup_logging.connect(weak=False)
    def set_up(**_: object) -> None:
        set_up_logs(settings.log_level)

    @worker_ready.connect(weak=False)
    def ready(**_: object) -> None:
        set_ready(settings.run_dir, ready=True)

    @worker_shutting_down.connect(weak=False)
    def shutting_down(**_: object) -> None:
        exporter.leave()

    @app.task(name=EXPORTER_TASK, ignore_result=True)
    def answer() -> None:
        exporter.answer()

    warnings.simplefilter("ignore", SecurityWarning)  # about pickled messages; none are used
    worker = app.Worker(
        hostname=f"exporter-{os.getpid()}@{host}",
        queues=[EXPORTER_LANE],
        pool="threads",
        concurrency=MAX_CONCURRENT_SHARDS,
        without_gossip=True,
        without_mingle=True,
        quiet=True,
    )
    poll = threading.Thread(target=exporter.poll, name="poll", daemon=True)
    poll.start()
    try:
        worker.start()
        return int(worker.exitcode or 0)
    finally:
        exporter.leave()
        poll.join(END_SECONDS)
        farm.close()
