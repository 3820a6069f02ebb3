"""farm.client: what is sent again, when, and what never goes to another server."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from farm.client import Farm, calls, core
from farm.client.events import Watching
from farm.errors import FarmError, LimitExceeded, TooSlow, Unavailable
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


def test_a_farm_that_was_never_there_is_told_soon() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with Farm(f"http://127.0.0.1:{port}", "k", first_contact_seconds=0.2) as farm:
        began = time.monotonic()
        with pytest.raises(Unavailable, match="does not answer"):
            farm.job(JOB)
    assert time.monotonic() - began < 2
