"""The parent process: sends the heartbeat, uses no device, and reports when its child dies."""

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

import billiard
from celery.exceptions import SecurityWarning, WorkerLostError
from celery.signals import task_failure, worker_shutting_down

from farm.bells import lane
from farm.config import Settings
from farm.context import Farm, open_farm
from farm.errors import FarmError, InvalidRequest, Unavailable
from farm.pipelines.resolve import uses_gpu
from farm.pipelines.runtime.gpus import VISIBLE, Gpu, list_gpus
from farm.process import beat
from farm.store import leases, workers
from farm.store.circuit_breaker import note_failure
from farm.store.engine import Connection, transaction
from workers.render.identity import KNOCK, Identity, new_identity
from workers.render.scratch import NO_LEASE, Scratch

log = logging.getLogger(__name__)

LEAVE_SECONDS = 5.0
"""Time for releasing a batch and ending a child, in seconds."""

ENDED = "The worker's child ended."

EXPLAIN_SECONDS = 1.0
"""Time in which Celery should report how a child ended, in seconds."""

OUTAGE_PATIENCE_SECONDS = 60.0
"""Time after an outage of Postgres in which no child counts as hung, in seconds.

During the outage no steps could be reported.
"""


class WorkerSupervisor:
    """Renews the worker's leases, kills a hung child, and requeues the frames of a dead child."""

    def __init__(
        self, farm: Farm, identity: Identity, scratch: Scratch, gpu: Gpu | None = None
    ) -> None:
        self._farm = farm
        self._identity = identity
        self._gpu = gpu
        self._scratch = scratch
        self._wake = threading.Event()
        self._told = threading.Event()
        self._over = threading.Event()
        self._draining = False
        self._asked_at: float | None = None
        """Time of a request to drain that was not taken back."""
        self._own_signal = False
        self._give_up_at = float("inf")
        self._given_up = False
        self._leaving = False
        self._outage = float("-inf")
        self._last_words: str | None = None
        self._unexplained: set[int] = set()
        """Process IDs of dead children whose cause of death is not known yet."""
        self._hung: dict[int, str] = {}
        self._adrift: dict[int, tuple[uuid.UUID, float]] = {}
        """Children with a batch whose lease is lost: the lease, and the time it was first seen."""
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._leaver = threading.Thread(target=self._keep_grace, name="grace", daemon=True)

    def start(self) -> None:
        """Start the heartbeat, and what ends the process in time, in separate threads."""
        self._thread.start()
        self._leaver.start()

    def drain(self) -> None:
        """Stop further claims of the worker. Return at once.

        The current batch may finish within `grace_seconds`, less the time to release it. A second
        call releases it now.
        """
        if self._own_signal:  # sent by `_heartbeat` on a remote request, returned by Celery
            self._own_signal = False
            return
        self._leave_within(0.0 if self._draining else self._grace())

    def _leave_within(self, seconds: float) -> None:
        self._give_up_at = time.monotonic() + seconds
        self._draining = True
        self._told.set()
        self._wake.set()

    def child_lost(self, last_words: str) -> None:
        """Start to requeue the frames of a child that has just died. Return at once."""
        self._last_words = last_words
        self._wake.set()

    def stop(self) -> None:
        """End the thread."""
        self._over.set()
        self._wake.set()
        self._thread.join(timeout=30)

    def _run(self) -> None:
        while not self._over.is_set():
            beat(self._farm.settings.run_dir)
            self._wake.clear()
            try:
                self._heartbeat()
            except Unavailable as error:
                self._outage = time.monotonic()
                log.warning("%s: heartbeat missed: %s", self._identity.name, error)
            except Exception:
                log.exception("%s: heartbeat failed", self._identity.name)
            pause = self._farm.settings.heartbeat_seconds
            if self._unexplained:
                pause = min(pause, EXPLAIN_SECONDS)
            self._wake.wait(pause)

    def _heartbeat(self) -> None:
        settings, me = self._farm.settings, self._identity.id
        if self._given_up:
            self._give_back()
            return
        # Two transactions: a commit locks the lease before the worker's row, so this must not
        # hold the one while it waits for the other.
        with transaction(self._farm.store) as connection:
            held = leases.renew(connection, me, settings.lease_seconds)
        with transaction(self._farm.store) as connection:
            draining = workers.seen(connection, me, self._scratch.spooled_bytes())
            if draining is None:  # its row was archived while this process was stopped
                enlist(connection, self._identity, self._gpu, settings.spool_bytes)
            if self._draining:
                workers.drain(connection, me)
            knock = workers.needs_a_knock(connection, me)
        if knock:
            self._knock()
        self._heed(asked=bool(draining), busy=bool(held))
        if time.monotonic() - self._outage > OUTAGE_PATIENCE_SECONDS:
            self._end_hung(held)
            self._end_adrift({lease.id for lease in held})
        gone = {lease.pid for lease in held if not is_child(lease.pid)}
        if self._given_up:  # the grace has ended since the beginning: a killed child is no failure
            self._give_back()
            return
        for pid in gone:
            if self._is_explained(pid):
                self._return_lost(pid)
        self._unexplained &= gone

    def _heed(self, *, asked: bool, busy: bool) -> None:
        """Leave if a drain was requested. While a batch is rendered, it may be taken back."""
        if self._draining:
            return
        if asked and self._asked_at is None:
            log.info("%s received a request to drain.", self._identity.name)
            self._asked_at = time.monotonic()
        elif not asked and self._asked_at is not None:
            log.info("%s goes on: the request to drain was taken back.", self._identity.name)
            self._asked_at = None
        if self._asked_at is not None:
            left = self._asked_at + self._grace() - time.monotonic()
            if not busy or left <= 0:
                self._leave_within(max(left, 0))
                self._own_signal = True
                os.kill(os.getpid(), signal.SIGTERM)

    def _grace(self) -> float:
        """Return the time in which the current batch may finish, in seconds."""
        grace = self._farm.settings.grace_seconds
        return grace - min(LEAVE_SECONDS, grace / 2)

    def _knock(self) -> None:
        """Wake the child: it missed a bell, or may try again to load its pipeline."""
        for child in billiard.active_children():
            if child.pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(child.pid, KNOCK)

    def _is_explained(self, pid: int) -> bool:
        """Return True if the cause of a child's death is known, or will stay unknown."""
        if self._last_words or pid in self._hung or pid in self._unexplained or self._leaving:
            self._unexplained.discard(pid)
            return True
        self._unexplained.add(pid)
        return False

    def _end_hung(self, held: Sequence[leases.RenewedLease]) -> None:
        """Kill a child that reports no step, and stores no picture, for too long.

        The batch on its device decides. Without one, all its unfinished batches count: of those
        that wait for the storage, only the first shows progress.
        """
        patience = timedelta(seconds=self._farm.settings.step_timeout_seconds)
        for pid in {lease.pid for lease in held if is_running_child(lease.pid)}:
            own, device = [lease for lease in held if lease.pid == pid], self._scratch.held_by(pid)
            judged = [lease for lease in own if lease.id == device] or own
            still = min(lease.still for lease in judged)
            if still > patience:
                log.error("%s: child %s hangs; killed", self._identity.name, pid)
                seconds = still.total_seconds()
                self._hung[pid] = f"It reported no step for {seconds:.0f} s, and was killed."
                os.kill(pid, signal.SIGKILL)

    def _end_adrift(self, held: Collection[uuid.UUID]) -> None:
        """Kill a child that keeps a batch whose lease is lost.

        Between two steps it would have noticed the loss. No lease shows its progress any more.
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
                    "%s: child %s kept the batch of lost lease %s for %.0f s; killed",
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
            which = "of job {} frame {} attempt {}".format(*fence) if fence else "off the device"
            log.warning("%s: %s The batch %s was requeued.", self._identity.name, message, which)
            self._farm.bells.ring(pipeline)

    def _keep_grace(self) -> None:
        """Give the batch back when the grace ends, and exit, even if a server does not answer.

        The heartbeat may wait for Postgres, and Celery for Redis.
        """
        while (left := self._give_up_at - time.monotonic()) > 0:
            self._told.wait(min(left, threading.TIMEOUT_MAX))
            self._told.clear()
        try:
            self._give_up()
        finally:
            time.sleep(LEAVE_SECONDS / 2)
            self._abandon()

    def _give_up(self) -> None:
        """Kill the child, so that Celery stops. The next heartbeat releases its leases."""
        log.warning("%s releases its batch and leaves", self._identity.name)
        self._given_up = True
        for pid in [child.pid for child in billiard.active_children()]:
            if pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._wake.set()

    def _give_back(self) -> None:
        with transaction(self._farm.store) as connection:
            lanes = leases.release_all(connection, self._identity.id)
        for pipeline in lanes:
            self._farm.bells.ring(pipeline)

    def _abandon(self) -> None:
        log.warning("%s exits: it did not stop in time", self._identity.name)
        goodbye = threading.Thread(target=self.leave, daemon=True)
        goodbye.start()
        goodbye.join(LEAVE_SECONDS / 2 - 0.5)
        os._exit(0)

    def leave(self) -> None:
        """Requeue the frames of a dead child, and record that the worker is gone."""
        self._leaving = True
        try:
            self._heartbeat()
            with transaction(self._farm.store) as connection:
                workers.leave(connection, self._identity.id)
        except FarmError as error:
            log.warning("%s left, but could not record it: %s", self._identity.name, error)


def is_child(pid: int) -> bool:
    """Return True if a process is a child: it runs, or Celery has not read its exit code yet.

    The process ID is not enough: the system reuses the ID of an ended child.
    """
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def is_running_child(pid: int) -> bool:
    """Return True if a process is a running child. Its exit code is left for Celery to read."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:
        return False


def enlist(
    connection: Connection,
    identity: Identity,
    gpu: Gpu | None = None,
    spool_limit_bytes: int | None = None,
) -> None:
    """Register the worker as alive."""
    workers.register(
        connection,
        identity.id,
        name=identity.name,
        pipeline=identity.pipeline,
        host=identity.host,
        pid=identity.pid,
        device_id=gpu.id if gpu else None,
        device_bytes=gpu.bytes if gpu else None,
        spool_limit_bytes=spool_limit_bytes,
    )


def choose_gpu(connection: Connection, gpus: Sequence[Gpu], number: int | None) -> Gpu | None:
    """Choose the device with this number, or the one with the fewest workers.

    Until the transaction ends, no other worker chooses.

    Returns:
        None if there are no devices and no number is given.

    Raises:
        InvalidRequest: there is no device with this number.
    """
    if number is not None:
        if number >= len(gpus):
            there = f"0 to {len(gpus) - 1}" if gpus else "none"
            raise InvalidRequest(
                f"--device: there is no CUDA device {number} here. Devices: {there}.",
                param="device",
            )
        return gpus[number]
    if not gpus:
        return None
    found = workers.workers_by_device(connection, [gpu.id for gpu in gpus])
    return min(gpus, key=lambda gpu: found[gpu.id])


def run_worker(settings: Settings, pipeline: str, device: int | None = None) -> int:
    """Run a worker of one lane until SIGTERM. Return the exit code.

    Args:
        settings: settings of the farm.
        pipeline: name of the lane.
        device: number of its CUDA device; None: the one with the fewest workers.

    Raises:
        InvalidRequest: the catalog has no such pipeline, or the machine no such device.
        Unavailable: Postgres cannot be reached.
    """
    farm = open_farm(settings)
    entry, gpus = farm.entry(pipeline), list_gpus(settings)
    if gpus and not uses_gpu(pipeline, entry):  # reads the checkpoint, so only if it matters
        gpus = []
    # Until Celery handles it: exit in order.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    identity = new_identity(pipeline)
    identity.announce()
    scratch = Scratch(settings.scratch_dir, identity.id)
    with scratch.held():
        with transaction(farm.store) as connection:
            gpu = choose_gpu(connection, gpus, device)
            enlist(connection, identity, gpu, settings.spool_bytes)
        if gpu is not None:  # the child sees this device only
            log.info("%s uses %s (%s)", identity.name, gpu.name, gpu.token)
            os.environ[VISIBLE] = gpu.token
        supervisor = WorkerSupervisor(farm, identity, scratch, gpu)
        _connect(supervisor)
        supervisor.start()
        try:
            return _serve(pipeline, identity)
        finally:
            supervisor.stop()
            supervisor.leave()
            farm.close()


def _connect(supervisor: WorkerSupervisor) -> None:
    def on_shutting_down(**_: object) -> None:
        supervisor.drain()

    def on_failure(exception: BaseException | None = None, **_: object) -> None:
        if isinstance(exception, WorkerLostError):
            supervisor.child_lost(str(exception))

    worker_shutting_down.connect(on_shutting_down, weak=False)
    task_failure.connect(on_failure, weak=False)


def _serve(pipeline: str, identity: Identity) -> int:
    from workers.render.celery_app import app

    # It warns of pickled messages under root. This app accepts only JSON.
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
