"""A TCP proxy with faults: one link for each process and server.

All links run in one thread with an event loop. Any thread may change a link's fault at any moment.
A fault applies to existing and new connections.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")

CHUNK = 2**16
BUSY = b"<Error><Code>ServiceUnavailable</Code><Message>Try again later.</Message></Error>"
UNAVAILABLE = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/xml\r\n"
    b"Content-Length: %d\r\nConnection: close\r\n\r\n%b" % (len(BUSY), BUSY)
)


class Cut(Exception):
    """Raised by a fault to reset both sides of the connection."""


@dataclass(eq=False)
class Connection:
    """A client's connection, and the connection to the server that belongs to it."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter | None = None
    sent: int = 0
    """Number of bytes forwarded from the client."""
    muted: bool = False
    """True if the server's next answer is dropped."""
    frozen: bool = False
    """True if this connection forwards nothing any more. New connections are served."""

    @property
    def port(self) -> int | None:
        """Return the connection's client port, as the server sees it."""
        return self.server.get_extra_info("sockname")[1] if self.server else None

    def reset(self) -> None:
        for writer in (self.client, self.server):
            if writer is not None:
                writer.transport.abort()


class Fault:
    """Base of all faults, which change the bytes of a link. This one changes nothing."""

    resets = False
    """True if the fault resets existing connections when it begins."""
    freezes = False
    """True if the fault freezes existing connections when it begins."""
    stalls = False
    """True if nothing is forwarded in either direction until the fault ends."""

    async def connect(self) -> None:
        """Called before a connection to the server is opened."""

    async def request(self, connection: Connection, data: bytes) -> bytes:
        return data

    async def reply(self, connection: Connection, data: bytes) -> bytes:
        return data


class Stall(Fault):
    """Forwards nothing and closes nothing. Delayed bytes are forwarded when it ends."""

    stalls = True


class Freeze(Fault):
    """Existing connections forward nothing any more. New ones work."""

    freezes = True


class Reset(Fault):
    """Resets every existing and every new connection."""

    resets = True

    async def connect(self) -> None:
        raise Cut


@dataclass
class Truncate(Fault):
    """Resets a connection after this many bytes from the client."""

    limit: int

    async def request(self, connection: Connection, data: bytes) -> bytes:
        room = self.limit - connection.sent
        if len(data) <= room:
            return data
        if connection.server is not None:
            connection.server.write(data[: max(room, 0)])
            await connection.server.drain()
        raise Cut


@dataclass
class Swallow(Fault):
    """Forwards a request, drops the server's answer, and resets the connection."""

    trigger: bytes
    times: int = 1
    skip: int = 0
    """Number of matching requests that are answered first."""

    async def request(self, connection: Connection, data: bytes) -> bytes:
        if self.trigger in data:
            self.skip -= 1
            if -self.times <= self.skip < 0:
                connection.muted = True
        return data

    async def reply(self, connection: Connection, data: bytes) -> bytes:
        if connection.muted and not data.startswith(b"HTTP/1.1 100"):
            raise Cut
        return data


@dataclass
class Slow(Fault):
    """Delays every piece of data."""

    seconds: float

    async def request(self, connection: Connection, data: bytes) -> bytes:
        await asyncio.sleep(self.seconds)
        return data

    async def reply(self, connection: Connection, data: bytes) -> bytes:
        await asyncio.sleep(self.seconds)
        return data


class Refuse(Fault):
    """Answers every HTTP request with a 503."""

    async def request(self, connection: Connection, data: bytes) -> bytes:
        connection.client.write(UNAVAILABLE)
        await connection.client.drain()
        connection.client.close()
        return b""


HEALTHY = Fault()


@dataclass(eq=False)
class Link:
    """A port of this machine that is forwarded to a server."""

    owner: str
    """Name of the process that uses it."""
    server: str
    target: tuple[str, int]
    loop: asyncio.AbstractEventLoop
    port: int = 0
    fault: Fault = HEALTHY
    connections: set[Connection] = field(default_factory=set)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _watched: tuple[bytes, threading.Event] | None = None

    def begin(self, fault: Fault) -> None:
        """Begin a fault. Return when it is active."""
        asyncio.run_coroutine_threadsafe(self.set(fault), self.loop).result()

    def heal(self) -> None:
        """End the fault."""
        self.begin(HEALTHY)

    def watch(self, trigger: bytes) -> threading.Event:
        """Return an event that is set when a client has sent these bytes."""
        seen = threading.Event()
        self._watched = (trigger, seen)
        return seen

    async def set(self, fault: Fault) -> None:
        """Begin a fault. Must be called in the loop's thread."""
        self.fault = fault
        for connection in self.connections:
            connection.sent = 0
            connection.frozen = fault.freezes or (connection.frozen and not fault.resets)
            if fault.resets:
                connection.reset()
        self._changed.set()
        self._changed = asyncio.Event()

    async def serve(self, client: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(writer)
        self.connections.add(connection)
        try:
            await self._flowing(connection)
            await self.fault.connect()
            server, connection.server = await asyncio.open_connection(*self.target)
            pumps = [
                asyncio.create_task(self._pump(connection, client, connection.server, True)),
                asyncio.create_task(self._pump(connection, server, writer, False)),
            ]
            try:
                # Either side may close; the other side's remaining bytes were forwarded by then.
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        except (Cut, OSError):
            connection.reset()
        finally:
            self.connections.discard(connection)
            for side in (connection.client, connection.server):
                if side is not None:
                    side.close()

    async def _pump(
        self,
        connection: Connection,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        is_request: bool,
    ) -> None:
        try:
            while data := await reader.read(CHUNK):
                await self._flowing(connection)
                through = self.fault.request if is_request else self.fault.reply
                passed = await through(connection, data)
                await self._flowing(connection)
                writer.write(passed)
                await writer.drain()
                if is_request:
                    connection.sent += len(passed)
                    self._tell(passed)
            await self._flowing(connection)  # the end of a connection is delayed too
        except (Cut, OSError):
            connection.reset()

    def _tell(self, data: bytes) -> None:
        if self._watched is not None and self._watched[0] in data:
            self._watched[1].set()

    async def _flowing(self, connection: Connection) -> None:
        while self.fault.stalls or connection.frozen:
            await self._changed.wait()


class Proxies:
    """The thread that runs all links."""

    def __init__(self) -> None:
        self.links: list[Link] = []
        self._listeners: list[asyncio.Server] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxies", daemon=True)

    def __enter__(self) -> Proxies:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def link(self, owner: str, server: str, host: str, port: int) -> Link:
        """Open a link from `owner` to a server on a new port."""
        link = Link(owner, server, (host, port), self._loop)
        link.port = self._do(lambda: self._listen(link))
        self.links.append(link)
        return link

    def _do(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        return asyncio.run_coroutine_threadsafe(work(), self._loop).result()

    async def _listen(self, link: Link) -> int:
        listener = socket.create_server(("127.0.0.1", 0))
        self._listeners.append(await asyncio.start_server(link.serve, sock=listener))
        return int(listener.getsockname()[1])

    async def _close(self) -> None:
        for listener in self._listeners:
            listener.close()
        for link in self.links:
            await link.set(Reset())
        # Also those that were accepted a moment ago, and have not begun.
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(others, timeout=10)
        await asyncio.sleep(0)  # the transports that they closed
