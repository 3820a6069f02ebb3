"""Events of jobs, and a stream of them that begins again where it broke."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
from httpx_sse import ServerSentEvent

from farm.client.calls import Call, quoted
from farm.client.core import Pause, Server, failure, retry_pause, retry_seconds

SILENCE_SECONDS = 45.0
"""Time without a byte after which a stream is broken. The farm sends a line each 15 s."""


@dataclass(frozen=True)
class Event:
    """Something that happened, or the state at which a stream begins.

    Ignore kinds that you do not know: later versions of the farm have more.
    """

    kind: str
    """Such as `job.succeeded`; or `state`, `progress` or `reset`: see docs/api.md."""
    data: Mapping[str, Any]
    """Fields of the event, such as `job` and `frames`. Of a `state`: the job."""
    cursor: str | None
    """Place after it. None: before the first place. To go on from here: `after=event.cursor`."""


@dataclass
class Watching:
    """A stream of events: its place, and what to do when it breaks."""

    path: str
    params: Mapping[str, object] = field(default_factory=dict)
    cursor: str | None = None
    ended: bool = False
    """True if nothing follows."""
    _failures: int = 0

    @classmethod
    def of_job(cls, job_id: str, after: str | None) -> Watching:
        """Watch one job until it ends."""
        return cls(f"/v1/jobs/{quoted(job_id)}/events", cursor=after)

    def stream_call(self) -> Call[bytes]:
        """Return the call that opens the stream at its place."""
        headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
        if self.cursor:
            headers["Last-Event-ID"] = self.cursor
        return Call(bytes, "GET", self.path, self.params, headers=headers, seconds=SILENCE_SECONDS)

    def page_call(self) -> Call[dict[str, Any]] | None:
        """Return the call that reads what a silent stream may have held back.

        None: there is no place yet.
        """
        if self.cursor is None:
            return None
        params = {**self.params, "after": self.cursor, "limit": 200}
        return Call(dict[str, Any], "GET", self.path, params)

    def opened(self, server: Server, response: httpx.Response) -> Pause | None:
        """Note the answer to `stream_call`. Return a pause if it must be sent again.

        Raises:
            FarmError: the farm refused it.
        """
        if response.status_code == 204:
            self.ended = True
            return None
        if response.is_success:
            server.reached = True
            return None
        error = failure(server.address, response)
        pause = retry_pause(response, self._failures)
        if pause is None:
            raise error
        self._failures += 1
        return Pause(pause)

    def read(self, sent: ServerSentEvent) -> Event | None:
        """Return an event of the stream. None: it is only a place."""
        self._failures = 0
        self.cursor = sent.id or self.cursor
        if not sent.data:
            return None
        return Event(sent.event, json.loads(sent.data), self.cursor)

    def read_page(self, page: dict[str, Any]) -> Iterator[Event]:
        """Yield the events of a page. The place moves on."""
        self.cursor = page["cursor"]
        if page["reset"]:
            yield Event("reset", {}, self.cursor)
        for event in page["data"]:
            yield Event(event["kind"], event, self.cursor)

    def broken(self) -> Pause:
        """Note that the connection broke. Return the pause before the next one."""
        self._failures += 1
        return Pause(0.0 if self._failures == 1 else retry_seconds(self._failures - 2))
