"""OpenTelemetry: one trace a job, from its submission to the commit of each of its batches.

A trace's id is its job's, and the id of its root span follows from that: so every process adds to
the same trace, and nothing is stored for it. Imported only where an endpoint is set.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.environment_variables import OTEL_BSP_SCHEDULE_DELAY
from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from farm import __version__

log = logging.getLogger(__name__)

Attributes = Mapping[str, str | int]

SEND_MILLISECONDS = 1000.0
"""Between two sendings: what a killed process had not sent yet is missing."""
CLOSE_SECONDS = 2.0
"""That a process waits at its end for the last spans to be taken"""

FLAGS = trace.TraceFlags(trace.TraceFlags.SAMPLED | trace.TraceFlags.RANDOM_TRACE_ID)
"""A job's id is random where W3C's Trace Context Level 2 wants it: in its last 56 bits."""


class Traces:
    """Records spans; a thread of its own sends them, and drops them where nobody takes them."""

    def __init__(self, endpoint: str) -> None:
        """Begin to send to the OTLP/HTTP receiver at this base address."""
        self._ids = _Ids()
        self._provider = TracerProvider(
            sampler=ALWAYS_ON,
            # What OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say comes first.
            resource=Resource.create({SERVICE_NAME: "farm"}).merge(OTELResourceDetector().detect()),
            shutdown_on_exit=False,
            id_generator=self._ids,
        )
        exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces")
        delay = None if OTEL_BSP_SCHEDULE_DELAY in os.environ else SEND_MILLISECONDS
        sender = BatchSpanProcessor(exporter, schedule_delay_millis=delay)
        self._provider.add_span_processor(sender)
        self._tracer = self._provider.get_tracer("farm", __version__)

    def submitted(
        self, job_id: uuid.UUID, started: float, traceparent: str | None, attributes: Attributes
    ) -> None:
        """Record a job's root span, which ends now.

        Args:
            job_id: the job's.
            started: when its submission began, on the monotonic clock.
            traceparent: the client's own, as W3C's Trace Context has it; linked where it is valid.
            attributes: what the span bears.
        """
        with _harmless(), self._ids.of_root(job_id):
            offset = time.time() - time.monotonic()
            self._tracer.start_span(
                "job submitted",
                Context(),
                trace.SpanKind.SERVER,
                attributes,
                _links(traceparent),
                _nanoseconds(started + offset),
            ).end()

    def batch(
        self, jobs: Mapping[uuid.UUID, Attributes], stages: Mapping[str, tuple[float, float]]
    ) -> None:
        """Record a batch's stages, once in the trace of each job that has frames in it.

        Args:
            jobs: what the spans in each job's trace bear.
            stages: when each began and ended, on the monotonic clock.
        """
        with _harmless():
            offset = time.time() - time.monotonic()
            for job_id, attributes in jobs.items():
                root = trace.NonRecordingSpan(
                    trace.SpanContext(job_id.int, root_id(job_id), True, FLAGS)
                )
                parent = trace.set_span_in_context(root, Context())
                for name, (started, ended) in stages.items():
                    span = self._tracer.start_span(
                        name,
                        parent,
                        attributes=attributes,
                        start_time=_nanoseconds(started + offset),
                    )
                    span.end(_nanoseconds(ended + offset))

    def close(self) -> None:
        """Send what is left, for two seconds at most."""
        last = threading.Thread(target=self._provider.shutdown, name="traces-close", daemon=True)
        last.start()
        last.join(CLOSE_SECONDS)


def root_id(job_id: uuid.UUID) -> int:
    """Give the id of a job's root span: the first 64 bits of sha256 of the job's id."""
    return int.from_bytes(hashlib.sha256(job_id.bytes).digest()[:8])


class _Ids(RandomIdGenerator):
    """Random ids, but for the root span of a job."""

    def __init__(self) -> None:
        self._here = threading.local()

    @contextmanager
    def of_root(self, job_id: uuid.UUID) -> Iterator[None]:
        """Give a job's ids to the span that this thread starts meanwhile."""
        self._here.job_id = job_id
        try:
            yield
        finally:
            del self._here.job_id

    def generate_trace_id(self) -> int:
        """Called for a span without a parent: a job's root."""
        job_id: uuid.UUID = self._here.job_id
        return job_id.int

    def generate_span_id(self) -> int:
        """Give a root's id, or a random one."""
        job_id: uuid.UUID | None = getattr(self._here, "job_id", None)
        return super().generate_span_id() if job_id is None else root_id(job_id)


def _links(traceparent: str | None) -> list[trace.Link]:
    if traceparent is None:
        return []
    found = TraceContextTextMapPropagator().extract({"traceparent": traceparent}, Context())
    client = trace.get_current_span(found).get_span_context()
    return [trace.Link(client)] if client.is_valid else []


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)


@contextmanager
def _harmless() -> Iterator[None]:
    """Whatever goes wrong in here must not cost a frame."""
    try:
        yield
    except Exception:
        log.exception("Spans were not recorded")
