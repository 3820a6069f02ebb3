"""History of lanes: samples, what they are rolled up to, and the points of charts."""

from __future__ import annotations

import os
import uuid
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

import pytest

from api.dashboard import charts
from farm.context import Farm
from farm.errors import InvalidRequest
from farm.services.history import RANGES, LaneHistory, Span, read_history, span_of
from farm.store import histograms, history
from farm.store.engine import transaction
from farm.store.workers import Account, account, archive, leave
from tests.integration.test_api_refusals import check_problem
from tests.support.api_server import Api, serving
from tests.support.store import FakeWorker, register_worker, sql, submit
from workers.janitor.janitor import Janitor

START = datetime(2026, 11, 1, 12, 0, tzinfo=UTC)
NAMES = ("step", "pipeline", "at", "read_at", "waiting", *history.GAUGES, *history.SUMS)


@pytest.fixture
def api(farm: Farm) -> Iterator[Api]:
    with serving(farm) as running:
        yield running


def take_sample(farm: Farm) -> None:
    with transaction(farm.store) as connection:
        history.sample(connection)


def store_sample(farm: Farm, at: datetime, step: int = 60, **values: Any) -> None:
    """Store a sample of the lane `demo` by hand."""
    base: dict[str, Any] = dict.fromkeys(NAMES, 0)
    base |= {
        "step": step,
        "pipeline": "demo",
        "at": at,
        "read_at": at,
        "waiting": [0, 0, 0],
        "wait_buckets": [],
    }
    fields = {**base, **values}
    places = ", ".join(f":{name}" for name in NAMES)
    sql(farm, f"INSERT INTO samples ({', '.join(NAMES)}) VALUES ({places})", **fields)


@cache
def minute_of(_test: str) -> datetime:
    """Return the minute in which a test began: another one may begin while it runs."""
    return datetime.now(UTC).replace(second=0, microsecond=0)


def recently(minutes: float) -> datetime:
    """Return a whole minute before the test began."""
    return minute_of(os.environ["PYTEST_CURRENT_TEST"]) - timedelta(minutes=minutes)


def read_demo(farm: Farm, word: str = "15m", points: int = 15) -> LaneHistory:
    [lane] = read_history(farm, ["demo"], span_of(word, points=points))
    return lane


def add(farm: Farm, worker: FakeWorker, **sums: Any) -> None:
    with transaction(farm.store) as connection:
        account(connection, worker.id, Account(**sums))


# Samples


def test_a_sample_has_what_waits_and_what_was_done(farm: Farm, tenant: uuid.UUID) -> None:
    submit(farm, tenant, images_per_prompt=6, bucket=2, seed=1)
    submit(farm, tenant, images_per_prompt=3, bucket=2, seed=1, priority="bulk")
    worker = register_worker(farm)
    worker.fail(worker.must_claim())  # two wait again
    sql(farm, "UPDATE workers SET state = 'rendering'")
    add(farm, worker, succeeded=5, denoise_seconds=2.0, work_seconds=3.0)
    take_sample(farm)
    [row] = sql(farm, "SELECT * FROM samples WHERE step = 60")
    assert (row.step, row.pipeline, row.waiting) == (60, "demo", [0, 6, 3])
    assert (row.workers, row.rendering, row.able, row.failed) == (1, 1, 1, 0)
    assert (row.succeeded, row.denoise_seconds, row.work_seconds) == (5, 2.0, 3.0)
    assert row.at == row.at.replace(second=0, microsecond=0)


def test_a_minute_has_one_sample(farm: Farm) -> None:
    register_worker(farm)
    before = datetime.now(UTC).minute
    for _ in range(3):
        take_sample(farm)
    if datetime.now(UTC).minute == before:
        assert sql(farm, "SELECT count(*) FROM samples WHERE step = 60") == [(1,)]


def test_sums_never_fall_when_workers_leave(farm: Farm) -> None:
    worker = register_worker(farm)
    add(farm, worker, succeeded=5)
    with transaction(farm.store) as connection:
        leave(connection, worker.id)
    sql(farm, "UPDATE workers SET seen_at = seen_at - interval '2 days'")
    with transaction(farm.store) as connection:
        archive(connection, 60)
    take_sample(farm)
    [row] = sql(farm, "SELECT succeeded, workers FROM samples WHERE step = 60")
    assert tuple(row) == (5, 0)


def test_the_leading_janitor_takes_samples(farm: Farm) -> None:
    register_worker(farm)
    janitor = Janitor(farm)
    with farm.store.connect() as connection:
        janitor.sweep(connection)
        assert sql(farm, "SELECT count(*) FROM samples WHERE step = 60") == [(1,)]
        sql(farm, "DELETE FROM samples")
        janitor.sweep(connection)  # too soon
    assert sql(farm, "SELECT count(*) FROM samples") == [(0,)]


def test_samples_are_rolled_up_to_means_and_last_sums(farm: Farm) -> None:
    hour = recently(0).replace(minute=0) - timedelta(hours=2)
    for minute in range(1, 61):
        store_sample(
            farm,
            hour + timedelta(minutes=minute),
            waiting=[0, minute, 0],
            workers=2,
            succeeded=10 * minute,
            wait_buckets=[minute] if minute % 2 else [minute, 1],
        )
    take_sample(farm)
    tens = sql(farm, "SELECT * FROM samples WHERE step = 600 ORDER BY at")
    assert [row.at for row in tens] == [hour + timedelta(minutes=10 * n) for n in range(1, 7)]
    assert tens[0].waiting == [0, 6, 0]  # the mean of 1 to 10 is 5.5
    assert [row.succeeded for row in tens] == [100, 200, 300, 400, 500, 600]
    assert (tens[0].workers, tens[0].wait_buckets) == (2, [10, 1])
    take_sample(farm)  # adds nothing
    [whole] = sql(farm, "SELECT * FROM samples WHERE step = 3600")
    assert (whole.at, whole.succeeded) == (hour + timedelta(hours=1), 600)
    assert sql(farm, "SELECT count(*) FROM samples WHERE step = 600") == [(6,)]


def test_old_samples_are_deleted_by_their_step(farm: Farm) -> None:
    now = recently(0)
    for step, days in history.STEPS.items():
        for age in (days - 0.1, days + 0.1):
            store_sample(farm, now - timedelta(days=age), step)
    take_sample(farm)
    left = sql(farm, "SELECT step, count(*) FROM samples GROUP BY step ORDER BY step")
    # A sample is rolled up before it is deleted.
    assert [tuple(row) for row in left] == [(60, 1), (600, 1 + 2), (3600, 1 + 2 + 2)]


# Points


def test_points_are_differences_of_sums(farm: Farm) -> None:
    waits = [0] * histograms.WIDTH
    for minute, succeeded in ((4, 100), (3, 160), (2, 160)):
        waits = [*waits]
        waits[3] += 10 if succeeded == 160 and minute == 3 else 0
        store_sample(
            farm,
            recently(minute),
            succeeded=succeeded,
            dead=4 - minute,
            workers=3,
            rendering=2,
            waiting=[1, 20, 300],
            denoise_seconds=succeeded * 0.5,
            encode_seconds=succeeded * 0.1,
            work_seconds=succeeded * 0.6,
            wait_buckets=waits,
        )
    first, second = read_demo(farm).points
    assert (first.at, second.at) == (recently(3), recently(2))
    assert first.frames_per_second == pytest.approx(1.0)
    assert first.waiting == {"interactive": 1, "normal": 20, "bulk": 300}
    assert (first.workers, first.rendering, first.failed_attempts) == (3, 2, 1)
    assert first.busy == pytest.approx(0.5 / 0.6)
    assert first.stages == {
        "denoise": pytest.approx(0.5),
        "encode": pytest.approx(0.1),
        "put": 0,
        "commit": 0,
    }
    assert first.wait_p50 == pytest.approx(1.5)
    assert first.wait_p95 == pytest.approx(1.95)
    assert (second.frames_per_second, second.busy, second.stages) == (0, None, None)
    assert (second.wait_p50, second.wait_p95) == (None, None)


def test_a_span_that_is_not_over_yet_has_the_right_speed(farm: Farm) -> None:
    """Its time is that of its samples, and not of the whole span."""
    for minute in range(40):
        store_sample(farm, recently(minute), succeeded=60 * (100 - minute))
    speeds = [point.frames_per_second for point in read_demo(farm, "1h", points=6).points]
    assert speeds
    assert speeds == [pytest.approx(1.0)] * len(speeds)


def test_a_gap_has_no_points_and_a_new_farm_no_negative_ones(farm: Farm) -> None:
    for minute, succeeded in ((10, 100), (9, 160), (5, 900), (4, 7), (3, 67)):
        store_sample(farm, recently(minute), succeeded=succeeded)
    found = read_demo(farm).points
    assert [point.at for point in found] == [recently(9), recently(3)]
    assert [point.frames_per_second for point in found] == [pytest.approx(1.0)] * 2


def test_a_long_time_is_read_from_coarse_samples(farm: Farm) -> None:
    now = datetime.now(UTC)
    for word, step in (("15m", 60), ("24h", 60), ("7d", 600), ("30d", 600), ("400d", 3600)):
        span = span_of(word, points=96)
        assert (span.step, span.seconds % step) == (step, 0), word
        assert (span.until - span.since).total_seconds() / span.seconds <= 96.01
    yesterday = span_of(since=now - timedelta(days=20), until=now - timedelta(days=20, hours=-1))
    assert yesterday.step == 600
    for wrong in ({"word": "1y"}, {"since": now + timedelta(hours=1)}):
        with pytest.raises(InvalidRequest):
            span_of(**wrong)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95, 1.0])
def test_a_quantile_is_within_its_bucket(share: float) -> None:
    """Compared with the durations themselves."""
    durations = [0.01 * 1.07**number for number in range(160)]
    counts = Counter(histograms.place(each) for each in durations)
    array = [counts[index] for index in range(histograms.WIDTH)]
    found = histograms.quantile(array, share)
    truth = durations[max(0, round(share * len(durations)) - 1)]
    assert found is not None
    assert found == pytest.approx(truth, rel=0.5, abs=0.26) or truth > histograms.BOUNDS[-1]
    assert histograms.quantile([0] * 5, share) is None


def test_the_api_gives_points_to_those_who_see_every_tenant(api: Api) -> None:
    store_sample(api.farm, recently(3), succeeded=10)
    store_sample(api.farm, recently(2), succeeded=70)
    viewer = api.client("ops", "viewer", everywhere=True)
    asked = {"range": "15m", "points": "15"}
    found = viewer.get("/v1/history", params=asked).json()
    [demo] = [lane for lane in found["lanes"] if lane["pipeline"] == "demo"]
    assert found["seconds"] == 60
    assert [point["frames_per_second"] for point in demo["points"]] == [pytest.approx(1.0)]
    one = viewer.get("/v1/history", params={**asked, "pipeline": "demo"}).json()
    assert one["lanes"] == [demo]
    times = {"from": recently(5).isoformat(), "to": recently(2.5).isoformat()}
    assert viewer.get("/v1/history", params={**times, "pipeline": "demo"}).json()["lanes"] == [
        {"pipeline": "demo", "points": []}
    ]
    check_problem(api.client().get("/v1/history"), 403)
    first = "0001-01-01T00:00:00Z"
    assert viewer.get("/v1/history", params={"from": first}).status_code == 200
    check_problem(viewer.get("/v1/history", params={"to": first}), 422)
    for name in ("from", "to"):  # in UTC it is before the year 1
        problem = check_problem(
            viewer.get("/v1/history", params={name: first[:-1] + "+14:00"}), 422
        )
        assert problem["error"]["param"] == name
    for name, value in {"range": "1y", "from": "today", "points": "1"}.items():
        problem = check_problem(viewer.get("/v1/history", params={name: value}), 422)
        assert problem["error"]["param"] == name


# Charts


def test_a_line_breaks_where_nothing_was_recorded(farm: Farm) -> None:
    for minute, succeeded in ((12, 0), (11, 60), (10, 120), (5, 500), (4, 560)):
        store_sample(farm, recently(minute), succeeded=succeeded)
    span = span_of("15m", points=15)
    drawn = charts.lane_charts(read_demo(farm).points, span)
    assert {chart.title for chart in drawn} >= {"Frames a minute", "Busy devices", "Workers"}
    [line] = drawn[0].lines
    assert (line.path.count("M"), line.path.count("L")) == (2, 1)
    assert line.last == "60 frames/min"
    assert [values for _, values in drawn[0].rows] == [["60 frames/min"]] * 3
    assert drawn[2].is_empty
    assert all("nan" not in each.path.lower() for chart in drawn for each in chart.lines)


@pytest.mark.parametrize(
    ("number", "top"), [(0, 0), (0.3, 0.5), (1, 1), (1.01, 2), (73, 100), (1200, 2000)]
)
def test_the_upper_edge_is_a_round_number(number: float, top: float) -> None:
    assert charts.nice(number) == pytest.approx(top)


def test_a_chart_of_nothing_is_empty() -> None:
    span = Span(START, START + timedelta(hours=1), 60, 60)
    assert all(chart.is_empty and not chart.rows for chart in charts.lane_charts([], span))
    assert set(RANGES) >= {"15m", "24h", "30d"}
