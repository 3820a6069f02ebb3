"""The janitor's HTTP port: /healthz, and /metrics of the farm while this janitor leads.

One janitor leads at a time, so the farm's metrics are exported once, however many processes run.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from farm.context import Farm
from farm.errors import FarmError, Unavailable
from farm.process import version
from farm.services.metrics import render, render_metrics, tenant_metrics
from workers.janitor.janitor import JanitorStatus

log = logging.getLogger(__name__)

MAX_TURN_SECONDS = 60.0
"""Time without a turn of the janitor's loop after which /healthz answers 503, in seconds."""
REQUEST_SECONDS = 10.0
"""Time that a client has to send its request, in seconds."""

Answer = tuple[HTTPStatus, str, bytes]


@contextmanager
def health_port(
    farm: Farm, status: JanitorStatus, host: str, port: int | None
) -> Iterator[int | None]:
    """Listen in separate threads during the block. Yield the port; None if `port` is None.

    Raises:
        FarmError: the port cannot be used.
    """
    if port is None:
        yield None
        return

    class Handler(_Handler):
        def answer(self) -> Answer:
            return _answer(farm, status, self.path.partition("?")[0])

    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise FarmError(f"--port: {host}:{port} cannot be used: {error.strerror}.") from error
    thread = threading.Thread(target=server.serve_forever, name="health-port", daemon=True)
    thread.start()
    log.info("Health and metrics: http://%s:%d", host, server.server_port)
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    timeout = REQUEST_SECONDS

    def answer(self) -> Answer:
        raise NotImplementedError

    def do_GET(self) -> None:
        status, content_type, content = self.answer()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_HEAD = do_GET  # noqa: N815 - http.server's name

    def log_message(self, format: str, *args: object) -> None:
        log.debug(format, *args)


def _answer(farm: Farm, status: JanitorStatus, path: str) -> Answer:
    if path == "/healthz":
        return _health(status)
    if path == "/metrics":
        return _metrics(farm, status)
    return _text(HTTPStatus.NOT_FOUND, "This port has /healthz and /metrics.")


def _health(status: JanitorStatus) -> Answer:
    """Judge the loop alone: an outage of a server is no reason to restart the janitor."""
    seconds = time.monotonic() - status.turned_at
    if seconds > MAX_TURN_SECONDS:
        problem = f"The janitor's loop has not turned for {seconds:.0f} s."
        return _text(HTTPStatus.SERVICE_UNAVAILABLE, problem)
    return _text(HTTPStatus.OK, "ok")


def _metrics(farm: Farm, status: JanitorStatus) -> Answer:
    try:
        content = _of_the_farm(farm, status) if status.leading else render(*_own(status))
    except Unavailable as error:
        return _text(HTTPStatus.SERVICE_UNAVAILABLE, error.message)
    return HTTPStatus.OK, CONTENT_TYPE_PLAIN_0_0_4, content


def _of_the_farm(farm: Farm, status: JanitorStatus) -> bytes:
    up = float(farm.artifacts.answers())  # a silent storage is given up after 2 s
    storage = GaugeMetricFamily("farm_storage_up", "1 if the storage answers", value=up)
    return render_metrics(farm, *_own(status), storage, *tenant_metrics(farm))


def _own(status: JanitorStatus) -> Iterator[Metric]:
    build = GaugeMetricFamily("farm_build_info", "The version of the farm", labels=["version"])
    build.add_metric([version()], 1)
    yield build
    yield GaugeMetricFamily(
        "farm_janitor_leading", "1 if this janitor is the leader", value=float(status.leading)
    )
    if status.swept_at is not None:
        yield GaugeMetricFamily(
            "farm_janitor_swept_timestamp_seconds",
            "End of this janitor's last sweep, as a Unix time",
            value=status.swept_at,
        )


def _text(status: HTTPStatus, text: str) -> Answer:
    return status, "text/plain; charset=utf-8", f"{text}\n".encode()
