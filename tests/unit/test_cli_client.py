"""The API's client: its retries, and its messages for users."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from farm.cli.client.http import FarmClient
from farm.cli.commands.job_lookup import find_job
from farm.config import Settings
from farm.errors import (
    Conflict,
    FarmError,
    InvalidRequest,
    KeyReused,
    NotFound,
    Unauthenticated,
    Unavailable,
)
from farm.local.ports import free_port

JOB = "4f2a81c3-0000-4000-8000-00000000000"
Answer = tuple[int, dict[str, str], bytes]


@dataclass
class Script:
    """A server with prepared answers, sent one after another. The last one is repeated."""

    url: str = ""
    answers: list[Answer] = field(default_factory=list)
    asked: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)

    def tell(self, status: int, body: Any, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        self.answers.append((status, names, content))


def problem(status: int, code: str, detail: str) -> dict[str, Any]:
    return {"status": status, "detail": detail, "error": {"code": code, "param": "seed"}}


def handler(script: Script) -> Callable[..., BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            script.asked.append((self.command, self.path, dict(self.headers), body))
            last = len(script.answers) == 1
            status, headers, content = script.answers[0] if last else script.answers.pop(0)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = answer  # noqa: N815  http.server's names

        def log_message(self, *args: object) -> None:
            """Write no log."""

    return Handler


@pytest.fixture
def script() -> Iterator[Script]:
    with serving_script() as running:
        yield running


@contextmanager
def serving_script() -> Iterator[Script]:
    script = Script()
    with ThreadingHTTPServer(("127.0.0.1", 0), handler(script)) as server:
        script.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield script
        server.shutdown()
        thread.join()


@pytest.fixture
def client(script: Script) -> Iterator[FarmClient]:
    with FarmClient(script.url, "farm_key", patience_seconds=2.0) as client:
        yield client


def test_the_key_goes_along(script: Script, client: FarmClient) -> None:
    script.tell(200, {"id": JOB})
    assert client.job(JOB)["id"] == JOB
    assert script.asked[0][2]["Authorization"] == "Bearer farm_key"


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (422, "invalid_request", InvalidRequest),
        (401, "unauthenticated", Unauthenticated),
        (404, "not_found", NotFound),
        (409, "conflict", Conflict),
        (422, "idempotency_mismatch", KeyReused),
        (500, "internal_error", FarmError),
        (418, "something_new", FarmError),
    ],
)
def test_a_problem_becomes_its_error(
    script: Script, client: FarmClient, status: int, code: str, kind: type[FarmError]
) -> None:
    script.tell(status, problem(status, code, "seed: is wrong."))
    with pytest.raises(kind) as caught:
        client.job(JOB)
    assert (type(caught.value), caught.value.message) == (kind, "seed: is wrong.")
    assert caught.value.param == "seed"
    assert len(script.asked) == 1


def test_503_is_tried_again_with_the_same_idempotency_key(
    script: Script, client: FarmClient
) -> None:
    script.tell(503, problem(503, "unavailable", "Postgres does not answer."), Retry_After="0.1")
    script.tell(202, {"id": JOB})
    assert client.submit({"prompts": ["x"]})["id"] == JOB
    keys = [headers["Idempotency-Key"] for _method, _path, headers, _body in script.asked]
    assert len(keys) == 2
    assert len(set(keys)) == 1


def test_patience_ends(script: Script, client: FarmClient) -> None:
    client.farm.server.patience_seconds = 1.5
    script.tell(503, problem(503, "unavailable", "Postgres does not answer."))
    with pytest.raises(Unavailable, match="Postgres does not answer"):
        client.job(JOB)
    assert len(script.asked) > 1


def test_a_retry_of_dead_frames_is_sent_once(script: Script, client: FarmClient) -> None:
    script.tell(503, problem(503, "unavailable", "Postgres does not answer."))
    with pytest.raises(Unavailable):
        client.steer(JOB, "retry", "")
    assert len(script.asked) == 1


def test_whatever_else_answers_is_named(script: Script, client: FarmClient) -> None:
    script.tell(404, b"<html>nginx</html>")
    script.tell(200, b"<html>welcome</html>")
    with pytest.raises(FarmError, match=r"server at http\S+ answered 404 Not Found to /v1/jobs"):
        client.job(JOB)
    with pytest.raises(FarmError, match="is not a farm"):
        client.job(JOB)


@pytest.mark.parametrize("answer", [None, [], "welcome", {}, {"data": {}}])
def test_json_of_another_server_is_refused(script: Script, client: FarmClient, answer: Any) -> None:
    script.tell(200, answer)
    with pytest.raises(FarmError, match="is not a farm"):
        client.workers()


def test_the_storage_is_told_apart_from_the_farm(script: Script, client: FarmClient) -> None:
    port = free_port()
    script.tell(307, b"", Location=f"http://127.0.0.1:{port}/farm/key.png")
    with pytest.raises(Unavailable, match=f"image storage at 127.0.0.1:{port} does not answer"):
        client.content(f"/v1/jobs/{JOB}/frames/0/image")


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARM_DATA", "/nowhere")
    with (
        FarmClient(f"http://127.0.0.1:{free_port()}", "k") as client,
        pytest.raises(Unavailable, match=r"does not answer\. Is `farm up` running\?") as caught,
    ):
        client.job(JOB)
    assert "/nowhere, which has no file farm.env" in caught.value.message


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "ftp://x", "http://", "x"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest, match="FARM_API_URL"):
        FarmClient(url, "k")


def test_a_key_is_needed_and_looked_at() -> None:
    with pytest.raises(Unauthenticated, match="No API key is set"):
        FarmClient.of(Settings(api_key=None))
    with pytest.raises(InvalidRequest, match="characters that no key has"):
        FarmClient("http://127.0.0.1:8000", "k\n")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "\ud800"])
def test_what_json_cannot_hold_is_refused(client: FarmClient, value: Any) -> None:
    with pytest.raises(InvalidRequest, match="cannot be sent"):
        client.submit({"x": value})


def test_lists_are_read_through(script: Script, client: FarmClient) -> None:
    script.tell(200, {"data": [{"id": "1"}, {"id": "2"}], "next": "b c"})
    script.tell(200, {"data": [{"id": "3"}], "next": None})
    assert [job["id"] for job in client.jobs({"status": "queued"})] == ["1", "2", "3"]
    assert [path for _method, path, _headers, _body in script.asked] == [
        "/v1/jobs?status=queued&limit=200",
        "/v1/jobs?status=queued&limit=200&after=b+c",
    ]


def test_lists_end_at_their_limit(script: Script, client: FarmClient) -> None:
    script.tell(200, {"data": [{"id": "1"}, {"id": "2"}], "next": "b"})
    assert [job["id"] for job in client.jobs(limit=2)] == ["1", "2"]
    assert len(script.asked) == 1


def test_a_whole_id_is_taken_as_it_is(script: Script, client: FarmClient) -> None:
    assert find_job(client, f" {JOB.upper()}1 ") == f"{JOB}1"
    assert script.asked == []


def test_a_beginning_must_name_one_job(script: Script, client: FarmClient) -> None:
    other = "4f2a81ff-0000-4000-8000-000000000000"
    script.tell(200, {"data": [{"id": f"{JOB}1"}, {"id": other}], "next": None})
    assert find_job(client, "4f2a81c") == f"{JOB}1"
    with pytest.raises(InvalidRequest, match=f"2 job IDs begin with 4f2a81: {JOB}1, {other}"):
        find_job(client, "4f2a81")
    with pytest.raises(NotFound, match="None of the last 1,000 job IDs begins with abcdef"):
        find_job(client, "abcdef")


@pytest.mark.parametrize("word", ["", "4f2a8", "zzzzzz", "../../etc", "*", "x" * 500])
def test_what_is_no_id_is_refused(client: FarmClient, word: str) -> None:
    with pytest.raises(InvalidRequest, match="is not a job ID"):
        find_job(client, word)
