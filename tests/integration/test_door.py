"""Overload of the API: clients that stall, trickle or flood do not delay others."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from farm.context import Farm
from tests.integration.test_api_refusals import check_problem
from tests.support.api_server import JOB, Api, serving
from tests.support.waiting import wait_until

CROWD = 200
MAX_BYTES = 100 * 2**20
"""Allowed growth of the API's memory, in bytes."""


@pytest.fixture
def api(farm: Farm) -> Iterator[Api]:
    with serving(farm) as running:
        yield running


def connect(api: Api, path: str, length: int, *headers: str) -> socket.socket:
    """Send the head of a request without its body."""
    at = urlsplit(api.url)
    sender = socket.create_connection((str(at.hostname), at.port or 0), timeout=30)
    lines = [f"POST {path} HTTP/1.1", f"Host: {at.netloc}", f"Content-Length: {length}", *headers]
    sender.sendall("\r\n".join([*lines, "", ""]).encode())
    return sender


def origin(api: Api) -> str:
    return f"Origin: {api.url}"


def answer(sender: socket.socket) -> str:
    """Read a whole response. Its body may arrive after its head."""
    told = b""
    with sender:
        while more := sender.recv(65_536):
            told += more
            head, _, body = told.partition(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head)
            if length and len(body) >= int(length[1]):
                break
    return told.decode()


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/exports", "/v1/inputs", "/v1/nonesuch", "/"])
@pytest.mark.parametrize("key", [None, "farm_nonesuch"])
def test_without_a_key_no_body_is_read(api: Api, path: str, key: str | None) -> None:
    words = [] if key is None else [f"Authorization: Bearer {key}"]
    told = answer(connect(api, path, 10**9, *words))
    assert told.startswith("HTTP/1.1 401 ")
    assert "connection: close" in told.lower()


def test_a_login_takes_few_bytes_and_few_fields(api: Api) -> None:
    page = api.bare(Origin=api.url)
    check_problem(page.post("/login", content=b"key=" + 4093 * b"a"), 413)
    check_problem(page.post("/login", content=100 * b"a=b&"), 401)
    assert page.post("/login", content=f"key={api.key()}").status_code == 204


@pytest.mark.parametrize("path", ["/login", "/v1/jobs", "/v1/images", "/v1/inputs"])
def test_a_body_that_stalls_is_given_up(
    api: Api, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.door.FIRST_SECONDS", 0.3)
    key = f"Authorization: Bearer {api.key()}"
    with connect(api, path, 100, key, origin(api), "Content-Type: image/png") as sender:
        sender.sendall(b"{")
        told = answer(sender)
    assert told.startswith("HTTP/1.1 408 ")
    assert "body_too_slow" in told


def test_a_body_that_keeps_its_pace_may_take_long(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.door.FIRST_SECONDS", 0.5)
    monkeypatch.setattr("api.door.MIN_BYTES_PER_SECOND", 10)

    def slowly() -> Iterator[bytes]:
        pause = threading.Event()
        for number in range(10):
            yield f'{{"prompt": "a star {number}"}}\n'.encode()
            pause.wait(0.1)

    assert api.client().post("/v1/inputs", content=slowly()).status_code == 201


def test_a_tenant_has_places_of_its_own(api: Api) -> None:
    """A tenant that sends many unfinished bodies at once is refused. Others are not."""
    key = f"Authorization: Bearer {api.key('ann')}"
    # A few more than the places: a submission may hold a place, so that one is refused.
    stalled = [connect(api, "/v1/jobs", 100, key) for _ in range(70)]
    ann, bob = api.client("ann"), api.client("bob")
    wait_until(lambda: ann.post("/v1/jobs", json=JOB).status_code == 503, 30, "ann's are taken")
    assert bob.post("/v1/jobs", json=JOB).status_code == 202
    for sender in stalled:
        sender.close()
    wait_until(lambda: ann.post("/v1/jobs", json=JOB).status_code == 202, 30, "they are free")


def resident() -> int:
    """Return this process's resident memory, in bytes."""
    text = Path("/proc/self/status").read_text()
    [line] = [line for line in text.splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="there is no /proc")
@pytest.mark.parametrize("kind", ["floods", "stalls at the login", "stalls elsewhere"])
def test_a_crowd_without_keys_costs_little(api: Api, kind: str) -> None:
    """Two hundred clients. The API runs in this process, so this process's memory is measured."""
    client = api.client()
    assert client.post("/v1/jobs", json=JOB).status_code == 202
    before, block, over = resident(), os.urandom(2**16), threading.Event()
    at_login = kind == "stalls at the login"

    def misbehave() -> None:
        path, length = ("/login", 4000) if at_login else ("/v1/exports", 10**9)
        with connect(api, path, length, origin(api)) as sender:
            try:
                while kind == "floods" and not over.is_set():
                    sender.sendall(block)
            except OSError:  # the API has closed the connection
                return
            over.wait(60)

    took: list[float] = []
    with ThreadPoolExecutor(CROWD) as crowd:
        for _ in range(CROWD):
            crowd.submit(misbehave)
        for _ in range(100):
            started = time.monotonic()
            assert client.post("/v1/jobs", json=JOB).status_code == 202
            took.append(time.monotonic() - started)
        grown = resident() - before
        over.set()
    assert grown < MAX_BYTES
    assert sorted(took)[-2] < 0.5, sorted(took)[-5:]


def test_a_storage_that_is_silent_holds_up_no_submission(farm: Farm) -> None:
    """Readiness and the page's pictures wait for it in separate threads."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        port = silent.getsockname()[1]
        settings = farm.settings.model_copy(update={"s3_endpoint_url": f"http://127.0.0.1:{port}"})
        with serving(farm, settings) as api, ThreadPoolExecutor(32) as visitors:
            for _ in range(16):
                visitors.submit(httpx.get, f"{api.url}/readyz", timeout=60)
            client, took = api.client(), []
            for _ in range(50):
                started = time.monotonic()
                assert client.post("/v1/jobs", json=JOB).status_code == 202
                took.append(time.monotonic() - started)
    assert sorted(took)[-2] < 0.5, sorted(took)[-5:]
