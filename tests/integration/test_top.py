"""`farm top`: the overview in a terminal, once or live."""

from __future__ import annotations

import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fcntl import ioctl

import pytest

from farm.cli.commands import top
from farm.context import Farm
from farm.store import workers
from farm.store.engine import transaction
from tests.integration.test_history import recently, store_sample
from tests.support.api_server import Api, serving
from tests.support.cli_runner import farm_process as command  # its variables are not the API's
from tests.support.cli_runner import inherited
from tests.support.store import register_worker, sql


@pytest.fixture
def api(farm: Farm) -> Iterator[Api]:
    with serving(farm) as running:
        yield running


@pytest.fixture
def env(api: Api) -> dict[str, str]:
    return {"FARM_API_URL": api.url, "FARM_API_KEY": api.key("ops", "operator")}


def line_with(text: str, words: str) -> str:
    [*_, found] = [line for line in text.splitlines() if words in line]
    return " ".join(found.split())


def test_it_says_what_needs_attention_and_what_each_lane_does(
    api: Api, env: dict[str, str]
) -> None:
    api.submit(api.client(), images_per_prompt=120)
    for minute in range(16):
        done = {"succeeded": 60 * (20 - minute)}
        store_sample(api.farm, recently(minute), work_seconds=100 - minute, **done)
    shown = command("top", env=env)
    assert shown.code == 0, shown.err
    assert "120 frames of demo wait, and no worker is alive." in shown.out
    assert line_with(shown.out, "critical").startswith("critical 120 frames")
    assert "60 frames/min" in line_with(shown.out, "Farm")
    assert "120 frames wait" in line_with(shown.out, "Farm")
    lane = line_with(shown.out, "0 of 0")
    assert lane.startswith("demo 0 120 0 60 ")
    assert "min" not in lane.split("0 of 0")[0]  # nobody renders it
    worker = register_worker(api.farm)
    with transaction(api.farm.store) as connection:
        workers.set_state(connection, worker.id, "idle")
    assert " 2 min 0 s " in line_with(command("top", env=env).out, "1 of 1")
    assert top.BARS[-1] * 10 in lane


def test_failed_workers_come_first(api: Api, env: dict[str, str]) -> None:
    for name, state in (("sd-a", "idle"), ("sd-b", "failed"), ("sd-c", "rendering")):
        worker = register_worker(api.farm, name)
        with transaction(api.farm.store) as connection:
            problem = "The checkpoint is [damaged]." if state == "failed" else None
            workers.set_state(connection, worker.id, state, problem=problem)
    shown = command("top", "--once", env=env)
    names = [line.split()[0] for line in shown.out.splitlines() if line.startswith("sd-")]
    assert names == ["sd-b", "sd-a", "sd-c"]
    assert "The checkpoint is [damaged]." in line_with(shown.out, "sd-b")


def test_scripts_get_json(api: Api, env: dict[str, str]) -> None:
    register_worker(api.farm, "sd-a")
    found = command("top", "--json", env=env).json
    assert [each["pipeline"] for each in found["lanes"]] == ["demo"]
    assert [each["name"] for each in found["workers"]] == ["sd-a"]
    assert set(found) == {"attention", "lanes", "past", "workers"}


def test_a_clients_key_is_told_what_it_lacks(api: Api, env: dict[str, str]) -> None:
    refused = command("top", env={**env, "FARM_API_KEY": api.key("ann")})
    assert refused.code == 1
    assert "operator" in refused.err


@contextmanager
def in_a_terminal(
    env: dict[str, str], stdin: int | None = None
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Run `farm top` in a terminal of 100 x 30 characters. Yield it and the other end."""
    ours, its = pty.openpty()
    ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "farm.cli", "top", "--every", "0.5"],
        env=inherited() | env | {"TERM": "xterm-256color"},
        stdin=its if stdin is None else stdin,
        stdout=its,
        stderr=its,
        start_new_session=True,
    )
    os.close(its)
    try:
        yield process, ours
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        os.close(ours)


def read_until(terminal: int, words: str, seconds: float = 90) -> str:
    """Return what is printed, up to some words."""
    text, deadline = "", time.monotonic() + seconds
    while words not in text:
        left = deadline - time.monotonic()
        assert left > 0, text[-3000:]
        if select.select([terminal], [], [], left)[0]:
            text += os.read(terminal, 65536).decode(errors="replace")
    return text


@pytest.mark.parametrize("way", ["q", "ctrl-c", "sigterm"])
def test_it_is_live_until_it_is_left(api: Api, env: dict[str, str], way: str) -> None:
    with in_a_terminal(env) as (process, terminal):
        read_until(terminal, "Nothing needs attention.")
        settings = termios.tcgetattr(terminal)
        register_worker(api.farm, "sd-new")
        read_until(terminal, "sd-new")
        assert process.poll() is None
        if way == "q":
            os.write(terminal, b"xq")
        else:
            process.send_signal(signal.SIGINT if way == "ctrl-c" else signal.SIGTERM)
        text = read_until(terminal, "\x1b[?1049l")  # the screen as it was before
        assert "Traceback" not in text
        assert process.wait(30) == (0 if way == "q" else 130)
        assert termios.tcgetattr(terminal)[3] & termios.ECHO
        assert not settings[3] & termios.ECHO


def test_it_needs_no_keyboard(api: Api, env: dict[str, str]) -> None:
    with in_a_terminal(env, subprocess.DEVNULL) as (process, terminal):
        read_until(terminal, "Nothing needs attention.")
        register_worker(api.farm, "sd-new")
        read_until(terminal, "sd-new")
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130


def test_it_outlives_an_error_of_the_farm(api: Api, env: dict[str, str]) -> None:
    with in_a_terminal(env) as (process, terminal):
        read_until(terminal, "Nothing needs attention.")
        sql(api.farm, "ALTER TABLE samples RENAME TO away")
        read_until(terminal, "Trying again.")
        sql(api.farm, "ALTER TABLE away RENAME TO samples")
        register_worker(api.farm, "sd-new")
        read_until(terminal, "sd-new")
        os.write(terminal, b"q")
        assert process.wait(30) == 0


def test_names_are_shown_as_they_are(api: Api, env: dict[str, str]) -> None:
    register_worker(api.farm, "gpu[/]-1\x1b]52;c;eA==\x07")
    shown = command("top", "--once", env=env)
    assert shown.code == 0, shown.err
    assert "gpu[/]-1\ufffd]52;c;eA==\ufffd" in shown.out


def test_it_waits_for_a_farm_that_is_away(farm: Farm) -> None:
    with serving(farm) as api:
        env = {"FARM_API_URL": api.url, "FARM_API_KEY": api.key("ops", "operator")}
        ending = in_a_terminal(env)
        process, terminal = ending.__enter__()
        read_until(terminal, "Nothing needs attention.")
    try:
        read_until(terminal, "Trying again.")
        os.write(terminal, b"q")
        assert process.wait(30) == 0
    finally:
        ending.__exit__(None, None, None)
