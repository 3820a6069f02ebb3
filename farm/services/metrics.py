"""Metrics of the farm as Prometheus text. Those of `render_metrics` name no tenant."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from farm.context import Farm
from farm.domain.spec import Priority
from farm.store import histograms, lanes, queries, tenants, webhooks, workers
from farm.store.engine import reads, transaction
from farm.store.lanes import LaneDepth
from farm.store.workers import WorkerSums

OUTCOMES = ("succeeded", "requeued", "dead", "dropped")
"""Outcomes of an attempt. Requeued: another attempt follows. Dropped: its lease was lost."""

STAGES = ("denoise", "encode", "put", "commit")
STATES = ("loading", "idle", "rendering", "failed")


def render_metrics(farm: Farm, *more: Metric) -> bytes:
    """Read the farm's metrics, and write them as Prometheus text with these further ones.

    Raises:
        Unavailable: Postgres does not answer.
    """
    return render(*_lane_metrics(farm), *more)


def render(*metrics: Metric) -> bytes:
    """Write metrics as Prometheus text."""
    registry = CollectorRegistry()
    registry.register(_Collected(metrics))
    return generate_latest(registry)


def tenant_metrics(farm: Farm) -> Iterator[Metric]:
    """Read the limits of tenants. They name tenants, so they are not for everybody.

    Raises:
        Unavailable: Postgres does not answer.
    """
    labels = ["tenant", "limit"]
    limit = GaugeMetricFamily("farm_tenant_limit", "A limit of a tenant", labels=labels)
    used = GaugeMetricFamily("farm_tenant_used", "What it has of farm_tenant_limit", labels=labels)
    with reads(farm.store) as connection:
        for row in tenants.limits_in_use(connection):
            limit.add_metric([row.tenant, row.name], row.value)
            used.add_metric([row.tenant, row.name], row.used)
    yield limit
    yield used


class _Collected(Collector):
    def __init__(self, metrics: Sequence[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        return iter(self._metrics)


def _lane_metrics(farm: Farm) -> Iterator[Metric]:
    """Read the lanes and the workers' sums in one transaction, and build the metrics from them."""
    with transaction(farm.store) as connection:
        depths = lanes.depths(connection)
        sums = {row.pipeline: row for row in workers.sums(connection)}
        states = {(row.pipeline, row.state): row.number for row in workers.states(connection)}
        database = queries.database_bytes(connection)
        lag = webhooks.lag(connection)
    pipelines = sorted({*farm.catalog.pipelines, *sums, *(row.pipeline for row in depths)})
    yield from _queues(pipelines, depths)
    yield _counter(sums, "farm_frames", "Attempts by outcome", "outcome", OUTCOMES)
    yield _counter(sums, "farm_stage_seconds", "Seconds spent on batches", "stage", STAGES)
    yield _counter(sums, "farm_work_seconds", "Seconds with something to render")
    yield _counter(sums, "farm_batches", "Batches rendered")
    yield _counter(sums, "farm_lease_expiries", "Leases that expired")
    yield from _histograms(sums)
    yield from _spools(sums)
    alive = GaugeMetricFamily("farm_workers", "Workers alive", labels=["pipeline", "state"])
    for pipeline in pipelines:
        for state in STATES:
            alive.add_metric([pipeline, state], states.get((pipeline, state), 0))
    yield alive
    yield GaugeMetricFamily(
        "farm_database_bytes", "Disk space of the farm's tables", value=database
    )
    yield GaugeMetricFamily(
        "farm_webhook_lag_seconds", "Time for which the couriers' oldest work has waited", value=lag
    )


def _queues(pipelines: list[str], depths: Sequence[LaneDepth]) -> Iterator[Metric]:
    """Build the metrics of what waits. A lane without waiting frames has zeros."""
    labels = ["pipeline", "priority"]
    frames = GaugeMetricFamily("farm_queue_frames", "Frames waiting for a worker", labels=labels)
    oldest = GaugeMetricFamily(
        "farm_oldest_waiting_seconds",
        "Age of the oldest job with frames that were never claimed",
        labels=labels,
    )
    rows = {(row.pipeline, row.priority): row for row in depths}
    for pipeline in pipelines:
        for priority in Priority:
            row = rows.get((pipeline, priority))
            frames.add_metric([pipeline, priority.wire], row.waiting if row else 0)
            oldest.add_metric([pipeline, priority.wire], row.oldest if row else 0)
    yield frames
    yield oldest


def _histograms(sums: dict[str, WorkerSums]) -> Iterator[Metric]:
    """Build the histograms of durations. They have no sums: farm_stage_seconds has them."""
    waits = HistogramMetricFamily(
        "farm_wait_seconds",
        "Time from a job's submission to the claim of its first frame",
        labels=["pipeline", "priority"],
    )
    denoising = HistogramMetricFamily(
        "farm_denoise_seconds", "Time that a batch is denoised", labels=["pipeline"]
    )
    for pipeline, row in sums.items():
        for priority in Priority:
            buckets = histograms.cumulative(row.wait_buckets, priority)
            waits.add_metric([pipeline, priority.wire], buckets, sum_value=None)
        denoising.add_metric([pipeline], histograms.cumulative(row.denoise_buckets), sum_value=None)
    yield waits
    yield denoising


def _spools(sums: dict[str, WorkerSums]) -> Iterator[Metric]:
    """Build the metrics of pictures that wait on workers' disks for the storage."""
    spooled = GaugeMetricFamily(
        "farm_spooled_bytes",
        "Pictures on the disk of the worker with most, not stored yet",
        labels=["pipeline"],
    )
    limit = GaugeMetricFamily(
        "farm_spool_limit_bytes", "Maximum of farm_spooled_bytes", labels=["pipeline"]
    )
    for pipeline, row in sums.items():
        spooled.add_metric([pipeline], float(row.spool_bytes))
        limit.add_metric([pipeline], float(row.spool_limit_bytes))
    yield spooled
    yield limit


COLUMNS = {
    **{outcome: outcome for outcome in OUTCOMES},
    **{stage: f"{stage}_seconds" for stage in STAGES},
    "farm_work_seconds": "work_seconds",
    "farm_batches": "batches",
    "farm_lease_expiries": "expired",
}
"""Column of store.workers.sums for each label value or metric."""


def _counter(
    sums: dict[str, WorkerSums], name: str, text: str, label: str = "", values: tuple[str, ...] = ()
) -> Metric:
    """Build a counter by pipeline and, if `label` is set, by the values of that label."""
    counter = CounterMetricFamily(name, text, labels=["pipeline", label] if label else ["pipeline"])
    for pipeline, row in sums.items():
        for value in values or (name,):
            labels = [pipeline, value] if label else [pipeline]
            counter.add_metric(labels, float(getattr(row, COLUMNS[value])))
    return counter
