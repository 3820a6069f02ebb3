"""A receiver of webhooks on loopback, with answers that a test decides."""

from __future__ import annotations

import base64
import hmac
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pydantic_core import from_json

CUT = 0
"""Instead of a status: the connection is closed without an answer."""


@dataclass(frozen=True)
class Request:
    """A request that came."""

    path: str
    headers: dict[str, str]
    body: bytes
    at: float

    @property
    def message(self) -> dict[str, Any]:
        found: dict[str, Any] = from_json(self.body)
        return found

    @property
    def kind(self) -> str:
        return str(self.message["type"])

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    def is_signed_by(self, secret: str, at: float | None = None) -> bool:
        """Check the signature as standardwebhooks.com describes it, now or at a time."""
        key = base64.b64decode(secret.removeprefix("whsec_"))
        seconds = self.headers["webhook-timestamp"]
        if abs((at or time.time()) - int(seconds)) > 300:
            return False
        content = f"{self.id}.{seconds}.".encode() + self.body
        expected = base64.b64encode(hmac.new(key, content, "sha256").digest()).decode()
        return f"v1,{expected}" in self.headers["webhook-signature"].split(" ")


@dataclass
class Receiver:
    """A server that notes its requests, and answers as `answer` decides."""

    url: str
    requests: list[Request] = field(default_factory=list)
    incomplete: int = 0
    """Requests whose bodies ended too early."""
    answer: Callable[[Request], int] = lambda _: 200
    headers: dict[str, str] = field(default_factory=dict)
    """Headers of each answer."""
    body: bytes = b"ok"

    def kinds(self) -> list[str]:
        return [each.kind for each in self.requests]


@contextmanager
def receiving() -> Iterator[Receiver]:
    """Run a receiver on a free port of loopback."""
    made: list[Receiver] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # the name that the base class calls
            receiver = made[0]
            announced = int(self.headers["content-length"])
            body = self.rfile.read(announced)
            if len(body) < announced:  # the sender was killed while it sent: this is no request
                self.close_connection = True
                receiver.incomplete += 1
                return
            sent = {name.lower(): value for name, value in self.headers.items()}
            request = Request(self.path, sent, body, time.time())
            receiver.requests.append(request)
            status = receiver.answer(request)
            if status == CUT:
                self.close_connection = True
                return
            with suppress(BrokenPipeError, ConnectionResetError):  # the sender waits no longer
                self._reply(status)

        def _reply(self, status: int) -> None:
            receiver = made[0]
            self.send_response(status)
            size = {"content-length": str(len(receiver.body))}
            for name, value in {**size, **receiver.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(receiver.body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    made.append(Receiver(f"http://127.0.0.1:{server.server_port}/hook"))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield made[0]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
