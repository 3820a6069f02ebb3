"""The feed: reads events once for all listeners of a process, which are streams and waiting calls.

While anybody listens, it reads the events of the jobs and tenants that are listened to, with the
same few statements for any number of listeners. A listener costs no thread and no query.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

from anyio import CapacityLimiter, to_thread

from api.addresses import SignedAddresses
from farm.context import Farm
from farm.errors import Unavailable
from farm.services.events import Identities, identities_of
from farm.store import events as stored
from farm.store.engine import reads
from farm.store.events import EventRow
from farm.store.leases import JobSteps, steps_of_jobs
from farm.store.specs import KnownSpecs

log = logging.getLogger(__name__)

TICK_SECONDS = 0.2
"""Interval between two readings, in seconds."""
STEPS_SECONDS = 1.0
"""Interval between two readings of the steps of running frames, in seconds."""
REST_SECONDS = 1.0
"""Pause after Postgres did not answer, in seconds."""
MAX_AT_ONCE = 1000
"""Events of one job, or of one tenant, that one reading takes. The next one takes the others."""
MAX_QUEUED = 256
"""Events that wait for a slow listener. One more cuts it off; it can resume with its cursor."""

HEARTBEAT_SECONDS = 15.0
"""Interval in which a listener is woken: proxies cut silent connections. Seconds."""
SEND_SECONDS = 30.0
"""Time in which a client must take what is sent, in seconds."""
BEAT_SECONDS = 1.0
"""Interval in which the listeners are looked at, in seconds."""

Place = tuple[int, int]
"""(xid, id) of an event. Of a job's events the xid is 0: they are in the order of their ids."""


@dataclass(eq=False)
class Told:
    """An event on its way to listeners. They share its texts."""

    event: EventRow
    identities: Identities
    texts: dict[str, bytes] = field(default_factory=dict)
    """Its JSON, by the address at which clients reach the API."""


class Listener:
    """A reader of one job's events, or of one tenant's. Used in the event loop only."""

    def __init__(
        self, leave: Callable[[Listener], None], kinds: Collection[str] | None = None
    ) -> None:
        self.is_cut_off = False
        """True if it must read no more: it was too slow, or the process ends."""
        self.beat_at = time.monotonic() + HEARTBEAT_SECONDS
        """Time at which it is woken, news or not. On the monotonic clock."""
        self.sending_at: float | None = None
        """Time since which its client takes nothing. None: it waits for news."""
        self.on_stuck: Callable[[], object] = self.cut_off
        """Called if its client takes nothing for SEND_SECONDS."""
        self._kinds = kinds
        self.steps: JobSteps | None = None
        """The newest steps of its job's running frames, until it has taken them."""
        self._leave = leave
        self._queue: deque[Told] = deque()
        self._news = asyncio.Event()

    def put(self, told: Told) -> None:
        """Add an event. A listener that takes none is cut off."""
        if self._kinds is not None and told.event.kind not in self._kinds:
            return
        if len(self._queue) >= MAX_QUEUED:
            self.cut_off()
        elif not self.is_cut_off:
            self._queue.append(told)
            self._news.set()

    def put_steps(self, steps: JobSteps) -> None:
        """Replace the steps that it has not taken."""
        self.steps = steps
        self._news.set()

    def cut_off(self) -> None:
        """Drop what waits for it."""
        self.is_cut_off = True
        self._queue.clear()
        self._news.set()

    async def wait(self) -> None:
        """Wait for news, or for the next beat."""
        await self._news.wait()

    def beat(self, now: float) -> None:
        """Wake it if it is time, and free it from a client that takes nothing."""
        if now >= self.beat_at:
            self._news.set()
        if self.sending_at is not None and now >= self.sending_at + SEND_SECONDS:
            self.on_stuck()

    def take(self) -> Iterator[Told]:
        """Take the events that wait, one by one."""
        self._news.clear()
        while self._queue:
            yield self._queue.popleft()

    @property
    def is_idle(self) -> bool:
        """True if no event waits."""
        return not self._queue

    def take_steps(self) -> JobSteps | None:
        """Return the newest steps, once."""
        steps, self.steps = self.steps, None
        return steps

    def leave(self) -> None:
        """Listen no more. A second call has no effect."""
        self._leave(self)


class _Watched:
    """A job or a tenant that is listened to."""

    def __init__(self) -> None:
        self.listeners: set[Listener] = set()
        self.place: Place | None = None
        """The events up to it have been read. None: not known yet, and nothing is read."""


@dataclass(frozen=True)
class _News:
    epoch: str
    of_jobs: list[Told]
    of_tenants: list[Told]
    steps: list[JobSteps]


class Feed:
    """Reads events for the listeners of a process. Used in one event loop."""

    def __init__(self, farm: Farm, addresses: SignedAddresses) -> None:
        self._farm = farm
        self._addresses = addresses
        self._jobs: dict[uuid.UUID, _Watched] = {}
        self._tenants: dict[uuid.UUID, _Watched] = {}
        self._known = KnownSpecs()
        self._epoch: str | None = None
        self._reading = CapacityLimiter(1)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._steps_at = 0.0
        self._closed = False

    def listen_to_job(self, job_id: uuid.UUID, kinds: Collection[str] | None = None) -> Listener:
        """Begin to listen. Then read the job, and call `begin_job`: so nothing is missed.

        Args:
            job_id: The job.
            kinds: Kinds of events that the listener needs. None: all.
        """
        return self._listen(self._jobs, job_id, kinds)

    def listen_to_tenant(self, tenant_id: uuid.UUID) -> Listener:
        """Begin to listen. Then read the horizon, and call `begin_tenant`."""
        return self._listen(self._tenants, tenant_id)

    def begin_job(self, job_id: uuid.UUID, last: int) -> None:
        """Tell the id of the job's newest event. Later ones are read."""
        self._begin(self._jobs, job_id, (0, last))

    def begin_tenant(self, tenant_id: uuid.UUID, xid: int) -> None:
        """Tell the oldest transaction that still ran. Its events and later ones are read."""
        self._begin(self._tenants, tenant_id, (xid, 0))

    def close(self) -> None:
        """Cut off all listeners, and those to come: the process ends. A signal may call it."""
        self._closed = True
        for listener in self._all_listeners():
            listener.cut_off()

    def _listen(
        self,
        watched: dict[uuid.UUID, _Watched],
        key: uuid.UUID,
        kinds: Collection[str] | None = None,
    ) -> Listener:
        place = watched.setdefault(key, _Watched())

        def leave(listener: Listener) -> None:
            place.listeners.discard(listener)
            if not place.listeners and watched.get(key) is place:
                del watched[key]

        listener = Listener(leave, kinds)
        place.listeners.add(listener)
        if self._closed:
            listener.cut_off()
        return listener

    def _begin(self, watched: dict[uuid.UUID, _Watched], key: uuid.UUID, place: Place) -> None:
        found = watched.get(key)
        if found is not None and found.place is None:
            found.place = place
        loop = asyncio.get_running_loop()
        for name, work in (("reading", self._run), ("beating", self._beat)):
            if name not in self._tasks or self._tasks[name].done():
                self._tasks[name] = loop.create_task(work())

    def _all_listeners(self) -> list[Listener]:
        return [
            listener
            for watched in (*self._jobs.values(), *self._tenants.values())
            for listener in watched.listeners
        ]

    async def _beat(self) -> None:
        while self._jobs or self._tenants:
            now = time.monotonic()
            for listener in self._all_listeners():
                listener.beat(now)
            await asyncio.sleep(BEAT_SECONDS)

    async def _run(self) -> None:
        while self._jobs or self._tenants:
            rest, began = TICK_SECONDS, time.monotonic()
            try:
                jobs = _places(self._jobs)
                tenants = _places(self._tenants)
                if jobs or tenants:
                    news = await to_thread.run_sync(
                        self._read, jobs, tenants, limiter=self._reading
                    )
                    await self._deliver(news)
            except Unavailable as error:
                log.warning("The feed of events waits: %s", error)
                rest = REST_SECONDS
            except Exception:
                log.exception("The feed of events failed.")
                rest = REST_SECONDS
            await asyncio.sleep(max(0.0, began + rest - time.monotonic()))

    def _read(self, jobs: Mapping[uuid.UUID, Place], tenants: Mapping[uuid.UUID, Place]) -> _News:
        if self._addresses.are_due:
            self._addresses.refresh()  # for the texts of the events
        with reads(self._farm.store) as connection:
            until = stored.horizon(connection)
            after = {job_id: last for job_id, (_, last) in jobs.items()}
            of_jobs = stored.of_jobs(connection, after, limit=MAX_AT_ONCE) if jobs else []
            of_tenants = (
                stored.of_tenants(connection, tenants, until, limit=MAX_AT_ONCE) if tenants else []
            )
            steps: list[JobSteps] = []
            if jobs and time.monotonic() >= self._steps_at:
                self._steps_at = time.monotonic() + STEPS_SECONDS
                steps = steps_of_jobs(connection, jobs)
            identities = identities_of(connection, [*of_jobs, *of_tenants], self._known)
        return _News(
            until.epoch,
            [Told(event, identities) for event in of_jobs],
            [Told(event, identities) for event in of_tenants],
            steps,
        )

    async def _deliver(self, news: _News) -> None:
        """Hand the news out. Other calls have their turns in between."""
        if self._epoch not in (None, news.epoch):  # places and cursors have lost their meaning
            for listener in self._all_listeners():
                listener.cut_off()
        self._epoch = news.epoch
        for told in news.of_jobs:
            job_id = told.event.job_id
            if job_id is not None:
                _hand_out(self._jobs.get(job_id), told, (0, told.event.id))
                await asyncio.sleep(0)
        for told in news.of_tenants:
            place = told.event.xid, told.event.id
            _hand_out(self._tenants.get(told.event.tenant_id), told, place)
            await asyncio.sleep(0)
        for steps in news.steps:
            watched = self._jobs.get(steps.job_id)
            for listener in watched.listeners if watched else ():
                listener.put_steps(steps)
            await asyncio.sleep(0)


def _places(watched: Mapping[uuid.UUID, _Watched]) -> dict[uuid.UUID, Place]:
    return {key: each.place for key, each in watched.items() if each.place is not None}


def _hand_out(watched: _Watched | None, told: Told, place: Place) -> None:
    if watched is None or watched.place is None or place <= watched.place:
        return
    watched.place = place
    for listener in watched.listeners:
        listener.put(told)
