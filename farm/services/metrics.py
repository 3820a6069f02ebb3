"""Metrics of the whole farm as Prometheus text, by pipeline. They name no tenant and no prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from farm.context import Farm
from farm.domain.spec import Priority
from farm.store import lanes, queries, workers
from farm.store.engine import transaction

OUTCOMES = ("succeeded", "requeued", "dead", "dropped")
"""Outcomes of an attempt. Requeued: another attempt follows. Dropped: its lease was lost."""

STAGES = ("denoise", "encode", "put", "commit")


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
        database = queries.database_bytes(connection)
    pipelines = sorted({*farm.catalog.pipelines, *sums, *(row.pipeline for row in depths)})
    yield _queue(pipelines, {(row.pipeline, row.priority): row.waiting for row in depths})
    yield _counter(sums, "farm_frames", "Attempts by outcome", "outcome", OUTCOMES)
    yield _counter(sums, "farm_stage_seconds", "Seconds spent on batches", "stage", STAGES)
    yield _counter(sums, "farm_work_seconds", "Seconds with something to render")
    yield _counter(sums, "farm_batches", "Batches rendered")
    yield _counter(sums, "farm_lease_expiries", "Leases that expired")
    alive = GaugeMetricFamily("farm_workers_alive", "Workers alive", labels=["pipeline"])
    for pipeline in pipelines:
        alive.add_metric([pipeline], sums[pipeline].alive if pipeline in sums else 0)
    yield alive
    yield GaugeMetricFamily(
        "farm_database_bytes", "Disk space of the farm's tables", value=database
    )


def _queue(pipelines: list[str], waiting: dict[tuple[str, int], int]) -> Metric:
    queue = GaugeMetricFamily(
        "farm_queue_frames", "Frames waiting for a worker", labels=["pipeline", "priority"]
    )
    for pipeline in pipelines:
        for priority in Priority:
            queue.add_metric([pipeline, priority.wire], waiting.get((pipeline, priority), 0))
    return queue


COLUMNS = {
    **{outcome: outcome for outcome in OUTCOMES},
    **{stage: f"{stage}_seconds" for stage in STAGES},
    "farm_work_seconds": "work_seconds",
    "farm_batches": "batches",
    "farm_lease_expiries": "expired",
}
"""Column of store.workers.sums for each label value or metric."""


def _counter(
    sums: dict[str, Any], name: str, text: str, label: str = "", values: tuple[str, ...] = ()
) -> Metric:
    """Build a counter by pipeline and, if `label` is set, by the values of that label."""
    counter = CounterMetricFamily(name, text, labels=["pipeline", label] if label else ["pipeline"])
    for pipeline, row in sums.items():
        for value in values or (name,):
            labels = [pipeline, value] if label else [pipeline]
            counter.add_metric(labels, float(getattr(row, COLUMNS[value])))
    return counter
