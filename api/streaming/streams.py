"""Streams of events: server-sent events (text/event-stream) of a job, or of a tenant.

A stream begins with a snapshot, or after the client's cursor with the events that it missed. Then
the feed hands it each event. A client that is cut off resumes with its cursor, and loses nothing.
"""

from __future__ import annotations

import json
import logging
import math
import random
import re
import time
import uuid
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from anyio import CapacityLimiter, Semaphore, create_task_group, move_on_after, to_thread
from fastapi import Request
from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api import schemas
from api.addresses import SignedAddresses
from api.places import Places
from api.responses import job_view
from api.streaming import feed
from api.streaming.feed import Feed, Listener, Told
from api.streaming.views import event_view
from api.waiting_reasons import Lanes
from farm.context import Farm
from farm.domain.event_cursors import EventCursor
from farm.domain.states import TERMINAL
from farm.errors import FarmError, Unauthenticated
from farm.services.events import (
    EventFilter,
    EventPage,
    Identities,
    identities_of,
    is_lost,
    own_identities,
)
from farm.services.previews import Preview
from farm.store import events as stored
from farm.store import limits, queries
from farm.store.engine import Connection, reads
from farm.store.events import EventRow, Horizon
from farm.store.leases import JobSteps

log = logging.getLogger(__name__)

T = TypeVar("T")

MEDIA_TYPE, JSON_TYPE = "text/event-stream", "application/json"
RECONNECT = b"retry: 2000\n\n"
"""After so many milliseconds a client connects again, if its stream breaks."""
MOVE_MILLISECONDS = 300, 2000
"""The same when the process ends: at random, so that not all come to the next one at once."""
PAGE = 200
"""Events of the past that are read at once."""
READING_THREADS, READING_PER_TENANT = 4, 2
"""Threads in which streams and waiting calls read. Others of the same tenant wait their turn."""
LISTENERS, LISTENERS_PER_TENANT = 5000, 2500
"""Maximum number of streams and waiting calls of a process: in all, and per tenant."""
TOKENS, TOKENS_PER_JOB = 2000, 100
"""Maximum number of those with a token: in all, and per job."""
ENDS = frozenset({*(f"job.{status}" for status in TERMINAL), "job.removed"})
HEADERS = {
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",  # nginx would collect the events first
    "Vary": "Accept",
}

StillAllowed = Callable[[], Awaitable[object]]
"""Raises Unauthenticated if a client may read no more."""
State = schemas.Job | list[Preview] | None
"""News of a job: the job itself, new previews, or None if nothing happened for a while."""
Blocks = Callable[[AsyncIterator[State]], AsyncIterator[bytes]]
"""Makes the texts of a stream of a job's states."""


def wants_stream(request: Request) -> bool:
    """Return True if a request asks for a stream of events, and not rather for a page of them."""
    weights = {MEDIA_TYPE: 0.0, JSON_TYPE: 0.0}
    for part in request.headers.get("accept", "").lower().split(","):
        media_type, _, parameters = part.partition(";")
        weight = re.search(r"\bq\s*=([^;]*)", parameters)
        with suppress(ValueError):
            weights[media_type.strip()] = min(float(weight[1]), 1.0) if weight else 1.0
    return 0 < weights[MEDIA_TYPE] >= weights[JSON_TYPE]


def message(data: Any, event: str | None = None, cursor: EventCursor | None = None) -> bytes:
    """Return one server-sent event. The JSON is ASCII: some clients end a line at U+2028."""
    text = data if isinstance(data, bytes) else json.dumps(data).encode()
    head = f"event: {event}\n" if event else ""
    if cursor is not None:
        head = f"id: {cursor}\n{head}"
    return head.encode() + b"data: " + text + b"\n\n"


def as_json(model: BaseModel, *, sparse: bool = True) -> bytes:
    """Return a model's JSON in ASCII; a sparse one without the fields that are null."""
    return json.dumps(model.model_dump(mode="json", exclude_none=sparse)).encode()


class EventStream(Response):
    """A response that sends blocks until they end, or until its client has gone."""

    def __init__(
        self, listener: Listener, blocks: AsyncIterator[bytes], end: Callable[[], None]
    ) -> None:
        """Create it.

        Args:
            listener: The listener whose events are sent.
            blocks: Texts to send.
            end: Called once when the response has ended.
        """
        super().__init__(status_code=200, headers=HEADERS, media_type=MEDIA_TYPE)
        del self.headers["content-length"]
        self._listener = listener
        self._blocks = blocks
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the blocks."""
        del scope
        try:
            async with create_task_group() as group:
                self._listener.on_stuck = group.cancel_scope.cancel
                group.start_soon(_when_gone, receive, group.cancel_scope.cancel)
                await self._send_blocks(send)
                group.cancel_scope.cancel()
        finally:
            self._end()

    async def _send_blocks(self, send: Send) -> None:
        self._listener.sending_at = time.monotonic()
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        try:
            async for block in self._blocks:
                self._listener.sending_at = time.monotonic()
                await send({"type": "http.response.body", "body": block, "more_body": True})
                self._listener.sending_at = math.inf
        except Exception:
            log.exception("A stream of events failed.")  # its client resumes with its cursor
        self._listener.sending_at = time.monotonic()
        await send({"type": "http.response.body", "body": b""})


async def _when_gone(receive: Receive, act: Callable[[], object]) -> None:
    """Act when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
    act()


@dataclass(frozen=True)
class Client:
    """A client that reads events."""

    tenant_id: uuid.UUID
    base: str
    """Address at which it reaches the API."""
    still_allowed: StillAllowed
    receive: Receive
    """Tells when it has gone."""
    token_job: uuid.UUID | None = None
    """The job whose token it has. None: it has a key."""


@dataclass(frozen=True)
class _Beginning:
    """State in which a stream begins."""

    until: Horizon
    last: int
    """ID of the newest event of the job. 0 for a tenant."""
    state: BaseModel
    ended: bool
    """True if the job has ended."""
    lost: bool
    """True if events after the client's cursor may be lost."""

    @property
    def job(self) -> schemas.Job:
        """The job."""
        assert isinstance(self.state, schemas.Job)
        return self.state


class Streams:
    """Opens streams, and lets calls wait for the end of a job. Used in one event loop."""

    def __init__(self, farm: Farm, addresses: SignedAddresses) -> None:
        self._farm = farm
        self._addresses = addresses
        self.feed = Feed(farm, addresses, self._render)
        self._places = Places(LISTENERS, LISTENERS_PER_TENANT)
        self._by_token = Places(TOKENS, TOKENS_PER_JOB)
        self._reading = CapacityLimiter(READING_THREADS)
        self._turns: WeakValueDictionary[uuid.UUID, Semaphore] = WeakValueDictionary()

    async def of_job(
        self,
        client: Client,
        job_id: uuid.UUID,
        sent: EventCursor | None,
        wanted: EventFilter,
        *,
        previews: bool = False,
    ) -> Response:
        """Open a stream of a job's events. 204 if it has ended and the client has read them all.

        Args:
            client: The client.
            job_id: The job.
            sent: The client's cursor. None: the stream begins with a snapshot.
            wanted: Which events.
            previews: Send previews too.

        Raises:
            NotFound: There is no such job, or it belongs to another tenant.
            Unavailable: Too many are open, or Postgres does not answer.
        """

        def wants(event: EventRow) -> bool:
            return event.kind in ENDS or wanted.allows(event)

        async with self._entered(client, job_id, wants, previews) as (listener, stay):
            begun = await self._read(client, self._beginning_of_job, client, job_id, sent)
            if sent and begun.ended and not begun.lost and sent.id >= begun.last:
                return Response(status_code=204, headers=HEADERS)
            blocks = self._blocks_of_job(client, listener, job_id, begun, sent, wanted)
            return EventStream(listener, blocks, stay())

    async def of_tenant(
        self, client: Client, sent: EventCursor | None, wanted: EventFilter
    ) -> Response:
        """Open a stream of a tenant's events, as `of_job` does. It has no end."""
        async with self._entered(client, None, wanted.allows) as (listener, stay):
            begun = await self._read(client, self._beginning_of_tenant, client, sent)
            blocks = self._blocks_of_tenant(client, listener, begun, sent, wanted)
            return EventStream(listener, blocks, stay())

    async def of_states(
        self, client: Client, job_id: uuid.UUID, blocks: Blocks, *, previews: bool = False
    ) -> Response:
        """Open a stream of a job's states in a form of the caller's.

        Args:
            client: The client.
            job_id: The job.
            blocks: Makes the texts to send of the job's states. It gets the job at first, and after
                each event that changes what can be shown, until it has ended. If the stream must
                end sooner, the last job has not ended.
            previews: Give it previews too.

        Raises:
            NotFound: There is no such job, or it belongs to another tenant.
            Unavailable: Too many are open, or Postgres does not answer.
        """

        def wants(event: EventRow) -> bool:
            return event.kind in ENDS or event.kind == "frames.succeeded"

        async with self._entered(client, job_id, wants, previews) as (listener, stay):
            begun = await self._read(client, self._beginning_of_job, client, job_id, None)
            return EventStream(
                listener, blocks(self._states(client, listener, job_id, begun)), stay()
            )

    async def _states(
        self, client: Client, listener: Listener, job_id: uuid.UUID, begun: _Beginning
    ) -> AsyncIterator[State]:
        yield begun.job
        if begun.ended:
            return
        async for news in _news(listener, client.still_allowed):
            if news is None or isinstance(news, list):
                yield news
            elif isinstance(news, Told) and news.event.id > begun.last:
                begun = await self._read(client, self._beginning_of_job, client, job_id, None)
                yield begun.job
                if begun.ended:
                    return

    async def ended_job(self, client: Client, job_id: uuid.UUID, seconds: float) -> schemas.Job:
        """Wait until a job has ended, or for a time. Return it as it is then.

        A client that hangs up ends it.

        Raises:
            NotFound: There is no such job, or it belongs to another tenant.
            Unavailable: Too many calls wait, or Postgres does not answer.
        """
        deadline = time.monotonic() + seconds
        async with self._entered(client, job_id, lambda event: event.kind in ENDS) as (it, _):
            begun = await self._read(client, self._beginning_of_job, client, job_id, None)
            while not begun.ended:
                heard = await _hears(client, it, deadline, begun.last)
                if it.is_cut_off:  # the process ends, or the client has gone
                    break
                begun = await self._read(client, self._beginning_of_job, client, job_id, None)
                if not heard:
                    break
            return begun.job

    async def page_with_news(
        self,
        client: Client,
        job_id: uuid.UUID | None,
        wanted: EventFilter,
        read: Callable[[], EventPage],
        seconds: float,
    ) -> EventPage:
        """Wait until a page has events, or for a time. Return it.

        Args:
            client: The client. If it hangs up, the call ends.
            job_id: The job whose events are read. None: those of the tenant.
            wanted: Events to wait for.
            read: Reads the page, in a thread.
            seconds: Longest time to wait.
        """
        deadline = time.monotonic() + seconds
        async with self._entered(client, job_id, wanted.allows) as (listener, _):
            page = await self._read(client, read)
            while not (page.events or page.more or page.reset):
                if not await _hears(client, listener, deadline, 0):
                    break
                page = await self._read(client, read)
        return page

    async def check(self, client: Client, job_id: uuid.UUID) -> None:
        """Check that a job is there.

        Raises:
            NotFound: There is no such job, or it belongs to another tenant.
        """
        await self._read(client, self._beginning_of_job, client, job_id, None)

    @asynccontextmanager
    async def _entered(
        self,
        client: Client,
        job_id: uuid.UUID | None,
        wants: Callable[[EventRow], bool],
        previews: bool = False,
    ) -> AsyncIterator[tuple[Listener, Callable[[], Callable[[], None]]]]:
        """Enter a listener for the block.

        Yield it, and a function: if that is called, the listener stays until its result is called.
        """
        if client.token_job:
            place = self._by_token.take(str(client.token_job), "streams of this job")
        else:
            place = self._places.take(str(client.tenant_id), "streams of events")
        listener: Listener | None = None
        stays = False

        def end() -> None:
            if listener is not None:
                listener.leave()
            place.give_back()

        def stay() -> Callable[[], None]:
            nonlocal stays
            stays = True
            return end

        try:
            if job_id is None:
                listener = await self.feed.listen_to_tenant(client.tenant_id, client.base, wants)
            else:
                listener = await self.feed.listen_to_job(
                    job_id, client.base, wants, wants_previews=previews
                )
            yield listener, stay
        finally:
            if not stays:
                end()

    async def _read(self, client: Client, function: Callable[..., T], *args: Any) -> T:
        turn = self._turns.setdefault(client.tenant_id, Semaphore(READING_PER_TENANT))
        async with turn:
            return await to_thread.run_sync(function, *args, limiter=self._reading)

    def _beginning_of_job(
        self, client: Client, job_id: uuid.UUID, sent: EventCursor | None
    ) -> _Beginning:
        with reads(self._farm.store) as connection:
            until = stored.horizon(connection)
            last = stored.newest_of_job(connection, job_id)  # the job's row is as new, or newer
            row = queries.get_job(connection, client.tenant_id, job_id)
            waiting = Lanes(connection).reason(row)
            job = job_view(row, waiting, self._farm.settings.retention_days)
        if client.token_job:  # its holder may be anybody
            job = job.model_copy(update={"tenant": ""})
        lost = sent is not None and is_lost(self._farm, sent, until, last)
        return _Beginning(until, last, job, row.status in TERMINAL, lost)

    def _beginning_of_tenant(self, client: Client, sent: EventCursor | None) -> _Beginning:
        with reads(self._farm.store) as connection:
            until = stored.horizon(connection)
            state = schemas.TenantState(**limits.in_use(connection, client.tenant_id)._asdict())
        lost = sent is not None and is_lost(self._farm, sent, until)
        return _Beginning(until, 0, state, False, lost)

    async def _blocks_of_job(
        self,
        client: Client,
        listener: Listener,
        job_id: uuid.UUID,
        begun: _Beginning,
        sent: EventCursor | None,
        wanted: EventFilter,
    ) -> AsyncIterator[bytes]:
        epoch = begun.until.epoch
        last = begun.last if sent is None or begun.lost else sent.id
        for block in _first(begun, sent, EventCursor(epoch, 0, begun.last, begun.until.at)):
            yield block
        while last < begun.last and not listener.is_cut_off:
            found = await self._read(client, self._page_of_job, client, job_id, last, wanted)
            if not found:
                break
            for told in found:
                last = told.event.id
                if last <= begun.last and wanted.allows(told.event):  # later ones come by the feed
                    yield self._block(told, client, EventCursor(epoch, 0, last, _seconds(told)))
            last = min(last, begun.last)
        if begun.ended and not listener.is_cut_off:
            yield _beat(EventCursor(epoch, 0, max(last, begun.last), _now()))  # then it gets a 204
            return
        async for news in _news(listener, client.still_allowed):
            if news is None:
                last = max(last, listener.reached[1])
                yield _beat(EventCursor(epoch, 0, last, _now()))
            elif isinstance(news, JobSteps):
                yield _progress(news)
            elif isinstance(news, list):
                for preview in news:
                    yield _previewed(job_id, preview)
            elif news.event.id > last:
                last = news.event.id
                if wanted.allows(news.event):
                    yield self._block(news, client, EventCursor(epoch, 0, last, _seconds(news)))
                if news.event.kind in ENDS and listener.is_idle:
                    yield _beat(EventCursor(epoch, 0, last, _now()))
                    return
        yield _move()

    async def _blocks_of_tenant(
        self,
        client: Client,
        listener: Listener,
        begun: _Beginning,
        sent: EventCursor | None,
        wanted: EventFilter,
    ) -> AsyncIterator[bytes]:
        until = begun.until
        last = (until.xid, 0) if sent is None or begun.lost else (sent.xid, sent.id)
        for block in _first(begun, sent, EventCursor(until.epoch, until.xid, 0, until.at)):
            yield block
        while not listener.is_cut_off:
            found = await self._read(client, self._page_of_tenant, client, last, until, wanted)
            for told in found:
                last = told.event.xid, told.event.id
                if wanted.allows(told.event):
                    cursor = EventCursor(until.epoch, *last, _seconds(told))
                    yield self._block(told, client, cursor)
            if not found:
                break
        last = max(last, (until.xid, 0))
        async for news in _news(listener, client.still_allowed):
            if news is None:
                last = max(last, listener.reached)
                yield _beat(EventCursor(until.epoch, *last, _now()))
            elif isinstance(news, Told) and (news.event.xid, news.event.id) > last:
                last = news.event.xid, news.event.id
                yield self._block(news, client, EventCursor(until.epoch, *last, _seconds(news)))
        yield _move()

    def _page_of_job(
        self, client: Client, job_id: uuid.UUID, last: int, wanted: EventFilter
    ) -> list[Told]:
        with reads(self._farm.store) as connection:
            found = stored.of_jobs(
                connection, {job_id: last}, limit=PAGE, with_images=wanted.asks_for_images
            )
            return self._told(connection, found, client, wanted)

    def _page_of_tenant(
        self, client: Client, last: tuple[int, int], until: Horizon, wanted: EventFilter
    ) -> list[Told]:
        with reads(self._farm.store) as connection:
            found = stored.of_tenants(
                connection,
                {client.tenant_id: last},
                until,
                limit=PAGE,
                with_images=wanted.asks_for_images,
            )
            return self._told(connection, found, client, wanted)

    def _told(
        self,
        connection: Connection,
        found: Sequence[EventRow],
        client: Client,
        wanted: EventFilter,
    ) -> list[Told]:
        """Return events with their texts. They are made here, in a thread."""
        if self._addresses.are_due:
            self._addresses.refresh()
        chosen = {event.id for event in found if wanted.allows(event)}
        identities = identities_of(connection, [event for event in found if event.id in chosen])
        told = [Told(event, own_identities(event, identities)) for event in found]
        for each in told:
            if each.event.id in chosen:
                self._text(each, client.base)
        return told

    def _text(self, told: Told, base: str) -> bytes:
        text = told.texts.get(base)
        if text is None:
            text = told.texts[base] = self._render(told.event, told.identities, base)
        return text

    def _render(self, event: EventRow, identities: Identities, base: str) -> bytes:
        return as_json(event_view(event, identities, self._addresses.at(base)))

    def _block(self, told: Told, client: Client, cursor: EventCursor) -> bytes:
        return message(self._text(told, client.base), told.event.kind, cursor)


def streams_of(request: Request) -> Streams:
    """Return the streams of this process."""
    streams: Streams = request.app.state.streams
    return streams


def _first(begun: _Beginning, sent: EventCursor | None, here: EventCursor) -> Iterable[bytes]:
    yield RECONNECT
    if begun.lost:
        yield message({"detail": "Events after your cursor may be lost."}, "reset")
    if sent is None or begun.lost:
        yield message(as_json(begun.state, sparse=False), "state", here)


async def _hears(client: Client, listener: Listener, deadline: float, last: int) -> bool:
    """Wait for an event after the ID `last`. Return False if none comes, or if it is cut off.

    A client that hangs up cuts its listener off.
    """
    listener.beat_at = math.inf  # it waits for nothing else
    heard = False
    async with create_task_group() as group:
        group.start_soon(_when_gone, client.receive, listener.cut_off)
        with move_on_after(max(0.0, deadline - time.monotonic())):
            while not (heard or listener.is_cut_off):
                await listener.wait()
                heard = any(told.event.id > last for told in [*listener.take()])
        group.cancel_scope.cancel()
    return heard and not listener.is_cut_off


async def _news(
    listener: Listener, allowed: StillAllowed
) -> AsyncIterator[Told | JobSteps | list[Preview] | None]:
    """Yield what a listener gets, and None now and then if it gets nothing, until it is cut off."""
    while not listener.is_cut_off:
        await listener.wait()
        if time.monotonic() >= listener.beat_at:
            listener.beat_at = time.monotonic() + feed.SILENT_SECONDS
            try:
                await allowed()
            except Unauthenticated:
                return
            except FarmError:
                pass  # Postgres does not answer: it is asked again
            if listener.is_idle:
                yield None
        for told in listener.take():
            yield told
        steps = listener.take_steps()
        if steps is not None:
            yield steps
        if previews := listener.take_previews():
            yield previews


def _beat(cursor: EventCursor) -> bytes:
    """Return a block without an event. It moves the cursor of a client, though it gets nothing."""
    return f"id: {cursor}\n\n".encode()


def _move() -> bytes:
    return f"retry: {random.randint(*MOVE_MILLISECONDS)}\n\n".encode()  # noqa: S311 - no secret


def _now() -> int:
    """Return a time up to which events have been read, in Unix seconds."""
    return int(time.time()) - 60


def _seconds(told: Told) -> int:
    return int(told.event.at.timestamp())


def _progress(steps: JobSteps) -> bytes:
    """Return an event without an ID: a client that resumes does not need it again."""
    frames = [{"ordinal": ordinal, "step": step, "steps": of} for ordinal, step, of in steps.frames]
    eta = None if steps.eta_seconds is None else round(steps.eta_seconds, 3)
    data = {"job": str(steps.job_id), "progress": steps.progress, "eta_seconds": eta}
    return message({**data, "frames": frames}, "progress")


def _previewed(job_id: uuid.UUID, preview: Preview) -> bytes:
    """Return an event with a preview, without an ID: a client that resumes does not need it."""
    data = {
        "job": str(job_id),
        "ordinal": preview.ordinal,
        "step": preview.step,
        "steps": preview.steps,
        "format": "jpeg",
        "b64": b64encode(preview.jpeg).decode(),
    }
    return message(data, "preview")
