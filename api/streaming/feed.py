"""The feed: reads events once for all listeners of a process, which are streams and waiting calls.

While anybody listens, it reads the events of the jobs and tenants that are listened to, with the
same few statements for any number of listeners. A listener costs no thread, and no query while it
waits.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from anyio import CapacityLimiter, to_thread

from api.addresses import SignedAddresses
from farm.context import Farm
from farm.errors import Unavailable
from farm.services.events import Identities, identities_of, own_identities
from farm.services.previews import Preview, Previews
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
SILENT_SECONDS = 15.0
"""Interval in which a listener is woken: proxies cut silent connections. Seconds."""
SEND_SECONDS = 30.0
"""Time in which a client must take what is sent, in seconds."""
BEAT_SECONDS = 1.0
"""Interval in which the listeners are looked at, in seconds."""
PREVIEW_SECONDS = 0.5
"""Interval in which previews are read, in seconds."""
PREVIEW_REST_SECONDS = 5.0
"""Pause after Redis did not give previews, in seconds."""
MAX_PREVIEWED_JOBS = 50
"""Jobs whose previews are read at once."""
JOINING_THREADS = 2
"""Threads in which the place of a new job or tenant is read."""

Place = tuple[int, int]
"""(xid, id) of an event. Of a job's events the xid is 0: they are in the order of their ids."""
Render = Callable[[EventRow, Identities, str], bytes]
"""Returns the JSON of an event, for an address at which clients reach the API."""


@dataclass(eq=False)
class Told:
    """An event on its way to listeners. They share its texts."""

    event: EventRow
    identities: Identities
    """Of the images in it."""
    texts: dict[str, bytes] = field(default_factory=dict)
    """Its JSON, by the address at which clients reach the API."""


class Listener:
    """A reader of one job's events, or of one tenant's. Used in the event loop only."""

    def __init__(
        self,
        leave: Callable[[Listener], None],
        base: str,
        wants: Callable[[EventRow], bool],
        *,
        wants_previews: bool = False,
    ) -> None:
        self.wants_previews = wants_previews
        self.is_cut_off = False
        """True if it must read no more: it was too slow, it has gone, or the process ends."""
        self.reached: Place = (0, 0)
        """The last event that was handed to it, or was not wanted."""
        self.base = base
        """Address at which its client reaches the API. Empty: it needs no texts."""
        # Streams that were opened together are not woken together: calls would wait for them all.
        self.beat_at = time.monotonic() + random.uniform(0.5, 1) * SILENT_SECONDS  # noqa: S311
        """Time at which it is woken, news or not. On the monotonic clock."""
        self.sending_at = math.inf
        """Time since which its client takes nothing. Infinite: it waits for news."""
        self.on_stuck: Callable[[], object] = self.cut_off
        """Called if its client takes nothing for SEND_SECONDS."""
        self._leave = leave
        self._wants = wants
        self._queue: deque[Told] = deque()
        self._steps: JobSteps | None = None
        self._previews: dict[int, Preview] = {}
        self._seen: dict[int, int] = {}
        """Step of the last preview of each frame."""
        self._news = asyncio.Event()

    def put(self, told: Told, place: Place) -> None:
        """Add an event if it is wanted. A listener that takes none is cut off."""
        self.reached = place
        if not self._wants(told.event) or self.is_cut_off:
            return
        if len(self._queue) >= MAX_QUEUED:
            self.cut_off()
            return
        self._queue.append(told)
        self._news.set()

    def put_steps(self, steps: JobSteps) -> None:
        """Replace the steps that it has not taken."""
        self._steps = steps
        self._news.set()

    def put_previews(self, previews: Iterable[Preview]) -> None:
        """Add previews, each instead of an older one that it has not taken."""
        now = {each.ordinal: each for each in previews}
        new = {at: each for at, each in now.items() if self._seen.get(at) != each.step}
        self._seen = {at: each.step for at, each in now.items()}
        if new:
            self._previews |= new
            self._news.set()

    def cut_off(self) -> None:
        """Drop what waits for it."""
        self.is_cut_off = True
        self._queue.clear()
        self._news.set()

    async def wait(self) -> None:
        """Wait for news, or for the next beat."""
        await self._news.wait()

    def beat(self, now: float) -> bool:
        """Wake it if it is time, and free it from a client that takes nothing.

        Return True if there is work for it now.
        """
        is_due, is_stuck = now >= self.beat_at, now >= self.sending_at + SEND_SECONDS
        if is_due:
            self._news.set()
        if is_stuck:
            self.on_stuck()
        return is_due or is_stuck

    def take(self) -> Iterator[Told]:
        """Take the events that wait, one by one."""
        self._news.clear()
        while self._queue:
            yield self._queue.popleft()

    def take_steps(self) -> JobSteps | None:
        """Return the newest steps, once."""
        steps, self._steps = self._steps, None
        return steps

    def take_previews(self) -> list[Preview]:
        """Return the newest previews, each once."""
        previews, self._previews = self._previews, {}
        return [*previews.values()]

    @property
    def is_idle(self) -> bool:
        """True if no event waits."""
        return not self._queue

    def leave(self) -> None:
        """Listen no more. A second call has no effect."""
        self._leave(self)


class _Watched:
    """A job or a tenant that is listened to."""

    def __init__(self) -> None:
        self.listeners: set[Listener] = set()
        self.place: Place | None = None
        """The events up to it have been read. None: the first listener is reading it."""
        self.joined: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        """True once the place is known; False if it could not be read."""
        self.streams_at: Counter[str] = Counter()
        """Number of its streams by the address at which their clients reach the API."""

    def enter(self, listener: Listener) -> None:
        """Add a listener."""
        self.listeners.add(listener)
        if listener.base:
            self.streams_at[listener.base] += 1

    def leave(self, listener: Listener) -> None:
        """Remove a listener. A second call has no effect."""
        if listener in self.listeners:
            self.listeners.remove(listener)
            if listener.base:
                self.streams_at -= Counter([listener.base])  # this drops what is 0


class _Wanted(NamedTuple):
    place: Place
    bases: frozenset[str]


@dataclass(frozen=True)
class _News:
    epoch: str
    of_jobs: list[Told]
    of_tenants: list[Told]
    steps: list[JobSteps]


class Feed:
    """Reads events for the listeners of a process. Used in one event loop."""

    def __init__(self, farm: Farm, addresses: SignedAddresses, render: Render) -> None:
        self.is_closed = False
        """True once the process ends."""
        self._farm = farm
        self._addresses = addresses
        self._render = render
        self._jobs: dict[uuid.UUID, _Watched] = {}
        self._tenants: dict[uuid.UUID, _Watched] = {}
        self._known = KnownSpecs()
        self._epoch: str | None = None
        self._reading = CapacityLimiter(1)
        self._joining = CapacityLimiter(JOINING_THREADS)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._steps_at = 0.0
        self.previews = Previews(farm.settings)
        self._previewing = CapacityLimiter(1)

    async def listen_to_job(
        self,
        job_id: uuid.UUID,
        base: str,
        wants: Callable[[EventRow], bool],
        *,
        wants_previews: bool = False,
    ) -> Listener:
        """Listen to a job. Each of its events that is committed from now on is handed out.

        What its owner reads afterwards may be newer: events up to that arrive too, and are to be
        left out.

        Raises:
            Unavailable: Postgres does not answer.
        """
        return await self._listen(
            self._jobs, job_id, base, wants, self._newest, wants_previews=wants_previews
        )

    async def listen_to_tenant(
        self, tenant_id: uuid.UUID, base: str, wants: Callable[[EventRow], bool]
    ) -> Listener:
        """Listen to a tenant, as `listen_to_job` does."""
        return await self._listen(self._tenants, tenant_id, base, wants, self._oldest_open)

    def close(self) -> None:
        """Cut off all listeners, and those to come: the process ends. A signal may call it."""
        self.is_closed = True
        for listener in self.listeners:
            listener.cut_off()

    @property
    def listeners(self) -> list[Listener]:
        """All listeners."""
        return [
            listener
            for watched in (*self._jobs.values(), *self._tenants.values())
            for listener in watched.listeners
        ]

    async def _listen(
        self,
        all_watched: dict[uuid.UUID, _Watched],
        key: uuid.UUID,
        base: str,
        wants: Callable[[EventRow], bool],
        read_place: Callable[[uuid.UUID], Place],
        *,
        wants_previews: bool = False,
    ) -> Listener:
        while True:
            is_first = key not in all_watched
            watched = all_watched.setdefault(key, _Watched())
            leave = partial(_leave, all_watched, key, watched)
            listener = Listener(leave, base, wants, wants_previews=wants_previews)
            watched.enter(listener)
            if self.is_closed:
                listener.cut_off()
            try:
                # The place is read after the listener was entered, and before its owner reads
                # anything. So every later event is handed to it.
                if is_first:
                    await self._join(all_watched, key, watched, read_place)
                elif not await asyncio.shield(watched.joined):
                    continue  # the first one failed: this one reads it
            except BaseException:
                listener.leave()
                raise
            self._start()
            return listener

    async def _join(
        self,
        all_watched: dict[uuid.UUID, _Watched],
        key: uuid.UUID,
        watched: _Watched,
        read_place: Callable[[uuid.UUID], Place],
    ) -> None:
        try:
            watched.place = await to_thread.run_sync(read_place, key, limiter=self._joining)
        finally:
            if watched.place is None and all_watched.get(key) is watched:
                del all_watched[key]
            watched.joined.set_result(watched.place is not None)

    def _newest(self, job_id: uuid.UUID) -> Place:
        with reads(self._farm.store) as connection:
            return 0, stored.newest_of_job(connection, job_id)

    def _oldest_open(self, _: uuid.UUID) -> Place:
        with reads(self._farm.store) as connection:
            return stored.horizon(connection).xid, 0

    def _start(self) -> None:
        loop = asyncio.get_running_loop()
        works = {"reading": self._run, "beating": self._beat, "previewing": self._preview}
        for name, work in works.items():
            if name not in self._tasks or self._tasks[name].done():
                self._tasks[name] = loop.create_task(work())

    async def _beat(self) -> None:
        """Wake the listeners that are due. Other calls have their turns in between."""
        while self._jobs or self._tenants:
            for listener in self.listeners:
                if listener.beat(time.monotonic()):
                    await asyncio.sleep(0)
            await asyncio.sleep(BEAT_SECONDS)

    async def _preview(self) -> None:
        """Hand out previews while anybody wants them. Events never wait for Redis."""
        first = 0
        while wanted := [
            job_id
            for job_id, watched in self._jobs.items()
            if any(listener.wants_previews for listener in watched.listeners)
        ]:
            # Of many jobs, others have their turn next time.
            first %= len(wanted)
            jobs = (wanted[first:] + wanted[:first])[:MAX_PREVIEWED_JOBS]
            first += len(jobs)
            rest = PREVIEW_SECONDS
            try:
                found = await to_thread.run_sync(
                    self.previews.watch, jobs, limiter=self._previewing
                )
                self._hand_out_previews(found)
            except Unavailable as error:
                log.warning("There are no previews: %s", error)
                rest = PREVIEW_REST_SECONDS
            except Exception:
                log.exception("Previews failed.")
                rest = PREVIEW_REST_SECONDS
            await asyncio.sleep(rest)

    def _hand_out_previews(self, found: Mapping[uuid.UUID, Iterable[Preview]]) -> None:
        for job_id, previews in found.items():
            watched = self._jobs.get(job_id)
            for listener in watched.listeners if watched else ():
                if listener.wants_previews:
                    listener.put_previews(previews)

    async def _run(self) -> None:
        while self._jobs or self._tenants:
            rest, began = TICK_SECONDS, time.monotonic()
            try:
                jobs, tenants = _wanted(self._jobs), _wanted(self._tenants)
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

    def _read(
        self, jobs: Mapping[uuid.UUID, _Wanted], tenants: Mapping[uuid.UUID, _Wanted]
    ) -> _News:
        if self._addresses.are_due:
            self._addresses.refresh()  # for the texts of the events
        with reads(self._farm.store) as connection:
            until = stored.horizon(connection)
            after = {job_id: wanted.place[1] for job_id, wanted in jobs.items()}
            of_jobs = stored.of_jobs(connection, after, limit=MAX_AT_ONCE) if jobs else []
            places = {tenant_id: wanted.place for tenant_id, wanted in tenants.items()}
            of_tenants = (
                stored.of_tenants(connection, places, until, limit=MAX_AT_ONCE) if tenants else []
            )
            steps: list[JobSteps] = []
            if jobs and time.monotonic() >= self._steps_at:
                self._steps_at = time.monotonic() + STEPS_SECONDS
                steps = steps_of_jobs(connection, jobs)
            identities = identities_of(connection, [*of_jobs, *of_tenants], self._known)
        return _News(
            until.epoch,
            [
                self._told(event, identities, jobs.get(event.job_id))
                for event in of_jobs
                if event.job_id is not None
            ],
            [self._told(event, identities, tenants.get(event.tenant_id)) for event in of_tenants],
            steps,
        )

    def _told(self, event: EventRow, identities: Identities, wanted: _Wanted | None) -> Told:
        """Return an event with its texts. They are made here, in a thread."""
        own = own_identities(event, identities)
        texts = {base: self._render(event, own, base) for base in (wanted.bases if wanted else ())}
        return Told(event, own, texts)

    async def _deliver(self, news: _News) -> None:
        """Hand the news out. Other calls have their turns in between."""
        if self._epoch not in (None, news.epoch):  # places and cursors have lost their meaning
            for listener in self.listeners:
                listener.cut_off()
            self._jobs.clear()
            self._tenants.clear()
        self._epoch = news.epoch
        for told in news.of_jobs:
            if told.event.job_id is not None:
                _hand_out(self._jobs.get(told.event.job_id), told, (0, told.event.id))
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


def _leave(
    all_watched: dict[uuid.UUID, _Watched], key: uuid.UUID, watched: _Watched, listener: Listener
) -> None:
    watched.leave(listener)
    if not watched.listeners and all_watched.get(key) is watched:
        del all_watched[key]


def _wanted(all_watched: Mapping[uuid.UUID, _Watched]) -> dict[uuid.UUID, _Wanted]:
    return {
        key: _Wanted(each.place, frozenset(each.streams_at))
        for key, each in all_watched.items()
        if each.place is not None
    }


def _hand_out(watched: _Watched | None, told: Told, place: Place) -> None:
    if watched is None or watched.place is None or place <= watched.place:
        return
    watched.place = place
    for listener in watched.listeners:
        listener.put(told, place)
