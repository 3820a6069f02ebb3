"""Claims of a child: immediate ones, and those made ahead during the previous batch."""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor

from cachetools import LRUCache

from farm.context import Farm
from farm.domain.spec import FullSpec, Priority
from farm.store import frames, leases
from farm.store.claim import Lease, claim
from farm.store.engine import one_statement, transaction
from farm.store.lines import part_cache
from workers.render.identity import Identity
from workers.render.retry import retry_while_unavailable

REMEMBERED_JOBS = 64
"""Number of jobs whose specs are cached."""
PART_BYTES = 2**26
"""Memory for cached parts of inputs. A part has a thousand lines."""

CLAIM_LEAD_FACTOR = 3.0
"""Start the next claim when the current batch has this many claim durations left."""
CLAIM_LEAD_SECONDS = 0.02
"""Added to that lead, in seconds.

Claims start late on purpose: other workers can no longer take frames that are claimed.
"""
MAX_STEP_SECONDS = 1.0
"""Longest step that is added to the lead, in seconds: the next check comes after that step."""

MAX_SECONDS = 1.0
"""Longest claim duration that counts, in seconds. A claim during an outage is no measure."""


INTERRUPTING_PART = 0.4
"""Longest batch that interrupts another, as a part of FARM_INTERACTIVE_SECONDS.

A frame may wait for two batches of another tenant: one that interrupts, and one that was claimed
ahead. Between them it waits for the part of the time that an interrupted batch keeps.
"""

REMEMBERED_PACES = 16
"""Number of batches whose paces count."""


class Pace:
    """The slowest pace of a child's latest batches. A pace is device cost per second.

    On most devices a small batch has a slower pace than a large one. So a time that is calculated
    by the slowest pace is rather too long than too short. One thread measures, and any may ask.
    """

    def __init__(self) -> None:
        self._paces: LRUCache[uuid.UUID, float] = LRUCache(REMEMBERED_PACES)
        self._slowest: float | None = None

    def measure(self, lease_id: uuid.UUID, cost: float, seconds: float) -> None:
        """Note that a batch took `seconds` for this cost. It replaces the batch's earlier note."""
        if seconds > 0:
            self._paces[lease_id] = cost / seconds
            self._slowest = min(self._paces.values())

    @property
    def is_known(self) -> bool:
        """True after the first measurement."""
        return self._slowest is not None

    def cost_within(self, seconds: float) -> float | None:
        """Return the device cost that takes at most this time. None: nothing was measured yet."""
        return None if self._slowest is None else self._slowest * seconds


class Claims:
    """Claims one batch after another, and knows which leases this child holds."""

    def __init__(self, farm: Farm, identity: Identity, plans: str) -> None:
        self._farm = farm
        self._identity = identity
        self._plans = plans
        """Plans of open buckets: see store.claim."""
        self.pace = Pace()
        self._specs: LRUCache[uuid.UUID, FullSpec] = LRUCache(REMEMBERED_JOBS)
        self._parts = part_cache(PART_BYTES)
        self._in_hand: dict[uuid.UUID, tuple[float, float]] = {}
        """Start and end of the claim, by lease, on the monotonic clock."""
        self._lock = threading.Lock()
        self._unsure = True
        """True if this child may hold a lease that it does not know: a claim's reply was lost."""
        self._seconds = 0.0
        self._thread = ThreadPoolExecutor(1, "claim-ahead")
        self._ahead: Future[Lease | None] | None = None

    def claim_now(self) -> Lease | None:
        """Claim a batch. Wait while Postgres does not answer."""
        return self._claim_patiently(Priority.BULK, self._plans)

    def claim_interactive(self, plans: str, without: Collection[uuid.UUID]) -> Lease | None:
        """Claim a batch that is to interrupt another. Wait while Postgres does not answer.

        Args:
            plans: plans of open buckets for a device that holds another batch.
            without: tenants to leave out.
        """
        return self._claim_patiently(Priority.INTERACTIVE, plans, without)

    def claim_ahead(self, left_seconds: float, step_seconds: float) -> None:
        """Start the claim of the next batch if the current one is nearly done.

        Args:
            left_seconds: the remaining time of the current batch.
            step_seconds: the time until the next call.
        """
        early = CLAIM_LEAD_SECONDS + CLAIM_LEAD_FACTOR * min(self._seconds, MAX_SECONDS)
        if step_seconds <= MAX_STEP_SECONDS:
            early += step_seconds
        if self._ahead is None and left_seconds <= early:
            self._ahead = self._thread.submit(self.claim_now)

    @property
    def is_ahead(self) -> bool:
        """True if a batch is claimed already, so that `next` returns it at once."""
        ahead = self._ahead
        if ahead is None or not ahead.done() or ahead.exception() is not None:
            return False
        return ahead.result() is not None

    def next(self) -> Lease | None:
        """Return the batch that was claimed ahead, or claim one."""
        ahead, self._ahead = self._ahead, None
        return ahead.result() if ahead is not None else self.claim_now()

    def give_back(self) -> None:
        """Release the batch that was claimed ahead, uncharged: it will not be rendered."""
        ahead, self._ahead = self._ahead, None
        lease = ahead.result() if ahead is not None else None
        if lease is not None:
            self.release(lease)

    def release(self, lease: Lease) -> None:
        """Release a batch that was not rendered, uncharged."""
        retry_while_unavailable(self._identity.name, lambda: self._release(lease))
        self.ended(lease)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    def ended(self, lease: Lease) -> None:
        """Record that a lease has ended."""
        self._in_hand.pop(lease.id, None)  # without the lock: a claim may hold it for a long time

    def window(self, lease: Lease) -> tuple[float, float]:
        """Return start and end of the claim of a held lease, on the monotonic clock."""
        return self._in_hand[lease.id]

    def mark_uncertain(self) -> None:
        """Record that a claim may have failed: the next claim first releases unknown leases."""
        self._unsure = True

    def _claim_patiently(
        self, priority: Priority, plans: str, without: Collection[uuid.UUID] = ()
    ) -> Lease | None:
        return retry_while_unavailable(
            self._identity.name, lambda: self._claim(priority, plans, without)
        )

    def _claim(
        self, priority: Priority, plans: str, without: Collection[uuid.UUID]
    ) -> Lease | None:
        me, settings, started = self._identity, self._farm.settings, time.monotonic()
        interrupts = priority is Priority.INTERACTIVE
        most_seconds = settings.interactive_seconds * (INTERRUPTING_PART if interrupts else 1)
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
                    lease_seconds=settings.lease_seconds,
                    priority=priority,
                    plans=plans,
                    less_urgent_share=settings.less_urgent_share,
                    most_cost=self.pace.cost_within(most_seconds),
                    without=without,
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
