"""Bells: rung on the real Redis, and no great matter where there is none."""

from __future__ import annotations

import socket
import threading
import time
import uuid

from pydantic import SecretStr

from farm.bells import Bells, lane
from farm.config import Settings
from farm.context import Farm
from tests.farming import submit


def test_a_lane_holds_two_bells_at_most(settings: Settings) -> None:
    bells = Bells(settings)
    assert all(bells.ring("two") for _ in range(10))
    assert bells._redis.llen(lane("two")) == 2
    bells.close()


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
        assert time.monotonic() - started - first < 1.0
        for connection in taken:
            connection.close()
