"""Clients that submit one-image jobs over HTTP, in a separate process.

`python -m tests.benchmarks.clients JSON`, with the fields of `Load`, prints the answers as JSON.
"""

from __future__ import annotations

import http.client
import itertools
import json
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

BODY = {"pipeline": "null", "prompts": ["a red star"], "width": 32, "height": 32, "steps": 1}


@dataclass(frozen=True)
class Load:
    """Jobs of clients. Each client has its own connection."""

    host: str
    port: int
    key: str
    clients: int
    seconds: float | None = None
    """Time in which they submit. None: until `jobs` are submitted."""
    jobs: int = 0
    batch: int = 1
    """Jobs of one call. More than one: by POST /v1/jobs/batch."""
    seeded: bool = True
    """Give each job a seed, so that it is repeatable."""


class Client:
    """One connection."""

    def __init__(self, load: Load, number: int) -> None:
        self._load = load
        self._connection = http.client.HTTPConnection(load.host, load.port, timeout=60)
        self._headers = {"Authorization": f"Bearer {load.key}", "Content-Type": "application/json"}
        body: dict[str, Any] = {**BODY, "step_seconds": 0.0} | (
            {"seed": number} if load.seeded else {}
        )
        self._path = "/v1/jobs" if load.batch == 1 else "/v1/jobs/batch"
        self._body = json.dumps(body if load.batch == 1 else {"jobs": [body] * load.batch})

    def submit(self) -> list[str]:
        """Make one call. Return the IDs of the jobs, with "" for each that was refused."""
        self._connection.request("POST", self._path, self._body, self._headers)
        answer = self._connection.getresponse()
        content = answer.read()
        if answer.status >= http.HTTPStatus.BAD_REQUEST:
            return [""] * self._load.batch
        told = json.loads(content)
        if self._load.batch == 1:
            return [str(told["id"])]
        return [str((each["job"] or {"id": ""})["id"]) for each in told["data"]]

    def run(self, calls: Iterator[int], started: float, found: list[tuple[float, str]]) -> None:
        """Submit until the load is through. Note the seconds of each call with its jobs."""
        until = float("inf") if self._load.seconds is None else started + self._load.seconds
        while (began := time.monotonic()) < until and next(calls, None) is not None:
            ids = self.submit()
            found += [(time.monotonic() - began, job_id) for job_id in ids]
        self._connection.close()


def main(load: Load) -> dict[str, object]:
    """Run the clients. Return the seconds, and the seconds and job ID of each answer."""
    found: list[tuple[float, str]] = []
    clients = [Client(load, number) for number in range(load.clients)]
    numbers = range(-(-load.jobs // load.batch)) if load.seconds is None else itertools.count()
    calls, started = Shared(numbers), time.monotonic()
    threads = [
        threading.Thread(target=client.run, args=(calls, started, found)) for client in clients
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"seconds": time.monotonic() - started, "answers": found}


class Shared(Iterator[int]):
    """An iterator that several threads share."""

    def __init__(self, numbers: range | Iterator[int]) -> None:
        self._numbers = iter(numbers)
        self._lock = threading.Lock()

    def __next__(self) -> int:
        with self._lock:
            return next(self._numbers)


if __name__ == "__main__":
    json.dump(main(Load(**json.loads(sys.argv[1]))), sys.stdout)
