"""The parent: no device, only the heartbeat; it outlives its child, and says so when it dies."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Collection, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import billiard
from celery.exceptions import SecurityWarning, WorkerLostError
from celery.signals import task_failure, worker_shutting_down

from farm.bells import lane
from farm.config import Settings
from farm.context import Farm, open_farm
from farm.errors import FarmError, Unavailable
from farm.store import leases, workers
from farm.store.circuit_breaker import note_failure
from farm.store.engine import Connection, transaction
from workers.render.identity import KNOCK, Identity, new_identity
from workers.render.scratch import NO_LEASE, Scratch

log = logging.getLogger(__name__)

LEAVE_SECONDS = 5.0
"""What giving a batch back and ending a child may take."""

ENDED = "The worker's child ended."

EXPLAIN_SECONDS = 1.0
"""How long a child may be gone before Celery says how it ended."""

OUTAGE_PATIENCE_SECONDS = 60.0
"""After Postgres was away no step may have been told for long, though all went well."""


class WorkerSupervisor:
    """Renews the worker's leases, ends a hung child, and returns what a dead child held."""

    def __init__(self, farm: Farm, identity: Identity, scratch: Scratch) -> None:
        self._farm = farm
        self._identity = identity
        self._scratch = scratch
        self._wake = threading.Event()
        self._over = threading.Event()
        self._draining = False
        self._own_signal = False
        self._give_up_at = float("inf")
        self._given_up = False
        self._leaving = False
        self._outage = float("-inf")
        self._last_words: str | None = None
        self._unexplained: set[int] = set()
        """Children that are gone, and nobody said yet how they ended"""
        self._hung: dict[int, str] = {}
        self._adrift: dict[int, tuple[uuid.UUID, float]] = {}
        """Children at a batch whose lease is gone: which, and since when"""
        self._thread = threading.Thread(target=self._run, name="heart", daemon=True)

    def start(self) -> None:
        """Begin to beat, in a thread of its own."""
        self._thread.start()

    def drain(self) -> None:
        """Let the worker claim nothing more; returns at once.

        Its batch may be finished within `grace_seconds`, less what it takes to give it back. Asked
        a second time, it is given back now.
        """
        if self._own_signal:  # what was asked from afar, come back from Celery
            self._own_signal = False
            return
        now = time.monotonic()
        grace = self._farm.settings.grace_seconds
        self._give_up_at = now if self._draining else now + grace - min(LEAVE_SECONDS, grace / 2)
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
                if time.monotonic() >= self._give_up_at:
                    self._give_up()
                self._beat()
            except Unavailable as error:
                self._outage = time.monotonic()
                log.warning("%s: heartbeat missed: %s", self._identity.name, error)
            except Exception:
                log.exception("%s: heartbeat failed", self._identity.name)
            pause = self._farm.settings.heartbeat_seconds
            if self._unexplained:
                pause = min(pause, EXPLAIN_SECONDS)
            left = max(0.0, self._give_up_at - time.monotonic())
            self._wake.wait(min(pause, left))

    def _beat(self) -> None:
        settings, me = self._farm.settings, self._identity.id
        if self._given_up:
            self._give_back()
            return
        # Two transactions: a commit locks the lease before the worker's row, so this must not
        # hold the one while it waits for the other.
        with transaction(self._farm.store) as connection:
            held = leases.renew(connection, me, settings.lease_seconds)
        with transaction(self._farm.store) as connection:
            draining = workers.seen(connection, me)
            if draining is None:  # stopped for so long that its row was folded
                enlist(connection, self._identity)
            if self._draining:
                workers.drain(connection, me)
            missed = workers.misses_work(connection, me)
        if missed:
            self._knock()
        if draining and not self._draining:
            log.info("%s was asked to drain.", self._identity.name)
            self.drain()
            self._own_signal = True
            os.kill(os.getpid(), signal.SIGTERM)
        if time.monotonic() - self._outage > OUTAGE_PATIENCE_SECONDS:
            self._end_hung(held)
            self._end_adrift({lease.id for lease in held})
        gone = {lease.pid for lease in held if not is_child(lease.pid)}
        for pid in gone:
            if self._is_explained(pid):
                self._return_lost(pid)
        self._unexplained &= gone

    def _knock(self) -> None:
        """Wake the child: it is idle while something waits, so a bell was lost or never rung."""
        for child in billiard.active_children():
            if child.pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(child.pid, KNOCK)

    def _is_explained(self, pid: int) -> bool:
        """Whether it is known how a child ended, or nobody will say it any more."""
        if self._last_words or pid in self._hung or pid in self._unexplained or self._leaving:
            self._unexplained.discard(pid)
            return True
        self._unexplained.add(pid)
        return False

    def _end_hung(self, held: Sequence[Any]) -> None:
        """End a child that shows no step, and stores no picture, for too long.

        What is on its device tells; where nothing is, all that its tail has in hand: of what waits
        for the storage only the first is looked after again and again.
        """
        patience = timedelta(seconds=self._farm.settings.step_timeout_seconds)
        for pid in {lease.pid for lease in held if is_running_child(lease.pid)}:
            own, device = [lease for lease in held if lease.pid == pid], self._scratch.held_by(pid)
            judged = [lease for lease in own if lease.id == device] or own
            still = min(lease.still for lease in judged)
            if still > patience:
                log.error("%s: child %s hangs; ended", self._identity.name, pid)
                seconds = still.total_seconds()
                self._hung[pid] = f"It showed no step for {seconds:.0f} s, and was ended."
                os.kill(pid, signal.SIGKILL)

    def _end_adrift(self, held: Collection[uuid.UUID]) -> None:
        """End a child that stays at a batch whose lease is lost.

        Between two steps it would have seen that nobody wants it; no lease tells of it any more.
        """
        before, self._adrift = self._adrift, {}
        now = time.monotonic()
        for pid in filter(is_running_child, self._scratch.noted()):
            device = self._scratch.held_by(pid)
            if device in (None, NO_LEASE) or device in held:
                continue
            assert device is not None
            known, since = before.get(pid, (device, now))
            self._adrift[pid] = device, since if known == device else now
            seconds = now - self._adrift[pid][1]
            if seconds > self._farm.settings.step_timeout_seconds:
                log.error(
                    "%s: child %s has stayed at lease %s for %.0f s since it was lost; ended",
                    self._identity.name,
                    pid,
                    device,
                    seconds,
                )
                os.kill(pid, signal.SIGKILL)

    def _return_lost(self, pid: int) -> None:
        settings, me = self._farm.settings, self._identity.id
        message, tail = self._hung.get(pid, self._last_words or ENDED), self._scratch.log_tail(pid)
        on_device = self._scratch.held_by(pid)
        with transaction(self._farm.store) as connection:
            lost = leases.end_child_leases(
                connection, me, pid, message, settings.retry_seconds, tail, on_device
            )
            for _, fence in lost:
                if fence is not None:
                    note_failure(connection, me, fence[0], fence[1], settings.trip_seconds)
        self._scratch.forget(pid)
        self._hung.pop(pid, None)
        self._last_words = None
        for pipeline, fence in lost:
            which = "beside it" if fence is None else "of job {} frame {} attempt {}".format(*fence)
            log.warning("%s: %s The batch %s was requeued.", self._identity.name, message, which)
            self._farm.bells.ring(pipeline)

    def _give_up(self) -> None:
        """End the child, and so let Celery stop; what it held is given back with the next beat."""
        log.warning("%s gives its batch back and leaves", self._identity.name)
        self._give_up_at, self._given_up = float("inf"), True
        # Celery may wait for a Redis that does not answer.
        abandon = threading.Timer(LEAVE_SECONDS / 2, self._abandon)
        abandon.daemon = True
        abandon.start()
        for pid in [child.pid for child in billiard.active_children()]:
            if pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _give_back(self) -> None:
        with transaction(self._farm.store) as connection:
            lanes = leases.release_all(connection, self._identity.id)
        for pipeline in lanes:
            self._farm.bells.ring(pipeline)

    def _abandon(self) -> None:
        log.warning("%s ends: Celery did not stop in time", self._identity.name)
        goodbye = threading.Thread(target=self.leave, daemon=True)
        goodbye.start()
        goodbye.join(LEAVE_SECONDS / 2 - 0.5)
        os._exit(0)

    def leave(self) -> None:
        """Return what a child that ended still held, and say that the worker is gone."""
        self._leaving = True
        try:
            self._beat()
            with transaction(self._farm.store) as connection:
                workers.leave(connection, self._identity.id)
        except FarmError as error:
            log.warning("%s left without saying so: %s", self._identity.name, error)


def is_child(pid: int) -> bool:
    """Whether a process is this one's child: it runs, or Celery has not read its exit code yet.

    A number alone would not do: the system gives that of a child that ended to another process.
    """
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def is_running_child(pid: int) -> bool:
    """Whether a process is this one's child and runs; its exit code is left for Celery to read."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:
        return False


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
    # Until Celery answers it: leave in order.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    identity = new_identity(pipeline)
    identity.announce()
    scratch = Scratch(settings.scratch_dir, identity.id)
    with scratch.held():
        with transaction(farm.store) as connection:
            enlist(connection, identity)
        heart = WorkerSupervisor(farm, identity, scratch)
        _connect(heart)
        heart.start()
        try:
            return _serve(pipeline, identity)
        finally:
            heart.stop()
            heart.leave()
            farm.close()


def _connect(heart: WorkerSupervisor) -> None:
    def on_shutting_down(**_: Any) -> None:
        heart.drain()

    def on_failure(exception: BaseException | None = None, **_: Any) -> None:
        if isinstance(exception, WorkerLostError):
            heart.child_lost(str(exception))

    worker_shutting_down.connect(on_shutting_down, weak=False)
    task_failure.connect(on_failure, weak=False)


def _serve(pipeline: str, identity: Identity) -> int:
    from workers.render.celery_app import app

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
