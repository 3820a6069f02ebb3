"""A process with thousands of clients: streams of jobs, and calls that wait for a job.

`python -m tests.benchmarks.listening '{…}'` prints `ready` when all are open. When its input ends,
it prints what they got.

It shares the processor with the API that is measured. So a stream notes only what came and when;
the events in it are read at the end.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import uvloop

CONNECTING = 50
"""Clients that connect at the same time."""


class Stream(asyncio.Protocol):
    """A stream of a job's events."""

    def __init__(self) -> None:
        self.received: list[tuple[float, bytes]] = []
        """(time, bytes) of what came."""
        self.began: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done once the state of the job is there, which comes first."""
        self.has_ended = False

    def data_received(self, data: bytes) -> None:
        """Note what came."""
        self.received.append((time.time(), data))
        if not self.began.done() and b"\ndata: " in data:
            self.began.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """Note the end."""
        del exc
        self.has_ended = True
        if not self.began.done():
            self.began.set_result(None)

    def events(self) -> Iterator[tuple[int, float]]:
        """Yield the ID of each event, and the time at which its last byte was there."""
        rest, kind = b"", b""
        for at, data in self.received:
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if line.startswith(b"event: "):
                    kind = line[7:].strip()
                elif line.startswith(b"data: ") and kind not in (b"state", b"progress"):
                    yield json.loads(line[6:])["id"], at


@dataclass
class Listening:
    """The clients, all in one event loop."""

    host: str
    port: int
    key: str
    jobs: list[str]
    """IDs. The clients share them evenly."""
    streams: int
    waiting: int
    failed: list[str] = field(default_factory=list)
    open: int = 0

    async def run(self) -> None:
        """Open all, and listen until the input ends."""
        self.gate = asyncio.Semaphore(CONNECTING)
        waiting = [asyncio.create_task(self.wait(number)) for number in range(self.waiting)]
        streams = await asyncio.gather(*map(self.stream, range(self.streams)))
        while self.open < len(waiting) and not self.failed:
            await asyncio.sleep(0.05)
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.read)
        for task in waiting:
            task.cancel()
        for number, stream in enumerate(streams):
            if stream.has_ended:
                self.failed.append(f"stream {number} ended")
        heard = [(number, *each) for number, it in enumerate(streams) for each in it.events()]
        print(json.dumps({"heard": heard, "failed": self.failed[:5]}), flush=True)

    async def stream(self, number: int) -> Stream:
        """Open a stream of events."""
        job = self.jobs[number % len(self.jobs)]
        request = self._request(f"/v1/jobs/{job}/events", "Accept: text/event-stream")
        loop = asyncio.get_running_loop()
        async with self.gate:
            transport, stream = await loop.create_connection(Stream, self.host, self.port)
            transport.write(request)
            await stream.began
        return stream

    async def wait(self, number: int) -> None:
        """Wait for a job, again and again."""
        job = self.jobs[number % len(self.jobs)]
        while True:
            async with self.gate:
                reader, writer = await asyncio.open_connection(self.host, self.port)
                writer.write(self._request(f"/v1/jobs/{job}", "Prefer: wait=600"))
                await writer.drain()
            self.open += 1
            status = await reader.readline()
            if b" 200 " not in status:
                self.failed.append(f"waiting call {number}: {status!r}")
            writer.close()

    def _request(self, path: str, header: str) -> bytes:
        head = f"Host: {self.host}\r\nAuthorization: Bearer {self.key}\r\n{header}"
        return f"GET {path} HTTP/1.1\r\n{head}\r\n\r\n".encode()


if __name__ == "__main__":
    uvloop.run(Listening(**json.loads(sys.argv[1])).run())
