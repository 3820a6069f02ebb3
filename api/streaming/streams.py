"""Streams of events: server-sent events (text/event-stream) of a job, or of a tenant.

A stream begins with a snapshot, or after the client's cursor with the events that it missed. Then
the feed hands it each event. A client that is cut off resumes with its cursor, and loses nothing.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from anyio import CapacityLimiter, create_task_group, to_thread
from fastapi import Request
from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api import schemas
from api.addresses import SignedAddresses, public_url
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
from farm.services.events import EventFilter, EventPage, identities_of, is_lost
from farm.store import events as stored
from farm.store import limits, queries
from farm.store.engine import reads
from farm.store.events import Horizon
from farm.store.leases import JobSteps

log = logging.getLogger(__name__)

T = TypeVar("T")

MEDIA_TYPE = "text/event-stream"
RECONNECT = b"retry: 2000\n\n"
MOVE = b"retry: 500\n\n"
"""After so many milliseconds a client connects again: usually, and when the process ends."""
PAGE = 200
"""Events of the past that are read at once."""
READING_THREADS = 2
"""Number of threads in which streams read their beginnings. Others wait their turn."""
LISTENERS, LISTENERS_PER_TENANT = 5000, 2500
"""Maximum number of streams and waiting calls of a process: in all, and per tenant."""
ENDS = frozenset({*(f"job.{status}" for status in TERMINAL), "job.removed"})
HEADERS = {
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",  # nginx would collect the events first
    "Vary": "Accept",
}

StillAllowed = Callable[[], Awaitable[object]]
"""Raises Unauthenticated if a client may read no more."""


def wants_stream(request: Request) -> bool:
    """Return True if a request asks for a stream of events, and not for a page of them."""
    return MEDIA_TYPE in request.headers.get("accept", "")


def message(data: Any, event: str | None = None, cursor: EventCursor | None = None) -> bytes:
    """Return one server-sent event. The JSON is ASCII: some clients end a line at U+2028."""
    text = data if isinstance(data, bytes) else json.dumps(data).encode()
    head = f"event: {event}\n" if event else ""
    if cursor is not None:
        head = f"id: {cursor}\n{head}"
    return head.encode() + b"data: " + text + b"\n\n"


def as_json(model: BaseModel) -> bytes:
    """Return a model's JSON in ASCII."""
    return json.dumps(model.model_dump(mode="json", exclude_none=True)).encode()


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
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        try:
            async for block in self._blocks:
                self._listener.sending_at = time.monotonic()
                await send({"type": "http.response.body", "body": block, "more_body": True})
                self._listener.sending_at = None
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


class Streams:
    """Opens streams, and lets calls wait for the end of a job. Used in one event loop."""

    def __init__(self, farm: Farm, addresses: SignedAddresses) -> None:
        self.feed = Feed(farm, addresses)
        self._farm = farm
        self._addresses = addresses
        self._places = Places(LISTENERS, LISTENERS_PER_TENANT)
        self._reading = CapacityLimiter(READING_THREADS)

    async def of_job(
        self,
        request: Request,
        tenant_id: uuid.UUID,
        job_id: uuid.UUID,
        sent: EventCursor | None,
        wanted: EventFilter,
        allowed: StillAllowed,
    ) -> Response:
        """Open a stream of a job's events. 204 if it has ended and the client has read them all.

        Args:
            request: The request.
            tenant_id: Owner of the job.
            job_id: The job.
            sent: The client's cursor. None: the stream begins with a snapshot.
            wanted: Which events.
            allowed: Raises Unauthenticated once the client may read no more.

        Raises:
            NotFound: There is no such job, or it belongs to another tenant.
            Unavailable: Too many are open, or Postgres does not answer.
        """
        place = self._places.take(str(tenant_id), "streams of events")
        listener = self.feed.listen_to_job(job_id)

        def end() -> None:
            listener.leave()
            place.give_back()

        try:
            begun = await self._read(self._beginning_of_job, tenant_id, job_id, sent)
            self.feed.begin_job(job_id, begun.last)
            if sent and begun.ended and not begun.lost and sent.id >= begun.last:
                end()
                return Response(status_code=204, headers=HEADERS)
            blocks = self._blocks_of_job(request, listener, job_id, begun, sent, wanted, allowed)
            return EventStream(listener, blocks, end)
        except BaseException:
            end()
            raise

    async def of_tenant(
        self,
        request: Request,
        tenant_id: uuid.UUID,
        sent: EventCursor | None,
        wanted: EventFilter,
        allowed: StillAllowed,
    ) -> Response:
        """Open a stream of a tenant's events, as `of_job` does. It has no end."""
        place = self._places.take(str(tenant_id), "streams of events")
        listener = self.feed.listen_to_tenant(tenant_id)

        def end() -> None:
            listener.leave()
            place.give_back()

        try:
            begun = await self._read(self._beginning_of_tenant, tenant_id, sent)
            self.feed.begin_tenant(tenant_id, begun.until.xid)
            blocks = self._blocks_of_tenant(
                request, listener, tenant_id, begun, sent, wanted, allowed
            )
            return EventStream(listener, blocks, end)
        except BaseException:
            end()
            raise

    async def ended_job(
        self, request: Request, tenant_id: uuid.UUID, job_id: uuid.UUID, seconds: float
    ) -> schemas.Job:
        """Wait until a job has ended, or for a time. Return it as it is then.

        A client that hangs up ends it.

        Raises:
            NotFound: There is no such job, or it belongs to another tenant.
            Unavailable: Too many calls wait, or Postgres does not answer.
        """
        listener = self.feed.listen_to_job(job_id, ENDS)
        try:
            with self._places.taken(str(tenant_id), "waiting calls"):
                begun = await self._read(self._beginning_of_job, tenant_id, job_id, None)
                self.feed.begin_job(job_id, begun.last)
                if not begun.ended:
                    async with _while_there(request, listener):
                        await _hears(listener, seconds)
            now = await self._read(self._beginning_of_job, tenant_id, job_id, None)
        finally:
            listener.leave()
        assert isinstance(now.state, schemas.Job)
        return now.state

    async def page_with_news(
        self,
        request: Request,
        tenant_id: uuid.UUID,
        job_id: uuid.UUID | None,
        read: Callable[[], EventPage],
        seconds: float,
    ) -> EventPage:
        """Wait until a page has events, or for a time. Return it.

        Args:
            request: The request. A client that hangs up ends it.
            tenant_id: The caller's tenant.
            job_id: The job whose events are read. None: those of the tenant.
            read: Reads the page, in a thread.
            seconds: Longest time to wait.
        """
        deadline = time.monotonic() + seconds
        listener = (
            self.feed.listen_to_job(job_id) if job_id else self.feed.listen_to_tenant(tenant_id)
        )
        try:
            with self._places.taken(str(tenant_id), "waiting calls"):
                page = await self._read(read)
                if job_id:
                    self.feed.begin_job(job_id, page.cursor.id)
                else:
                    self.feed.begin_tenant(tenant_id, page.cursor.xid)
                while not (page.events or page.more or page.reset):
                    async with _while_there(request, listener):
                        heard = await _hears(listener, deadline - time.monotonic())
                    if not heard:
                        break
                    page = await self._read(read)
        finally:
            listener.leave()
        return page

    async def _read(self, function: Callable[..., T], *args: Any) -> T:
        return await to_thread.run_sync(function, *args, limiter=self._reading)

    def _beginning_of_job(
        self, tenant_id: uuid.UUID, job_id: uuid.UUID, sent: EventCursor | None
    ) -> _Beginning:
        with reads(self._farm.store) as connection:
            until = stored.horizon(connection)
            last = stored.newest_of_job(connection, job_id)  # the job's row is as new, or newer
            row = queries.get_job(connection, tenant_id, job_id)
            job = job_view(row, Lanes(connection, tenant_id).waiting_because(row))
        lost = sent is not None and is_lost(self._farm, sent, until)
        return _Beginning(until, last, job, row.status in TERMINAL, lost)

    def _beginning_of_tenant(self, tenant_id: uuid.UUID, sent: EventCursor | None) -> _Beginning:
        with reads(self._farm.store) as connection:
            until = stored.horizon(connection)
            state = schemas.TenantState(**limits.in_use(connection, tenant_id)._asdict())
        lost = sent is not None and is_lost(self._farm, sent, until)
        return _Beginning(until, 0, state, False, lost)

    async def _blocks_of_job(
        self,
        request: Request,
        listener: Listener,
        job_id: uuid.UUID,
        begun: _Beginning,
        sent: EventCursor | None,
        wanted: EventFilter,
        allowed: StillAllowed,
    ) -> AsyncIterator[bytes]:
        base, epoch = public_url(request), begun.until.epoch
        last = begun.last if sent is None or begun.lost else sent.id
        here = EventCursor(epoch, 0, begun.last, begun.until.at)
        for block in _first(begun, sent, here):
            yield block
        while last < begun.last:
            found = await self._read(self._page_of_job, job_id, last)
            for told in found:
                last = told.event.id
                if wanted.allows(told.event):
                    yield self._block(told, base, EventCursor(epoch, 0, last, _seconds(told)))
            if not found:
                break
        if begun.ended and last <= begun.last:
            return
        async for news in _news(listener, allowed):
            if isinstance(news, bytes):
                yield news
            elif isinstance(news, JobSteps):
                yield _progress(news)
            elif news.event.id > last:
                last = news.event.id
                if wanted.allows(news.event):
                    yield self._block(news, base, EventCursor(epoch, 0, last, _seconds(news)))
                if news.event.kind in ENDS and listener.is_idle:
                    return

    async def _blocks_of_tenant(
        self,
        request: Request,
        listener: Listener,
        tenant_id: uuid.UUID,
        begun: _Beginning,
        sent: EventCursor | None,
        wanted: EventFilter,
        allowed: StillAllowed,
    ) -> AsyncIterator[bytes]:
        base, until = public_url(request), begun.until
        last = (until.xid, 0) if sent is None or begun.lost else (sent.xid, sent.id)
        for block in _first(begun, sent, EventCursor(until.epoch, until.xid, 0, until.at)):
            yield block
        while True:
            found = await self._read(self._page_of_tenant, tenant_id, last, until)
            for told in found:
                last = told.event.xid, told.event.id
                if wanted.allows(told.event):
                    yield self._block(told, base, EventCursor(until.epoch, *last, _seconds(told)))
            if not found:
                break
        async for news in _news(listener, allowed):
            if isinstance(news, bytes):
                yield news
            elif isinstance(news, Told) and (news.event.xid, news.event.id) > last:
                last = news.event.xid, news.event.id
                if wanted.allows(news.event):
                    yield self._block(news, base, EventCursor(until.epoch, *last, _seconds(news)))

    def _page_of_job(self, job_id: uuid.UUID, last: int) -> list[Told]:
        with reads(self._farm.store) as connection:
            found = stored.of_jobs(connection, {job_id: last}, limit=PAGE)
            return self._told(found, identities_of(connection, found))

    def _page_of_tenant(
        self, tenant_id: uuid.UUID, last: tuple[int, int], until: Horizon
    ) -> list[Told]:
        with reads(self._farm.store) as connection:
            found = stored.of_tenants(connection, {tenant_id: last}, until, limit=PAGE)
            return self._told(found, identities_of(connection, found))

    def _told(self, found: Iterable[stored.EventRow], identities: Any) -> list[Told]:
        if self._addresses.are_due:
            self._addresses.refresh()
        return [Told(event, identities) for event in found]

    def _block(self, told: Told, base: str, cursor: EventCursor) -> bytes:
        text = told.texts.get(base)
        if text is None:
            view = event_view(told.event, told.identities, self._addresses.at(base))
            text = told.texts[base] = as_json(view)
        return message(text, told.event.kind, cursor)


def streams_of(request: Request) -> Streams:
    """Return the streams of this process."""
    streams: Streams = request.app.state.streams
    return streams


def _first(begun: _Beginning, sent: EventCursor | None, here: EventCursor) -> Iterable[bytes]:
    yield RECONNECT
    if begun.lost:
        yield message({"detail": "Events after your cursor may be lost."}, "reset")
    if sent is None or begun.lost:
        yield message(as_json(begun.state), "state", here)


@asynccontextmanager
async def _while_there(request: Request, listener: Listener) -> AsyncIterator[None]:
    """Cut a listener off when its client has gone."""
    async with create_task_group() as group:
        group.start_soon(_when_gone, request.receive, listener.cut_off)
        yield
        group.cancel_scope.cancel()


async def _hears(listener: Listener, seconds: float) -> bool:
    """Wait for an event. Return False if none comes within this time, or if it is cut off."""
    listener.beat_at = math.inf  # it waits for nothing else
    try:
        async with asyncio.timeout(max(0.0, seconds)):
            while not listener.is_cut_off:
                await listener.wait()
                if any(listener.take()):
                    return True
    except TimeoutError:
        pass
    return False


async def _news(
    listener: Listener, allowed: StillAllowed
) -> AsyncIterator[Told | JobSteps | bytes]:
    """Yield what a listener gets, and comments while it gets nothing, until it is cut off."""
    while not listener.is_cut_off:
        await listener.wait()
        if time.monotonic() >= listener.beat_at:
            listener.beat_at = time.monotonic() + feed.HEARTBEAT_SECONDS
            try:
                await allowed()
            except Unauthenticated:
                return
            except FarmError:
                pass  # Postgres does not answer: it is asked again
            if listener.is_idle:
                yield b":\n\n"
        for told in listener.take():
            yield told
        steps = listener.take_steps()
        if steps is not None:
            yield steps
    yield MOVE


def _seconds(told: Told) -> int:
    return int(told.event.at.timestamp())


def _progress(steps: JobSteps) -> bytes:
    """Return an event without an ID: a client that resumes does not need it again."""
    frames = [{"ordinal": ordinal, "step": step, "steps": of} for ordinal, step, of in steps.frames]
    eta = None if steps.eta_seconds is None else round(steps.eta_seconds, 3)
    data = {"job": str(steps.job_id), "progress": steps.progress, "eta_seconds": eta}
    return message({**data, "frames": frames}, "progress")
