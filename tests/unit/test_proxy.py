"""The proxy of the chaos tests: each fault has its documented effect on a connection."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from tests.chaos.proxy import Fault, Freeze, Link, Proxies, Refuse, Reset, Stall, Swallow, Truncate
from tests.support.waiting import wait_until

SOON = 0.3
"""Seconds within which an answer would arrive."""


class Echo:
    """A server that sends every piece back, and records all received bytes."""

    def __init__(self) -> None:
        self.heard = b""
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(client,), daemon=True).start()

    def _answer(self, client: socket.socket) -> None:
        with client:
            try:
                while data := client.recv(4096):
                    self.heard += data
                    client.sendall(data)
            except OSError:
                return


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.socket.close()


@pytest.fixture
def link(echo: Echo) -> Iterator[Link]:
    with Proxies() as proxies:
        yield proxies.link("test", "echo", "127.0.0.1", echo.port)


@pytest.fixture
def client(link: Link) -> Iterator[socket.socket]:
    with connect(link) as connection:
        yield connection


def connect(link: Link) -> socket.socket:
    return socket.create_connection(("127.0.0.1", link.port), timeout=5)


def says(client: socket.socket, data: bytes) -> bytes:
    client.sendall(data)
    return client.recv(4096)


def is_silent(client: socket.socket, data: bytes) -> bool:
    client.settimeout(SOON)
    try:
        says(client, data)
    except TimeoutError:
        return True
    finally:
        client.settimeout(5)
    return False


def ended(client: socket.socket) -> bool:
    try:
        return client.recv(4096) == b""
    except ConnectionResetError:
        return True


def test_it_passes_everything(client: socket.socket, link: Link) -> None:
    seen = link.watch(b"two")
    assert says(client, b"one") == b"one"
    assert not seen.is_set()
    assert says(client, b"two") == b"two"
    assert seen.is_set()


def test_stalled_it_holds_everything_back_and_then_goes_on(
    client: socket.socket, link: Link
) -> None:
    assert says(client, b"one") == b"one"
    link.begin(Stall())
    assert is_silent(client, b"two")
    with connect(link) as late:
        assert is_silent(late, b"three")
        link.heal()
        assert client.recv(4096) == b"two"
        assert late.recv(4096) == b"three"


def test_frozen_connections_stay_so_and_new_ones_are_well(
    client: socket.socket, link: Link
) -> None:
    assert says(client, b"one") == b"one"
    link.begin(Freeze())
    link.heal()
    with connect(link) as late:
        assert says(late, b"two") == b"two"
    assert is_silent(client, b"three")


def test_reset_it_ends_every_connection(client: socket.socket, link: Link) -> None:
    assert says(client, b"one") == b"one"
    link.begin(Reset())
    assert ended(client)
    with connect(link) as late:
        assert ended(late)
    link.heal()
    with connect(link) as later:
        assert says(later, b"two") == b"two"


def test_it_cuts_after_so_many_bytes(client: socket.socket, link: Link, echo: Echo) -> None:
    assert says(client, b"one") == b"one"
    link.begin(Truncate(5))
    client.sendall(b"abcdefgh")
    assert ended(client)
    wait_until(lambda: echo.heard == b"oneabcde", 5, "the beginning arrived, and no more")


def test_it_swallows_an_answer_after_the_server_has_acted(
    client: socket.socket, link: Link, echo: Echo
) -> None:
    link.begin(Swallow(b"COMMIT", times=1, skip=1))
    assert says(client, b"COMMIT 1") == b"COMMIT 1"
    client.sendall(b"COMMIT 2")
    assert ended(client)
    assert echo.heard == b"COMMIT 1COMMIT 2"
    with connect(link) as late:
        assert says(late, b"COMMIT 3") == b"COMMIT 3"


def test_it_answers_in_the_server_s_place(client: socket.socket, link: Link, echo: Echo) -> None:
    link.begin(Refuse())
    head, _, body = says(client, b"PUT / HTTP/1.1\r\n\r\n").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ")
    assert f"Content-Length: {len(body)}".encode() in head
    assert echo.heard == b""


def test_a_server_that_is_away_ends_the_connection() -> None:
    with socket.socket() as silent, Proxies() as proxies:
        silent.bind(("127.0.0.1", 0))  # but does not listen
        link = proxies.link("test", "nobody", "127.0.0.1", silent.getsockname()[1])
        assert link.fault.__class__ is Fault
        with connect(link) as client:
            assert ended(client)
