"""OpenTelemetry: one trace per job, from its submission to the commit of each of its batches.

The id of a trace is the id of its job, and the id of its root span is computed from that. So every
process adds to the same trace, and nothing is stored for it. Imported only if an endpoint is set.
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
"""Interval between two sends, in milliseconds. A killed process loses its unsent spans."""
CLOSE_SECONDS = 2.0
"""Maximum time that a process waits at its end for the last spans to be sent, in seconds."""

FLAGS = trace.TraceFlags(trace.TraceFlags.SAMPLED | trace.TraceFlags.RANDOM_TRACE_ID)
"""Trace flags. A job's id is random in its last 56 bits, as W3C Trace Context Level 2 requires."""


class Traces:
    """Records spans. A separate thread sends them, and drops them if no receiver accepts them."""

    def __init__(self, endpoint: str) -> None:
        """Start sending to the OTLP/HTTP receiver at this base address."""
        self._ids = _Ids()
        self._provider = TracerProvider(
            sampler=ALWAYS_ON,
            # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES take precedence.
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
            job_id: the job's ID.
            started: start of its submission, on the monotonic clock.
            traceparent: the client's header, as defined by W3C Trace Context; linked if valid.
            attributes: the attributes of the span.
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
        """Record the stages of a batch, once in the trace of each job with frames in it.

        Args:
            jobs: for each job, the attributes of the spans in its trace.
            stages: start and end of each stage, on the monotonic clock.
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
        """Send the remaining spans, for two seconds at most."""
        last = threading.Thread(target=self._provider.shutdown, name="traces-close", daemon=True)
        last.start()
        last.join(CLOSE_SECONDS)


def root_id(job_id: uuid.UUID) -> int:
    """Compute the ID of a job's root span: the first 64 bits of the sha256 of the job's ID."""
    return int.from_bytes(hashlib.sha256(job_id.bytes).digest()[:8])


class _Ids(RandomIdGenerator):
    """Random IDs, except for the root span of a job."""

    def __init__(self) -> None:
        self._here = threading.local()

    @contextmanager
    def of_root(self, job_id: uuid.UUID) -> Iterator[None]:
        """Use a job's IDs for the span that this thread starts inside the block."""
        self._here.job_id = job_id
        try:
            yield
        finally:
            del self._here.job_id

    def generate_trace_id(self) -> int:
        """Return the job's ID. Called for a span without a parent, which is a job's root."""
        job_id: uuid.UUID = self._here.job_id
        return job_id.int

    def generate_span_id(self) -> int:
        """Return the ID of a root span, or a random one."""
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
    """Log any error in the block: tracing must never make a frame fail."""
    try:
        yield
    except Exception:
        log.exception("Spans were not recorded")
