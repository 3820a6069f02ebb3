"""farm.client: what is sent again, when, and what never goes to another server."""

from __future__ import annotations

import pickle
import socket
import time
from collections.abc import Iterator
from datetime import date
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from farm.client import Farm, calls, core
from farm.client.events import Watching
from farm.errors import (
    FarmError,
    InvalidRequest,
    LimitExceeded,
    TooSlow,
    Unauthenticated,
    Unavailable,
)
from tests.unit.test_cli_client import JOB, Script, problem, serving_script

AWAY = problem(503, "unavailable", "Postgres does not answer.")
MANY = problem(429, "limit_exceeded", "requests_a_second: try again after 0.1 s.")


@pytest.fixture
def script() -> Iterator[Script]:
    with serving_script() as running:
        yield running


@pytest.fixture
def farm(script: Script, monkeypatch: pytest.MonkeyPatch) -> Iterator[Farm]:
    monkeypatch.setattr(core, "FIRST_PAUSE", 0.01)
    with Farm(script.url, "farm_key", patience_seconds=2.0) as client:
        yield client


def sent(script: Script) -> int:
    return len(script.asked)


@pytest.mark.parametrize("status", [408, 429, 502, 503, 504])
def test_what_may_pass_is_sent_again(farm: Farm, script: Script, status: int) -> None:
    script.tell(status, b"<html>proxy</html>", Retry_After="0.01")
    script.tell(200, {"id": JOB})
    assert farm.job(JOB).id == JOB
    assert sent(script) == 2


def test_the_farm_decides(farm: Farm, script: Script) -> None:
    script.tell(503, AWAY, x_should_retry="false")
    with pytest.raises(Unavailable):
        farm.job(JOB)
    assert sent(script) == 1
    script.answers.clear()
    script.tell(408, problem(408, "body_too_slow", "Slow."), x_should_retry="true")
    script.tell(200, {"id": JOB})
    assert farm.job(JOB).id == JOB
    script.answers.clear()
    script.tell(408, problem(408, "body_too_slow", "Slow."), x_should_retry="false")
    with pytest.raises(TooSlow):
        farm.job(JOB)


def test_a_limit_with_a_time_is_waited_for_and_another_is_told(
    farm: Farm,
    script: Script,
) -> None:
    script.tell(429, MANY, x_should_retry="true", Retry_After="0.3")
    script.tell(202, {"id": JOB})
    began = time.monotonic()
    assert farm.submit("demo", "a").id == JOB
    assert time.monotonic() - began >= 0.3
    keys = {headers["Idempotency-Key"] for _, _, headers, _ in script.asked}
    assert len(keys) == 1
    for headers in ({}, {"Retry_After": "3600"}):
        script.answers.clear()
        script.asked.clear()
        script.tell(429, MANY, x_should_retry="true", **headers)
        with pytest.raises(LimitExceeded) as caught:
            farm.submit("demo", "a", idempotency_key="order-7")
        assert caught.value.idempotency_key == "order-7"
        assert sent(script) == 1


def test_a_wait_goes_on_with_a_farm_that_does_not_know_it(
    farm: Farm,
    script: Script,
) -> None:
    counts = {"succeeded": 1, "dead": 0, "cancelled": 0}
    running = {"id": JOB, "status": "running", "counts": counts, "waiting_because": None}
    script.tell(200, running)
    script.tell(200, running, Preference_Applied="wait=30")
    script.tell(200, {**running, "status": "succeeded"})
    done = farm.run(core.waited(farm.server, JOB, None))
    assert done["status"] == "succeeded"
    assert [headers["Prefer"] for _, _, headers, _ in script.asked] == ["wait=30"] * 3


def test_a_wait_may_meet_a_status_of_a_later_version(
    farm: Farm,
    script: Script,
) -> None:
    script.tell(200, {"id": JOB, "status": "dreaming", "counts": {}, "waiting_because": "A dream."})
    with pytest.raises(core.WaitTimeout, match=r"is dreaming after 0 s and goes on\. A dream\."):
        farm.run(core.waited(farm.server, JOB, 0))


def test_the_key_goes_to_the_farm_alone(farm: Farm, script: Script) -> None:
    with serving_script() as other:
        other.tell(200, b"image")
        assert farm.call(calls.content(f"{other.url}/p/a.png")) == b"image"
        script.tell(307, b"", Location=f"{other.url}/bucket/a.png")
        assert farm.call(calls.content("/v1/jobs/x/frames/0/image")) == b"image"
    assert [("Authorization" in headers) for _, _, headers, _ in other.asked] == [False, False]
    assert script.asked[0][2]["Authorization"] == "Bearer farm_key"


def test_a_long_call_is_sent_again_too(
    farm: Farm, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The patience counts from the first failure: a wait of 30 s may end with one."""
    now = 1000.0
    monkeypatch.setattr(core, "time", SimpleNamespace(monotonic=lambda: now))
    slow = core.answered(farm.server, calls.job(JOB, 30))
    assert isinstance(next(slow), core.Send)
    now += 31.0
    assert isinstance(
        slow.send(httpx.ReadTimeout("", request=httpx.Request("GET", script.url))), core.Pause
    )


def test_a_submission_is_not_redirected(farm: Farm, script: Script) -> None:
    script.tell(301, b"", Location=f"{script.url}/v1/jobs")
    with pytest.raises(FarmError, match="answered 301"):
        farm.submit("demo", "a")
    assert [method for method, *_ in script.asked] == ["POST"]


def test_the_key_is_not_sent_in_clear_text() -> None:
    with Farm("https://farm.example", "k") as farm:
        for address, goes in (
            ("/p/x.png", True),
            ("https://farm.example/p/x.png", True),
            ("http://farm.example/p/x.png", False),
            ("https://other.example/p/x.png", False),
        ):
            headers = farm.server.arguments(calls.content(address))["headers"]
            assert ("Authorization" in headers) == goes, address


def test_every_job_of_a_batch_has_a_key() -> None:
    body: dict[str, object] = {"pipeline": "demo", "prompts": ["a"]}
    given = [body, {**body, "idempotency_key": None}, {**body, "idempotency_key": "order-7"}]
    sent = calls.submit_batch(given).json
    assert sent is not None
    keys = [each["idempotency_key"] for each in sent["jobs"]]  # type: ignore[attr-defined]
    assert [len(key) for key in keys] == [32, 32, 7]
    for wrong in ("", "Bestellung-ü", "a\nb"):
        with pytest.raises(InvalidRequest, match="Idempotency-Key"):
            calls.submit(body, wrong)


def test_batches_are_what_the_api_takes() -> None:
    plain, grid = {"prompts": ["a"]}, {"prompts": ["a"], "grid": {}}
    found = list(core.batches([plain, plain, plain, grid, plain], most=2))
    assert found == [[plain, plain], [plain], [grid], [plain]]
    large = {"prompts": ["x" * 2**21]}
    assert [len(batch) for batch in core.batches([large] * 3)] == [1, 1, 1]


def test_a_limit_that_one_job_meets_stops_no_other(farm: Farm, script: Script) -> None:
    script.tell(429, MANY, x_should_retry="false")
    script.tell(202, {"id": JOB})
    job = {"pipeline": "demo", "prompts": ["a"], "grid": {"steps": [1]}}
    refused, accepted = farm.submit_many([job, job])
    assert isinstance(refused, LimitExceeded)
    assert not isinstance(accepted, FarmError)
    script.answers.clear()
    script.tell(401, problem(401, "unauthenticated", "This API key is unknown."))
    with pytest.raises(Unauthenticated):
        list(farm.submit_many([job, job]))


@pytest.mark.parametrize("value", [date(2026, 1, 1), float("nan"), {1, 2}])
def test_what_cannot_be_sent_is_an_error_of_the_farm(farm: Farm, value: object) -> None:
    with pytest.raises(InvalidRequest, match="cannot be sent"):
        farm.submit("demo", "a", seed=value)


def test_errors_go_through_a_process_pool() -> None:
    counts = {"succeeded": 1, "dead": 1, "cancelled": 0}
    job: Any = {"id": "x", "status": "partial", "total": 2, "counts": counts}
    job["waiting_because"] = None
    for error in (core.JobFailed(job), core.WaitTimeout(job, 3.0)):
        again = pickle.loads(pickle.dumps(error))
        assert (str(again), again.job) == (str(error), job)


def test_pauses_double_and_are_spread() -> None:
    for tries, most in ((0, 0.25), (1, 0.5), (4, 4.0), (5, 8.0), (500, 8.0)):
        found = [core.retry_seconds(tries) for _ in range(200)]
        assert most / 2 <= min(found) < 0.6 * most
        assert 0.9 * most < max(found) <= most


def test_a_stream_that_is_refused_is_an_error(farm: Farm, script: Script) -> None:
    script.tell(404, problem(404, "not_found", "There is no job."))
    with pytest.raises(FarmError, match="There is no job"):
        next(farm.watch(Watching.of_job(JOB, None)))


def test_a_stream_is_opened_again_at_its_place(farm: Farm, script: Script) -> None:
    first = (
        b'id: 1.a\nevent: state\ndata: {"id": "x"}\n\nid: 1.b\nevent: job.x\ndata: {"id": 7}\n\n'
    )
    script.tell(503, AWAY, Retry_After="0.01")
    script.tell(200, first + b"id: 1.c\n\nid: 1.d\nevent: cut", Content_Type="text/event-stream")
    script.tell(
        200,
        b'id: 1.d\nevent: job.y\ndata: {"text": "\xe2\x80\xa8"}\n\n',
        Content_Type="text/event-stream",
    )
    script.tell(204, b"")
    found = list(farm.watch(Watching.of_job(JOB, None)))
    assert [(event.kind, event.cursor) for event in found] == [
        ("state", "1.a"),
        ("job.x", "1.b"),
        ("job.y", "1.d"),
    ]
    assert found[2].data == {"text": "\u2028"}
    assert [headers.get("Last-Event-ID") for _, _, headers, _ in script.asked] == [
        None,
        None,
        "1.c",
        "1.d",
    ]


def test_streams_that_end_at_once_are_told_after_the_patience(farm: Farm, script: Script) -> None:
    farm.server.patience_seconds = 0.5
    begin = b'retry: 1\n\nid: 1.a\nevent: state\ndata: {"id": "x"}\n\n'
    script.tell(200, begin, Content_Type="text/event-stream")
    with pytest.raises(FarmError, match="ends every stream of events at once"):
        list(farm.watch(Watching.of_job(JOB, None)))
    assert 2 <= sent(script) < 60, "with pauses"
    script.answers.clear()
    script.tell(200, b"<html>log in</html>", Content_Type="text/html")
    with pytest.raises(FarmError, match="sends no events"):
        list(farm.watch(Watching.of_job(JOB, None)))
    script.answers.clear()
    script.tell(200, b"event: x\ndata: {\n\n", Content_Type="text/event-stream")
    with pytest.raises(FarmError, match="is not JSON"):
        list(farm.watch(Watching.of_job(JOB, None)))


def test_a_stream_of_a_farm_that_is_away_ends_after_the_patience(farm: Farm) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with (
        Farm(f"http://127.0.0.1:{port}", "k", patience_seconds=0.3) as away,
        pytest.raises(Unavailable, match="does not answer"),
    ):
        next(away.events())


def test_only_the_last_event_of_a_page_has_its_place() -> None:
    """Otherwise a program that stops at another one and goes on from there would lose some."""
    watching = Watching.of_job(JOB, "1.a")
    data = [{"kind": "frames.claimed"}, {"kind": "frames.succeeded"}, {"kind": "job.succeeded"}]
    found = list(watching.read_page({"data": data, "cursor": "1.d", "reset": False}))
    assert [event.cursor for event in found] == ["1.a", "1.a", "1.d"]
    assert watching.cursor == "1.d"
    [told] = watching.read_page({"data": [], "cursor": "2.a", "reset": True})
    assert (told.kind, told.cursor) == ("reset", "2.a")


def test_a_farm_that_was_never_there_is_told_soon() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with Farm(f"http://127.0.0.1:{port}", "k", first_contact_seconds=0.2) as farm:
        began = time.monotonic()
        with pytest.raises(Unavailable, match="does not answer"):
            farm.job(JOB)
    assert time.monotonic() - began < 2


def test_an_empty_label_stays_in_the_query() -> None:
    asked = core.chosen({"campaign": ""}, status=None)
    assert calls.jobs(asked).query == {"label.campaign": ""}
    assert calls.steer("x", "cancel").query == {}
    assert calls.steer("x", "cancel", "ticket 7").query == {"why": "ticket 7"}
