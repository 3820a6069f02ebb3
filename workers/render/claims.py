"""What a child claims: now, or ahead, while it still denoises the batch before."""

from __future__ import annotations

import os
import threading
import time
import uuid
from concurrent.futures import Future, ThreadPoolExecutor

from cachetools import LRUCache

from farm.context import Farm
from farm.domain.spec import FullSpec, Line, Priority
from farm.store import frames, leases
from farm.store.claim import Lease, claim
from farm.store.engine import one_statement, transaction
from workers.render.identity import Identity
from workers.render.retry import retry_while_unavailable

REMEMBERED_JOBS = 64
"""Whose specs are not read again"""
REMEMBERED_PARTS = 16
"""Of inputs: a thousand lines each"""

LONGER = 3.0
"""A claim is begun when the batch before has so many times left as the last claim took …"""
MIN_SECONDS = 0.02
"""… and this: as late as it can be, since what is claimed can no longer be anybody else's …"""
MAX_STEP_SECONDS = 1.0
"""… or a step before that, where it is a short one: after the step it would be late."""

MAX_SECONDS = 1.0
"""That a claim is taken to last: one that waited for an outage says nothing of the next"""


class Claims:
    """Claims one batch after another, and knows which leases this child has in hand."""

    def __init__(self, farm: Farm, identity: Identity) -> None:
        self._farm = farm
        self._identity = identity
        self._specs: LRUCache[uuid.UUID, FullSpec] = LRUCache(REMEMBERED_JOBS)
        self._parts: LRUCache[tuple[uuid.UUID, int], list[Line]] = LRUCache(REMEMBERED_PARTS)
        self._in_hand: dict[uuid.UUID, tuple[float, float]] = {}
        """When each lease's claim began and ended"""
        self._lock = threading.Lock()
        self._unsure = True
        """Whether a lease may be ours that we do not know of: the reply to its claim was lost"""
        self._seconds = 0.0
        self._thread = ThreadPoolExecutor(1, "claim-ahead")
        self._ahead: Future[Lease | None] | None = None

    def claim_now(self, priority: Priority = Priority.BULK) -> Lease | None:
        """Claim a batch, of no less urgent work than this; waits while Postgres is away."""
        return retry_while_unavailable(self._identity.name, lambda: self._claim(priority))

    def claim_ahead(self, left_seconds: float, step_seconds: float) -> None:
        """Begin to claim the next batch where the one in hand is nearly done.

        Args:
            left_seconds: what it will still take.
            step_seconds: when this will be called again.
        """
        early = MIN_SECONDS + LONGER * min(self._seconds, MAX_SECONDS)
        if step_seconds <= MAX_STEP_SECONDS:
            early += step_seconds
        if self._ahead is None and left_seconds <= early:
            self._ahead = self._thread.submit(self.claim_now)

    @property
    def is_ahead(self) -> bool:
        """Whether `next` has a batch at hand."""
        ahead = self._ahead
        if ahead is None or not ahead.done() or ahead.exception() is not None:
            return False
        return ahead.result() is not None

    def next(self) -> Lease | None:
        """Give the batch that was claimed ahead, or claim one."""
        ahead, self._ahead = self._ahead, None
        return ahead.result() if ahead is not None else self.claim_now()

    def give_back(self) -> None:
        """Release what was claimed ahead, uncharged, where it will not be rendered."""
        ahead, self._ahead = self._ahead, None
        lease = ahead.result() if ahead is not None else None
        if lease is not None:
            self.release(lease)

    def release(self, lease: Lease) -> None:
        """Return a batch that was not rendered, uncharged."""
        retry_while_unavailable(self._identity.name, lambda: self._release(lease))
        self.ended(lease)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    def ended(self, lease: Lease) -> None:
        """Note that a lease has ended."""
        self._in_hand.pop(lease.id, None)  # without the lock: a claim may hold it for long

    def window(self, lease: Lease) -> tuple[float, float]:
        """Tell when the claim of a lease in hand began and ended, on the monotonic clock."""
        return self._in_hand[lease.id]

    def mark_uncertain(self) -> None:
        """Note that something may have gone wrong: what is not in hand is given back first."""
        self._unsure = True

    def _claim(self, priority: Priority) -> Lease | None:
        me, started = self._identity, time.monotonic()
        with self._lock:
            if self._unsure:
                with transaction(self._farm.store) as connection:
                    leases.release_unknown(connection, me.id, os.getpid(), [*self._in_hand])
            self._unsure = True  # until the reply to this claim is here
            with one_statement(self._farm.store) as connection:
                lease = claim(
                    connection,
                    pipeline=me.pipeline,
                    worker_id=me.id,
                    worker=me.name,
                    pid=os.getpid(),
                    lease_seconds=self._farm.settings.lease_seconds,
                    priority=priority,
                    known=self._specs,
                    parts=self._parts,
                )
            self._unsure = False
            ended = time.monotonic()
            if lease is not None:
                self._in_hand[lease.id] = started, ended
            self._seconds = ended - started
        if lease is not None and lease.more:
            self._farm.bells.ring(lease.pipeline, urgent=priority is Priority.INTERACTIVE)
        return lease

    def _release(self, lease: Lease) -> None:
        with transaction(self._farm.store) as connection:
            frames.release(connection, lease.id, [frame.fence for frame in lease.frames])
