"""Limits on concurrent uploads, downloads and long calls: in all, and per tenant."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from anyio import CapacityLimiter, Semaphore, to_thread

from farm.errors import Unavailable

T = TypeVar("T")

MAX_WAITING = 16
"""Maximum number of long calls of a tenant that wait for their turn."""


class Place:
    """A place that was taken. Giving it back a second time has no effect."""

    def __init__(self, give_back: Callable[[], None]) -> None:
        self._give_back: Callable[[], None] | None = give_back

    def give_back(self) -> None:
        """Free the place."""
        if self._give_back is not None:
            give_back, self._give_back = self._give_back, None
            give_back()


class Places:
    """A number of places, in all and per tenant. Use it in the event loop only."""

    def __init__(self, in_all: int, a_tenant: int) -> None:
        self._in_all = in_all
        self._a_tenant = a_tenant
        self._taken: Counter[str | None] = Counter()

    def take(self, tenant: str | None, what: str, number: int = 1) -> Place:
        """Take a place, or several, which are given back together.

        Args:
            tenant: ID of the tenant; None for a caller without a key.
            what: Name of the things that are sent, such as "inputs", for the error message.
            number: Number of places. The last free one is enough for any number.

        Raises:
            Unavailable: All places are taken, or all places of this tenant.
        """
        if self._taken.total() >= self._in_all or self._taken[tenant] >= self._a_tenant:
            raise Unavailable(f"Too many {what} are being sent. Try again in a few seconds.")
        self._taken[tenant] += number

        def give_back() -> None:
            self._taken[tenant] -= number
            self._taken += Counter()  # drops the tenants with a count of zero

        return Place(give_back)

    @contextmanager
    def taken(self, tenant: str | None, what: str) -> Iterator[None]:
        """Hold a place during the block.

        Raises:
            Unavailable: All places are taken, or all places of this tenant.
        """
        place = self.take(tenant, what)
        try:
            yield
        finally:
            place.give_back()


class Turns:
    """Threads for long calls: a maximum per tenant, and a maximum in all."""

    def __init__(self, in_all: int, a_tenant: int = 1) -> None:
        self._limiter = CapacityLimiter(in_all)
        self._a_tenant = a_tenant
        self._turns: WeakValueDictionary[uuid.UUID, Semaphore] = WeakValueDictionary()

    async def run(self, tenant_id: uuid.UUID, function: Callable[..., T], *args: Any) -> T:
        """Call a function in one of the threads, when it is the tenant's turn.

        Raises:
            Unavailable: Too many calls of the tenant wait, perhaps with large bodies.
        """
        turn = self._turns.setdefault(tenant_id, Semaphore(self._a_tenant))
        if turn.statistics().tasks_waiting >= MAX_WAITING:
            raise Unavailable("Too many long calls of this tenant wait. Try again in a minute.")
        async with turn:
            return await to_thread.run_sync(function, *args, limiter=self._limiter)
