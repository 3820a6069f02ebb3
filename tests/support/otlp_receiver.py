"""A receiver of traces: OTLP over HTTP, like a collector, decoded with OTLP's own classes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.support.waiting import wait_until


@dataclass(frozen=True)
class Received:
    """A span, with its IDs in hex."""

    trace: str
    id: str
    parent: str
    name: str
    started: int
    ended: int
    """Time of its end, in nanoseconds since 1970."""
    links: list[tuple[str, str]]
    attributes: dict[str, Any]
    service: str


@dataclass
class Receiver:
    """The receiver's address, and the spans that it received."""

    url: str
    spans: list[Received] = field(default_factory=list)
    paths: set[str] = field(default_factory=set)

    def await_spans(self, trace: str, number: int) -> list[Received]:
        """Wait until a trace has this many spans. Return them in the order of their beginnings."""

        def of_trace() -> list[Received]:
            return [span for span in list(self.spans) if span.trace == trace]

        wait_until(lambda: len(of_trace()) >= number, 20, f"{number} spans of {trace} are here")
        return sorted(of_trace(), key=lambda span: (span.started, span.ended))


@contextmanager
def receiving() -> Iterator[Receiver]:
    """Run a receiver on a free port of loopback."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            message = ExportTraceServiceRequest()
            message.ParseFromString(self.rfile.read(int(self.headers["Content-Length"])))
            receiver.paths.add(self.path)
            receiver.spans += _spans(message)
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            """Write no log."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        receiver = Receiver(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield receiver
        finally:
            server.shutdown()
            thread.join()


def _spans(message: ExportTraceServiceRequest) -> Iterator[Received]:
    for resource in message.resource_spans:
        about = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield _received(span, about["service.name"])


def _received(span: Span, service: str) -> Received:
    return Received(
        trace=span.trace_id.hex(),
        id=span.span_id.hex(),
        parent=span.parent_span_id.hex(),
        name=span.name,
        started=span.start_time_unix_nano,
        ended=span.end_time_unix_nano,
        links=[(link.trace_id.hex(), link.span_id.hex()) for link in span.links],
        attributes={
            pair.key: getattr(pair.value, str(pair.value.WhichOneof("value")))
            for pair in span.attributes
        },
        service=service,
    )
