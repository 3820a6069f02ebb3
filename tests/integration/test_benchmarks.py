"""A short version of every row of `make bench`: it runs, loses nothing and returns figures.

Speed depends on the machine and is not judged here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from tests.benchmarks import (
    arrivals,
    bulk,
    claims,
    cuda,
    encoding,
    latency,
    listeners,
    pictures,
    product,
    report,
    submission,
    throughput,
)
from tests.benchmarks.figures import Row
from tests.benchmarks.stand import DEVICE, BenchServers, running_stand

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BenchServers]:
    with running_stand(tmp_path_factory.mktemp("bench")) as running:
        yield running


def check(rows: list[Row]) -> None:
    for row in rows:
        assert row.problems == []
        assert row.ratios
        for values in [series.values for series in row.series]:
            assert values
            assert all(math.isfinite(value) and value > 0 for value in values)
        assert all(math.isfinite(value) for ratio in row.ratios for value in ratio.values)
        assert report.section(row).startswith(f"### {row.letter}: ")


def ratio(row: Row, start: str) -> float:
    return next(found.median for found in row.ratios if found.what.startswith(start))


@pytest.mark.timeout(600)  # it loads torch many times, perhaps on a busy machine
def test_real_pictures_and_a_simulated_device(stand: BenchServers) -> None:
    check(pictures.rows(stand, short=True))


@pytest.mark.timeout(600)
def test_a_device(stand: BenchServers) -> None:
    """A tiny model, on the CPU if there is no other device."""
    check(cuda.rows("h", "sd15", stand, short=True))


def test_null_renders_beside_another_queue(stand: BenchServers) -> None:
    rows = throughput.rows(stand, short=True)
    check(rows)
    assert ratio(rows[0], "farm ÷ celery") > 1


def test_submitting(stand: BenchServers) -> None:
    check(submission.rows(stand, short=True))


@pytest.mark.timeout(600)
def test_one_image_jobs_of_a_product_backend(stand: BenchServers) -> None:
    check(product.rows(stand, short=True))


def test_requests_at_random_times(stand: BenchServers) -> None:
    [row] = arrivals.rows(stand, short=True)
    check([row])
    assert ratio(row, "requests ÷ requests in buckets of 1") > 1


def test_the_simulated_device_of_the_requests_is_never_faster_than_its_ladder() -> None:
    """Two requests of one setting share a batch only if both wait when the device is free."""
    together = [arrivals.Request(0.0, 1), arrivals.Request(0.0, 1)]
    assert arrivals.simulated(together) == [DEVICE[2]] * 2
    apart = [arrivals.Request(0.0, 1), arrivals.Request(0.1, 1)]
    assert arrivals.simulated(apart) == pytest.approx([DEVICE[1], 2 * DEVICE[1] - 0.1])
    mixed = [arrivals.Request(0.0, 1), arrivals.Request(0.0, 2)]
    assert arrivals.simulated(mixed) == pytest.approx([DEVICE[1], 2 * DEVICE[1]])


def test_a_file_of_prompts_to_the_end(stand: BenchServers) -> None:
    check(bulk.rows(stand, short=True))


def test_interactive_pictures_beside_bulk(stand: BenchServers) -> None:
    [row] = latency.rows(stand, short=True)
    check([row])
    assert ratio(row, "p95 with preemption ÷ idle") < ratio(row, "p95 without preemption ÷ idle")


def test_claims_with_a_history(stand: BenchServers) -> None:
    rows = claims.rows(stand, short=True)
    check(rows)
    assert ratio(rows[0], "old ÷ fresh") > 0.2


def test_encoding_and_storing(stand: BenchServers) -> None:
    check(encoding.rows(stand, short=True))


def test_streams_and_waiting_calls(stand: BenchServers) -> None:
    check(listeners.rows(stand, short=True))
