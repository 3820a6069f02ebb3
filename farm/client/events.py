"""Events of jobs, and a stream of them that begins again where it broke."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
from httpx_sse import ServerSentEvent

from farm.client.calls import Call, quoted
from farm.client.core import (
    LONGEST_PAUSE,
    Pause,
    Server,
    failure,
    retry_pause,
    retry_seconds,
)
from farm.domain.states import TERMINAL
from farm.errors import FarmError

ENDS = {f"job.{status}" for status in TERMINAL}
LASTING_SECONDS = 8.0
"""Time after which a connection has worked, though nothing happened. Seconds."""
SILENCE_SECONDS = 45.0
"""Time without a byte after which a stream is broken. The farm sends a line each 15 s."""


@dataclass(frozen=True)
class Event:
    """Something that happened, or the state at which a stream begins.

    Ignore kinds that you do not know: later versions of the farm have more.
    """

    kind: str
    """Such as `job.succeeded`; or `state`, `progress`, `preview` or `reset`: see docs/api.md."""
    data: Mapping[str, Any]
    """Fields of the event, such as `job` and `frames`. Of a `state`: the job; or, of all jobs, how
    many are open."""
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
    _failing_since: float = 0.0
    """Of failures in a row: when the first one came, on the monotonic clock."""
    _heard: bool = False
    """True if this connection brought something new."""
    _opened_at: float = math.inf
    """When this connection was opened, on the monotonic clock. It is not open: later than ever."""
    _retry_seconds: float = 0.0
    """Pause that the farm asks for, so that not all clients come back at once."""
    _last: str = ""
    """Kind of the last event."""

    @property
    def of_one_job(self) -> bool:
        """True if these are the events of a job, which end with it."""
        return self.path.startswith("/v1/jobs/")

    @classmethod
    def of_job(cls, job_id: str, after: str | None, *, previews: bool = False) -> Watching:
        """Watch one job until it ends."""
        params = {"previews": "true"} if previews else {}
        return cls(f"/v1/jobs/{quoted(job_id)}/events", params, cursor=after)

    def stream_call(self) -> Call[bytes]:
        """Return the call that opens the stream at its place."""
        headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
        if self.cursor:
            headers["Last-Event-ID"] = self.cursor
        return Call(bytes, "GET", self.path, self.params, headers=headers, seconds=SILENCE_SECONDS)

    def page_call(self) -> Call[dict[str, Any]] | None:
        """Return the call that reads what a silent stream may have held back.

        None: nobody knows from where on. A job's events are read from the beginning then.
        """
        if self.cursor is None and not self.of_one_job:
            return None
        params = {**self.params, "after": self.cursor, "limit": 200}
        return Call(dict[str, Any], "GET", self.path, params)

    def opened(self, server: Server, response: httpx.Response) -> Pause | None:
        """Note the answer to `stream_call`. Return a pause if it must be sent again.

        Raises:
            FarmError: the farm refused it, or has done so for the server's patience.
        """
        self._heard, self._opened_at = False, time.monotonic()
        if response.status_code == 204:
            self.ended = True
            return None
        if response.is_success:
            server.reached = True
            return None
        return self._failed(
            server, failure(server.address, response), retry_pause(response, self._failures)
        )

    def closed(self, server: Server, error: httpx.TransportError | None = None) -> Pause:
        """Note that the connection ended or broke. Return the pause before the next one.

        Raises:
            FarmError: no connection has brought anything for the server's patience.
        """
        lasted, self._opened_at = time.monotonic() - self._opened_at, math.inf
        if self._heard or lasted > LASTING_SECONDS:
            self._failures, self._heard = 0, False
            has_ended = self.of_one_job and self._last in ENDS
            return Pause(0.0 if has_ended else self._retry_seconds or retry_seconds(0))
        address = server.address
        cause = FarmError(f"The farm at {address.url} ends every stream of events at once.")
        if error is not None:
            cause = address.unreachable(error)
        return self._failed(server, cause, retry_seconds(self._failures))

    def _failed(self, server: Server, error: FarmError, pause: float | None) -> Pause:
        now = time.monotonic()
        if self._failures == 0:
            self._failing_since = now
        if pause is None or now + pause - self._failing_since > server.patience:
            raise error
        self._failures += 1
        return Pause(pause)

    def read(self, sent: ServerSentEvent) -> Event | None:
        """Return an event of the stream. None: it is only a place."""
        if sent.retry is not None:
            self._retry_seconds = min(sent.retry / 1000, LONGEST_PAUSE)
        if not sent.data:
            self.cursor = sent.id or self.cursor
            return None
        self._heard, self._last = self._heard or sent.event != "state", sent.event
        self.cursor = sent.id or self.cursor
        try:
            data = json.loads(sent.data)
        except ValueError:
            raise FarmError(f"An event of {self.path} is not JSON: {sent.data[:80]!r}.") from None
        return Event(sent.event, data, self.cursor)

    def read_page(self, page: dict[str, Any]) -> Iterator[Event]:
        """Yield the events of a page. Only the last one has the page's place: no event is lost."""
        before, self.cursor = self.cursor, page["cursor"]
        self._heard = self._heard or bool(page["data"])
        if page["reset"]:
            yield Event("reset", {}, self.cursor)
        for event in page["data"]:
            is_last = event is page["data"][-1]
            yield Event(event["kind"], event, self.cursor if is_last else before)
