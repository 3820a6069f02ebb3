"""A process with thousands of clients: streams of jobs, and calls that wait for a job.

`python -m tests.benchmarks.listening '{…}'` prints `ready` when all are open. When its input ends,
it prints what they got.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import dataclass, field

CONNECTING = 50
"""Clients that connect at the same time."""


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
    heard: list[tuple[int, int, float]] = field(default_factory=list)
    """(stream, event, time) of each event that a stream got."""
    failed: list[str] = field(default_factory=list)
    open: int = 0

    async def run(self) -> None:
        """Open all, and listen until the input ends."""
        self.gate = asyncio.Semaphore(CONNECTING)
        tasks = [
            asyncio.create_task(call(number))
            for call, count in ((self.stream, self.streams), (self.wait, self.waiting))
            for number in range(count)
        ]
        while self.open < len(tasks) and not self.failed:
            await asyncio.sleep(0.05)
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.read)
        for task in tasks:
            task.cancel()
        print(json.dumps({"heard": self.heard, "failed": self.failed[:5]}), flush=True)

    async def stream(self, number: int) -> None:
        """Read a stream of events."""
        job = self.jobs[number % len(self.jobs)]
        async with self.gate:
            reader, _ = await self._call(f"/v1/jobs/{job}/events", "Accept: text/event-stream")
            while not (line := await reader.readline()).startswith(b"data: "):  # the state
                if not line:
                    self.failed.append(f"stream {number} did not begin")
                    return
        self.open += 1
        kind = b""
        while line := await reader.readline():
            if line.startswith(b"event: "):
                kind = line[7:].strip()
            elif line.startswith(b"data: ") and kind != b"progress":
                self.heard.append((number, json.loads(line[6:])["id"], time.time()))
        self.failed.append(f"stream {number} ended")

    async def wait(self, number: int) -> None:
        """Wait for a job, again and again."""
        job = self.jobs[number % len(self.jobs)]
        while True:
            async with self.gate:
                reader, writer = await self._call(f"/v1/jobs/{job}", "Prefer: wait=600")
            self.open += 1
            status = await reader.readline()
            if b" 200 " not in status:
                self.failed.append(f"waiting call {number}: {status!r}")
            writer.close()

    async def _call(
        self, path: str, header: str
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(self.host, self.port)
        head = f"Host: {self.host}\r\nAuthorization: Bearer {self.key}\r\n{header}"
        writer.write(f"GET {path} HTTP/1.1\r\n{head}\r\n\r\n".encode())
        await writer.drain()
        return reader, writer


if __name__ == "__main__":
    asyncio.run(Listening(**json.loads(sys.argv[1])).run())
