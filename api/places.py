"""Places for what is at work at the same time: so many in all, and so many a tenant."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from anyio import CapacityLimiter, Lock, to_thread

from farm.errors import Unavailable

T = TypeVar("T")

MAX_WAITING = 16
"""Long calls of a tenant that wait for its turn"""


class Place:
    """A place that was taken; giving it back twice is once."""

    def __init__(self, give_back: Callable[[], None]) -> None:
        self._give_back: Callable[[], None] | None = give_back

    def give_back(self) -> None:
        """Let somebody else have it."""
        if self._give_back is not None:
            give_back, self._give_back = self._give_back, None
            give_back()


class Places:
    """Used in the event loop alone."""

    def __init__(self, in_all: int, a_tenant: int) -> None:
        self._in_all = in_all
        self._a_tenant = a_tenant
        self._taken: Counter[str | None] = Counter()

    def take(self, tenant: str | None, what: str) -> Place:
        """Take a place.

        Args:
            tenant: for whom; None: for somebody without a key.
            what: is sent, such as "inputs".

        Raises:
            Unavailable: all are taken, or all that this tenant may have.
        """
        if self._taken.total() >= self._in_all or self._taken[tenant] >= self._a_tenant:
            raise Unavailable(f"Too many {what} are being uploaded; send it again in a moment.")
        self._taken[tenant] += 1

        def give_back() -> None:
            self._taken[tenant] -= 1
            self._taken += Counter()  # forgets those that have none

        return Place(give_back)

    @contextmanager
    def taken(self, tenant: str | None, what: str) -> Iterator[None]:
        """Hold a place in the block.

        Raises:
            Unavailable: as `take` does.
        """
        place = self.take(tenant, what)
        try:
            yield
        finally:
            place.give_back()


class Turns:
    """Threads for what takes long: one thing of a tenant at a time, and so many in all."""

    def __init__(self, in_all: int) -> None:
        self._limiter = CapacityLimiter(in_all)
        self._locks: WeakValueDictionary[uuid.UUID, Lock] = WeakValueDictionary()

    async def run(self, tenant_id: uuid.UUID, function: Callable[..., T], *args: Any) -> T:
        """Call a function in one of the threads, when it is the tenant's turn.

        Raises:
            Unavailable: so many calls of the tenant wait already, perhaps with large bodies.
        """
        lock = self._locks.setdefault(tenant_id, Lock())
        if lock.statistics().tasks_waiting >= MAX_WAITING:
            raise Unavailable("Too many long calls of this tenant wait. Try again in a minute.")
        async with lock:
            return await to_thread.run_sync(function, *args, limiter=self._limiter)
