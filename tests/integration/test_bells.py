"""Bells: rung on the real Redis, and not essential without one."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from pydantic import SecretStr

from farm.bells import JOINED_SECONDS, Bells, lane
from farm.config import Settings
from farm.context import Farm
from farm.local import wheels
from farm.local.ports import free_port
from tests.support.cli_runner import farm as command
from tests.support.store import submit
from tests.support.waiting import wait_until


def test_a_lane_holds_two_bells_at_most(settings: Settings) -> None:
    bells = Bells(settings)
    for _ in range(4):
        assert all(bells.ring("two") for _ in range(10))
        wait_until(lambda: not bells._late, 30, "no bell waits for its interval")
    wait_until(lambda: bells._redis.llen(lane("two")) == 2, 30, "the last one has arrived")
    bells.close()


def test_threads_that_ring_at_once_add_two_bells_at_most(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    bells = Bells(settings)
    assert bells.ring("two")
    begun, both = threading.Barrier(2), threading.Barrier(2)
    count = bells._redis.llen

    def counted_by_both(queue: str) -> Any:
        number = count(queue)
        with suppress(threading.BrokenBarrierError):
            both.wait(1.0)
        return number

    def ring() -> None:
        begun.wait(30)
        bells.ring("two")

    monkeypatch.setattr(bells._redis, "llen", counted_by_both)
    monkeypatch.setattr("farm.bells.JOINED_SECONDS", 0.0)
    threads = [threading.Thread(target=ring) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert count(lane("two")) == 2
    bells.close()


def test_the_first_bell_goes_at_once_and_those_that_follow_are_joined(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    bells = Bells(settings)
    rung: list[tuple[str, float]] = []

    def note(queue: str, _add: object) -> bool:
        rung.append((queue, time.monotonic()))
        return True

    monkeypatch.setattr(bells, "_add_now", note)
    started = time.monotonic()
    for _ in range(200):
        bells.ring("one")
    assert rung[0][0] == lane("one")
    assert rung[0][1] - started < JOINED_SECONDS, "an idle lane's first bell waits for nothing"
    last = time.monotonic()
    bells.ring("other")
    assert rung[-1][0] == lane("other"), "lanes do not wait for each other"
    wait_until(lambda: not bells._late, 30, "no bell waits for its interval")
    own = [at for queue, at in rung if queue == lane("one")]
    wait_until(lambda: max(at for queue, at in rung if queue == lane("one")) >= last, 30, "rung")
    own = [at for queue, at in rung if queue == lane("one")]
    assert len(own) <= 2 + (own[-1] - started) / JOINED_SECONDS
    bells.close()


def test_a_bell_that_waits_is_rung_when_its_process_ends(settings: Settings) -> None:
    bells = Bells(settings)
    reader = Bells(settings)
    bells.ring("last")
    assert reader._redis.lpop(lane("last")) is not None
    bells.ring("last")  # at the end of its interval
    bells.close()
    wait_until(lambda: reader._redis.llen(lane("last")) == 1, 30, "it was rung")
    reader.close()


def test_closing_waits_for_a_bell_that_is_just_being_rung(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connection would be closed while it waits for the answer."""
    bells = Bells(settings)
    ringing, go_on, closed = threading.Event(), threading.Event(), threading.Event()

    def late(_queue: str, _add: object) -> bool:
        ringing.set()
        return go_on.wait(30)

    def close() -> None:
        bells.close()
        closed.set()

    monkeypatch.setattr(bells, "_add_now", late)
    bells._rung_at[lane("one")] = time.monotonic() + 0.1  # so this one is rung by its timer
    bells.ring("one")
    assert ringing.wait(30)
    thread = threading.Thread(target=close)
    thread.start()
    assert not closed.wait(0.2)
    go_on.set()
    thread.join()
    assert closed.is_set()


def test_without_redis_a_bell_is_not_rung_and_nothing_is_raised(settings: Settings) -> None:
    away = settings.model_copy(update={"redis_url": SecretStr("redis://127.0.0.1:1/0")})
    bells = Bells(away)
    assert bells.ring("demo") is False
    assert bells.answers() is False
    bells.close()


def test_a_redis_that_accepts_and_stays_silent_holds_nobody_up(
    farm: Farm, settings: Settings, tenant: uuid.UUID
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    taken.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        url = SecretStr(f"redis://127.0.0.1:{server.getsockname()[1]}/0")
        farm.bells = Bells(settings.model_copy(update={"redis_url": url}))
        started = time.monotonic()
        submit(farm, tenant)
        first = time.monotonic() - started
        for _ in range(5):
            submit(farm, tenant)
        assert first < 5.0
        assert time.monotonic() - started - first < 4.0
        for connection in taken:
            connection.close()


# Addresses of Redis


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """Create a self-signed certificate with its key."""
    path = tmp_path / "both.pem"
    words = f"req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 -keyout {path}"
    done = ["openssl", *words.split(), "-addext", "subjectAltName=IP:127.0.0.1"]
    made = subprocess.run(done, capture_output=True, check=True)
    with path.open("ab") as file:
        file.write(made.stdout)
    return path


@contextmanager
def behind_tls(certificate: Path) -> Iterator[tuple[int, list[str]]]:
    """Run a server that only does TLS. Yield its port and the results of handshakes."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    ends: list[str] = []

    def greet(server: socket.socket) -> None:
        while True:
            try:
                with context.wrap_socket(server.accept()[0], server_side=True):
                    ends.append("trusted")
            except ssl.SSLError as error:
                ends.append(error.reason)
            except OSError:
                return

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=greet, args=(server,))
        thread.start()
        try:
            yield server.getsockname()[1], ends
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl on the PATH")
def test_a_certificate_behind_rediss_is_verified(settings: Settings, certificate: Path) -> None:
    """The farm's client verifies it, and so does Celery, which accepts any by default."""
    with behind_tls(certificate) as (port, ends):
        url = f"rediss://127.0.0.1:{port}/0"
        bells = Bells(settings.model_copy(update={"redis_url": SecretStr(url)}))
        assert not bells.answers()
        with bells.app.connection_for_write() as connection:
            channels: Any = connection
            with pytest.raises(Exception, match="certificate verify failed"):
                channels.default_channel.client.ping()
        assert len(ends) >= 2
        assert "trusted" not in ends
        trusting = f"{url}?ssl_cert_reqs=required&ssl_ca_certs={certificate}"
        other = Bells(settings.model_copy(update={"redis_url": SecretStr(trusting)}))
        other.answers()
        wait_until(lambda: "trusted" in ends, 10, "the certificate is trusted")
        for each in (bells, other):
            each.close()


@pytest.fixture
def sentinel(settings: Settings, tmp_path: Path) -> Iterator[str]:
    """Run a Sentinel that watches the tests' Valkey. Yield the farm's address for it."""
    valkey = urlsplit(settings.redis_url.get_secret_value())
    port, config = free_port(), tmp_path / "sentinel.conf"
    config.write_text(
        f"bind 127.0.0.1\nport {port}\ndir {tmp_path}\n"
        f"sentinel monitor main 127.0.0.1 {valkey.port} 1\n"
        f"sentinel auth-pass main {valkey.password}\n"
    )
    process = subprocess.Popen(
        [wheels.valkey(), str(config), "--sentinel"], stdout=subprocess.DEVNULL
    )
    hosts = f"127.0.0.1:1,127.0.0.1:{port}"  # the first one is away
    url = f"sentinel://:{valkey.password}@{hosts}/main{valkey.path}"
    try:
        watching = Bells(settings.model_copy(update={"redis_url": SecretStr(url)}))
        wait_until(watching.answers, 20, "Sentinel names the server")
        watching.close()
        yield url
    finally:
        process.terminate()
        process.wait()


def test_bells_ring_at_the_server_that_sentinel_names(settings: Settings, sentinel: str) -> None:
    bells, direct = (
        Bells(settings),
        Bells(settings.model_copy(update={"redis_url": SecretStr(sentinel)})),
    )
    assert direct.ring("watched")
    assert bells._redis.llen(lane("watched")) == 1
    with direct.app.connection_for_read() as connection:
        channel: Any = connection.default_channel
        assert channel.client.llen(lane("watched")) == 1
    for each in (bells, direct):
        each.close()


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:6379/0",
        "127.0.0.1:6379",
        "sentinel://127.0.0.1:26379",
        "sentinel://127.0.0.1:port/main",
    ],
)
def test_an_address_of_another_form_names_its_setting(url: str) -> None:
    done = command("janitor", env={"FARM_REDIS_URL": url})
    assert done.code == 1
    assert "FARM_REDIS_URL" in done.err
    assert "Traceback" not in done.err
