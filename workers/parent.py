"""The parent: no device, only the heartbeat; it outlives its child, and says so when it dies."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import warnings
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from celery.exceptions import SecurityWarning, WorkerLostError
from celery.signals import task_failure, worker_shutting_down

from farm.bells import lane
from farm.config import Settings
from farm.context import Farm, open_farm
from farm.errors import FarmError, Unavailable
from farm.store import frames, workers
from farm.store.engine import Connection, transaction
from workers.identity import Identity, new_identity

log = logging.getLogger(__name__)

OUTAGE_PATIENCE_SECONDS = 60.0
"""After Postgres was away no step may have been told for long, though all went well."""


class Heart:
    """Renews the worker's leases, ends a hung child, and returns what a dead child held."""

    def __init__(self, farm: Farm, identity: Identity) -> None:
        self._farm = farm
        self._identity = identity
        self._wake = threading.Event()
        self._over = threading.Event()
        self._draining = False
        self._outage = float("-inf")
        self._last_words = "The worker's child ended."
        self._thread = threading.Thread(target=self._run, name="heart", daemon=True)

    def start(self) -> None:
        """Begin to beat, in a thread of its own."""
        self._thread.start()

    def drain(self) -> None:
        """Let the worker claim nothing more; returns at once."""
        self._draining = True
        self._wake.set()

    def child_lost(self, last_words: str) -> None:
        """Look after what a child held that has just ended; returns at once."""
        self._last_words = last_words
        self._wake.set()

    def stop(self) -> None:
        """End the thread."""
        self._over.set()
        self._wake.set()
        self._thread.join(timeout=30)

    def _run(self) -> None:
        while not self._over.is_set():
            self._wake.clear()
            try:
                self._beat()
            except Unavailable as error:
                self._outage = time.monotonic()
                log.warning("%s: heartbeat missed: %s", self._identity.name, error)
            except Exception:
                log.exception("%s: heartbeat failed", self._identity.name)
            self._wake.wait(self._farm.settings.heartbeat_seconds)

    def _beat(self) -> None:
        settings, me = self._farm.settings, self._identity.id
        # Two transactions: a commit locks the lease before the worker's row, so this must not
        # hold the one while it waits for the other.
        with transaction(self._farm.store) as connection:
            held = frames.renew(connection, me, settings.lease_seconds)
        with transaction(self._farm.store) as connection:
            if not workers.seen(connection, me):  # stopped for so long that its row was folded
                enlist(connection, self._identity)
            if self._draining:
                workers.drain(connection, me)
        if time.monotonic() - self._outage > OUTAGE_PATIENCE_SECONDS:
            self._end_hung(held)
        gone = [lease.pid for lease in held if not is_alive(lease.pid)]
        if gone:
            self._return_lost(gone)

    def _end_hung(self, held: Sequence[Any]) -> None:
        """End a child that shows no step, and stores no picture, for too long."""
        patience = timedelta(seconds=self._farm.settings.step_timeout_seconds)
        for lease in held:
            if lease.still > patience and is_alive(lease.pid):
                log.error("%s: child %s hangs; ended", self._identity.name, lease.pid)
                os.kill(lease.pid, signal.SIGKILL)

    def _return_lost(self, pids: list[int]) -> None:
        with transaction(self._farm.store) as connection:
            lanes = frames.lose(
                connection,
                self._identity.id,
                pids,
                self._last_words,
                self._farm.settings.retry_seconds,
            )
        for pipeline in lanes:
            log.warning("%s: %s Its batch was returned.", self._identity.name, self._last_words)
            self._farm.bells.ring(pipeline)

    def leave(self) -> None:
        """Return what a child that ended still held, and say that the worker is gone."""
        try:
            self._beat()
            with transaction(self._farm.store) as connection:
                workers.leave(connection, self._identity.id)
        except FarmError as error:
            log.warning("%s left without saying so: %s", self._identity.name, error)


def is_alive(pid: int) -> bool:
    """Whether a process of this host exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def enlist(connection: Connection, identity: Identity) -> None:
    """Add the worker to those that are alive."""
    workers.register(
        connection,
        identity.id,
        name=identity.name,
        pipeline=identity.pipeline,
        host=identity.host,
        pid=identity.pid,
    )


def run_worker(settings: Settings, pipeline: str) -> int:
    """Be a worker of one lane until SIGTERM; returns the exit code.

    Raises:
        InvalidRequest: the catalog has no such pipeline.
        Unavailable: Postgres cannot be reached.
    """
    farm = open_farm(settings)
    farm.entry(pipeline)
    identity = new_identity(pipeline)
    identity.announce()
    with transaction(farm.store) as connection:
        enlist(connection, identity)
    heart = Heart(farm, identity)
    _connect(heart)
    heart.start()
    try:
        return _serve(pipeline, identity)
    finally:
        heart.stop()
        heart.leave()
        farm.close()


def _connect(heart: Heart) -> None:
    def on_shutting_down(**_: Any) -> None:
        heart.drain()

    def on_failure(exception: BaseException | None = None, **_: Any) -> None:
        if isinstance(exception, WorkerLostError):
            heart.child_lost(str(exception))

    worker_shutting_down.connect(on_shutting_down, weak=False)
    task_failure.connect(on_failure, weak=False)


def _serve(pipeline: str, identity: Identity) -> int:
    from workers.app import app

    # It warns of pickled messages under root; this app takes JSON only.
    warnings.simplefilter("ignore", SecurityWarning)

    worker = app.Worker(
        hostname=f"{identity.name}@{identity.host}",
        queues=[lane(pipeline)],
        pool="prefork",
        concurrency=1,
        without_gossip=True,
        without_mingle=True,
        quiet=True,
    )
    worker.start()
    return int(worker.exitcode or 0)
