"""Addresses of webhooks: nothing that is not public is reached, however it is written."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ipaddress import ip_address

import pytest

from farm.domain.webhook_addresses import Address, is_public, parse_networks, parse_target
from farm.errors import InvalidRequest
from farm.services.webhooks import sending
from farm.services.webhooks.sending import Answer, send
from tests.support.receiver import receiving


class Listener:
    """Ports of this machine that count connections."""

    def __init__(self) -> None:
        self.count = 0
        self.servers = [self._listen(socket.AF_INET, "0.0.0.0")]
        self.port = self.servers[0].getsockname()[1]
        if socket.has_ipv6:
            self.servers.append(self._listen(socket.AF_INET6, "::", self.port))

    def _listen(self, family: socket.AddressFamily, host: str, port: int = 0) -> socket.socket:
        server = socket.socket(family)
        if family == socket.AF_INET6:
            server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        server.bind((host, port))
        server.listen()
        threading.Thread(target=self._accept, args=(server,), daemon=True).start()
        return server

    def _accept(self, server: socket.socket) -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            self.count += 1
            connection.close()


@pytest.fixture(scope="module")
def listener() -> Iterator[Listener]:
    running = Listener()
    yield running
    for server in running.servers:
        server.close()


@contextmanager
def looking_up(*answers: Sequence[str]) -> Iterator[sending.Resolve]:
    """Yield a name server that gives each answer once, and the last one again and again."""
    left = [list(map(ip_address, answer)) for answer in answers]

    async def look_up(host: str, port: int) -> Sequence[Address]:
        del host, port
        return left.pop(0) if len(left) > 1 else left[0]

    yield look_up


def attempt(url: str, look_up: sending.Resolve = sending.resolve, networks: str = "") -> Answer:
    """Send a message as an endpoint with this address gets it."""
    allowed = parse_networks(networks)
    try:
        target = parse_target(url, allowed)
    except InvalidRequest as error:
        return Answer(0, error=error.message)
    return asyncio.run(send(target, {"webhook-id": "msg_1"}, b"{}", allowed, look_up))


LITERALS = (
    "127.0.0.1",
    "127.1.2.3",
    "0.0.0.0",
    "10.0.0.5",
    "100.64.0.1",
    "100.100.100.200",
    "168.63.129.16",
    "169.254.169.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.9",
    "192.0.0.192",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.1.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.250",
    "240.0.0.1",
    "255.255.255.255",
    "[::1]",
    "[::]",
    "[::127.0.0.1]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[::ffff:169.254.169.254]",
    "[64:ff9b::127.0.0.1]",
    "[64:ff9b::a9fe:a9fe]",
    "[64:ff9b:1::1]",
    "[2001::1]",
    "[2001:10::1]",
    "[2001:20::1]",
    "[2001:db8::1]",
    "[2002:7f00:1::]",
    "[2002:a9fe:a9fe::]",
    "[3fff::1]",
    "[5f00::1]",
    "[fc00::1]",
    "[fd00:ec2::254]",
    "[fe80::1]",
    "[fec0::1]",
    "[ff02::1]",
    "[100::1]",
)

# Python's `ipaddress` refuses these, and the operating system takes them for addresses.
SPELLINGS = (
    "2130706433",
    "0x7f000001",
    "0x7f.1",
    "017700000001",
    "127.1",
    "127.0.1",
    "0177.0.0.1",
    "localhost",
    "LOCALHOST",
    "localhost.",
)

NAMES = {
    "private": ["10.0.0.5"],
    "loopback": ["127.0.0.1"],
    "loopback 6": ["::1"],
    "metadata": ["169.254.169.254"],
    "mixed": ["93.184.215.14", "127.0.0.1"],
    "mixed, private first": ["127.0.0.1", "93.184.215.14"],
    "mapped": ["::ffff:127.0.0.1"],
    "NAT64": ["64:ff9b::7f00:1"],
    "no address": [],
}


@pytest.mark.parametrize("host", LITERALS)
def test_an_address_that_is_not_public_is_refused(listener: Listener, host: str) -> None:
    before = listener.count
    for url in (f"https://{host}/", f"https://{host}:{listener.port}/", f"http://{host}/"):
        answer = attempt(url)
        assert answer.status is None
        assert "not public" in str(answer.error) or "must be https" in str(answer.error)
    assert listener.count == before


@pytest.mark.parametrize("host", SPELLINGS)
def test_another_spelling_of_loopback_is_refused(listener: Listener, host: str) -> None:
    before = listener.count
    for url in (f"https://{host}/", f"https://{host}:{listener.port}/"):
        assert attempt(url).error
    assert listener.count == before


@pytest.mark.parametrize("addresses", NAMES.values(), ids=list(NAMES))
def test_a_name_that_leads_inside_is_refused(listener: Listener, addresses: list[str]) -> None:
    before = listener.count
    with looking_up(addresses) as look_up:
        answer = attempt("https://shop.example/", look_up)
    assert "not public" in str(answer.error) or "without an address" in str(answer.error)
    assert not any(address in str(answer.error) for address in addresses), "it is not told"
    assert listener.count == before


def test_a_name_is_looked_up_once_for_an_attempt(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second answer cannot lead inside: the connection goes to the address that was checked."""
    monkeypatch.setattr(sending, "SECONDS", 0.5)
    before = listener.count
    with looking_up(["192.31.196.1"], ["127.0.0.1"]) as look_up:
        assert attempt("https://shop.example/", look_up).status is None
        answer = attempt("https://shop.example/", look_up)
    assert "not public" in str(answer.error), "the second attempt asked again"
    assert listener.count == before


@pytest.mark.parametrize("port", [80, 22, 6379, 8443])
def test_only_https_at_its_port_is_reached(port: int) -> None:
    for scheme in ("http", "https"):
        with looking_up(["93.184.215.14"]) as look_up:
            assert "must be https" in str(
                attempt(f"{scheme}://shop.example:{port}/", look_up).error
            )


@pytest.mark.parametrize(
    "host",
    [
        "a" * 60 + "-",
        "a" * 64,
        "-a.example",
        "a..example",
        "[2606:4700::1%eth0]",
        "a" * 250 + ".x.y",
    ],
)
def test_hosts_that_are_none_are_refused_at_once(host: str) -> None:
    began = time.monotonic()
    assert attempt(f"https://{host}/").error
    assert time.monotonic() - began < 1.0


def test_a_dot_at_the_end_of_a_name_is_left_out() -> None:
    assert parse_target("https://shop.example./hooks", ()).host == "shop.example"


def test_public_addresses_are_public() -> None:
    for text in ("1.1.1.1", "93.184.215.14", "192.0.1.1", "100.63.0.1", "100.128.0.1"):
        assert is_public(ip_address(text))
    for text in ("2606:4700::1111", "2a00:1450::1", "64:ff9b::101:101", "2001:4860::8888"):
        assert is_public(ip_address(text))


# What an operator allows


def test_networks_of_the_operator_may_be_reached() -> None:
    with receiving() as receiver:
        answer = attempt(f"{receiver.url}?secret=5", networks="10.1.0.0/16, 127.0.0.0/8")
        assert (answer.status, answer.error, answer.text) == (200, None, "ok")
        [request] = receiver.requests
        assert request.path == "/hook?secret=5"
        assert request.headers["host"] == receiver.url.split("/")[2]
        others = ("10.1.0.0/16", "127.0.0.2/32", "::1/128")
        assert not any(attempt(receiver.url, networks=each).status for each in others)
        assert len(receiver.requests) == 1


def test_a_name_is_allowed_if_all_its_addresses_are() -> None:
    with receiving() as receiver:
        port = receiver.url.split(":")[2].split("/")[0]
        url = f"http://hooks.internal:{port}/"
        with looking_up(["127.0.0.1"]) as look_up:
            assert attempt(url, look_up, "127.0.0.0/8").status == 200
        assert receiver.requests[0].headers["host"] == f"hooks.internal:{port}"
        for inside in (["127.0.0.1", "10.0.0.5"], ["127.0.0.1", "93.184.215.14"]):
            with looking_up(inside) as look_up:
                assert attempt(url, look_up, "127.0.0.0/8").status is None
        assert len(receiver.requests) == 1


def test_proxies_and_credentials_of_the_environment_are_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with receiving() as proxy, receiving() as receiver:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        assert attempt(receiver.url, networks="127.0.0.0/8").status == 200
        assert proxy.requests == []
        assert "authorization" not in receiver.requests[0].headers


# Receivers that misbehave


def dripping(server: socket.socket, sent: bytes, rest: bytes, pause: float) -> None:
    connection, _ = server.accept()
    connection.recv(2**16)
    try:
        connection.sendall(sent)
        while True:
            connection.sendall(rest)
            time.sleep(pause)  # a receiver, not a wait of the test
    except OSError:
        pass
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("sent", "rest", "pause", "status"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n", b"x", 0.05, None),
        (b"HTTP/1.1 200 OK\r\n", b"x-more: 1\r\n", 0.05, None),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\n", b"x" * 2**16, 0.0, 200),
    ],
    ids=["drips its answer", "drips its headers", "sends a gigabyte"],
)
def test_an_attempt_takes_no_longer_than_allowed(
    monkeypatch: pytest.MonkeyPatch, sent: bytes, rest: bytes, pause: float, status: int | None
) -> None:
    monkeypatch.setattr(sending, "SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        args = (server, sent, rest, pause)
        threading.Thread(target=dripping, args=args, daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        began = time.monotonic()
        answer = attempt(url, networks="127.0.0.0/8")
        assert time.monotonic() - began < 3.0
    assert answer.status == status
    assert (answer.error == "no answer within 1 s") is (status is None)
    assert len(answer.text) <= sending.KEPT_CHARS


def test_a_receiver_that_is_away_is_an_answer_with_a_reason() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    answer = attempt(f"http://127.0.0.1:{port}/", networks="127.0.0.0/8")
    assert answer.status is None
    assert answer.error


def test_a_receiver_without_the_right_certificate_gets_nothing() -> None:
    with receiving() as receiver:
        port = receiver.url.split(":")[2].split("/")[0]
        answer = attempt(f"https://127.0.0.1:{port}/", networks="127.0.0.0/8")
        assert answer.status is None
        assert str(answer.error).startswith("TLS failed: ")
        assert receiver.requests == []
