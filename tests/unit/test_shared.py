"""Answers that tabs of a key share: built once a second, by one of them."""

from __future__ import annotations

import threading
import uuid

import pytest
from cachetools import TTLCache
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, Response

from api.dashboard import shared
from api.dashboard.shared import SharedAnswers
from farm.store.keys import Caller
from tests.support.waiting import wait_until


def test_of_many_callers_one_builds_the_answer() -> None:
    answers, built = SharedAnswers(), []
    waiting, goes_on = threading.Barrier(11), threading.Event()

    def build() -> Response:
        built.append(1)
        goes_on.wait(30)
        return HTMLResponse("page")

    found: list[Response] = []

    def ask() -> None:
        waiting.wait(30)
        found.append(answers.get("key", build))

    threads = [threading.Thread(target=ask) for _ in range(10)]
    for thread in threads:
        thread.start()
    waiting.wait(30)
    wait_until(lambda: bool(built), 30, "one builds it")
    goes_on.set()
    for thread in threads:
        thread.join(30)
    assert (len(built), len(found), len({id(each) for each in found})) == (1, 10, 1)
    answers.get("other", lambda: HTMLResponse("other"))
    assert answers.get("key", build) is found[0]


def test_an_answer_is_forgotten_after_a_second_or_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    answers = SharedAnswers()
    monkeypatch.setattr(answers, "_answers", TTLCache(9, shared.SECONDS, timer=lambda: now[0]))
    first = answers.get("key", lambda: HTMLResponse("1"))
    assert answers.get("key", lambda: HTMLResponse("2")) is first
    now[0] = shared.SECONDS + 0.1
    second = answers.get("key", lambda: HTMLResponse("2"))
    assert second.body == b"2"
    answers.clear()
    assert answers.get("key", lambda: HTMLResponse("3")).body == b"3"


def test_an_answer_that_was_begun_before_a_change_is_not_given_after_it() -> None:
    answers = SharedAnswers()
    begun, goes_on = threading.Event(), threading.Event()

    def before() -> Response:
        begun.set()
        assert goes_on.wait(30)
        return HTMLResponse("before")

    other = threading.Thread(target=answers.get, args=("key", before))
    other.start()
    assert begun.wait(30)
    answers.clear()
    assert answers.get("key", lambda: HTMLResponse("after")).body == b"after"
    goes_on.set()
    other.join(30)
    assert answers.get("key", lambda: HTMLResponse("later")).body == b"after"


def test_a_refusal_is_not_kept() -> None:
    answers = SharedAnswers()

    def refuse() -> Response:
        raise PermissionError

    for _ in range(2):
        with pytest.raises(PermissionError):
            answers.get("key", refuse)
    assert answers._asking == {}  # else many addresses fill the memory
    assert answers.get("key", lambda: HTMLResponse("no", 404)).status_code == 404
    assert answers.get("key", lambda: HTMLResponse("yes")).body == b"yes"


def caller(**fields: object) -> Caller:
    known = {"key_id": uuid.UUID(int=1), "tenant_id": uuid.UUID(int=2), "tenant": "ann"}
    return Caller(**{**known, "role": "client", "name": "", **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("other", "by_key", "shares"),
    [
        (caller(), True, True),
        (caller(key_id=uuid.UUID(int=9)), False, True),
        (caller(key_id=uuid.UUID(int=9)), True, False),
        (caller(tenant_id=uuid.UUID(int=9)), False, False),
        (caller(role="viewer"), False, False),
        (caller(role="viewer", everywhere=True), False, False),
        (caller(home="ops"), False, False),
    ],
)
def test_only_who_sees_the_same_shares_an_answer(other: Caller, by_key: bool, shares: bool) -> None:
    app = FastAPI()
    app.state.shared = SharedAnswers()

    def ask(who: Caller, path: str = "/jobs") -> bytes:
        headers = [(b"hx-request", b"true"), (b"host", b"farm")]
        scope = {"type": "http", "method": "GET", "path": path, "query_string": b"", "app": app}
        request = Request({**scope, "headers": headers, "scheme": "http", "server": ("farm", 80)})
        answer = HTMLResponse(uuid.uuid4().hex)
        return bytes(shared.shared(request, who, lambda: answer, by_key=by_key).body)

    first = ask(caller())
    assert (ask(other) == first) == shares
    assert ask(caller()) == first
    assert ask(caller(), "/lanes") != first
