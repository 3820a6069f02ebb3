"""A reader of server-sent events, written after the HTML standard (section 9.2.6), for tests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

STREAM = {"Accept": "text/event-stream"}


@dataclass(frozen=True)
class Sent:
    """An event of a stream."""

    kind: str
    data: dict[str, Any]
    id: str | None
    """The reader's last ID after it."""


def events_in(lines: Iterator[str]) -> Iterator[Sent]:
    """Yield the events of a stream's lines."""
    kind, data, last = "message", list[str](), None
    for line in lines:
        if not line:
            if data:
                yield Sent(kind, json.loads("\n".join(data)), last)
            kind, data = "message", []
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "event":
            kind = value
        elif name == "data":
            data.append(value)
        elif name == "id":
            last = value


@contextmanager
def streamed(
    client: httpx.Client, path: str, after: str | None = None, **query: Any
) -> Iterator[Iterator[Sent]]:
    """Open a stream, and yield its events. A silence of ten seconds fails."""
    headers = STREAM if after is None else {**STREAM, "Last-Event-ID": after}
    timeout = httpx.Timeout(10.0)
    # httpx drops the query of `path` if it gets params.
    with client.stream(
        "GET", path, headers=headers, params=query or None, timeout=timeout
    ) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        yield events_in(response.iter_lines())
