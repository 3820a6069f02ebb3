"""All commands: they start quickly, and every failure is one line."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from farm.cli.commands import demo_farm
from farm.local.ports import free_port
from tests.support.cli_runner import farm

HEAVY = ("torch", "diffusers", "transformers", "boto3", "celery", "sqlalchemy", "httpx", "PIL")


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Set no farm, and make sure that none is found."""
    for name in os.environ:
        if name.startswith("FARM_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def test_help_loads_nothing_heavy() -> None:
    script = (
        f"import sys; import farm.cli; print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_help_names_every_command_and_the_exit_codes() -> None:
    text = farm("--help").out
    commands = "up demo doctor submit watch get cancel pause resume retry jobs job workers replay"
    assert [name for name in [*commands.split(), "audit"] if f" {name} " not in text] == []
    assert "Exit codes: 0 success" in text


def test_the_version_is_told() -> None:
    assert farm("--version").out.startswith("farm 0.")


@pytest.mark.parametrize(
    "words",
    [
        ["submit"],
        ["submit", "x", "--grid", "steps"],
        ["submit", "x", "--set", "=3"],
        ["submit", "x", "--label", "nothing"],
        ["submit", "x", "--seed", "many"],
        ["jobs", "--limit", "0"],
        ["jobs", "--label", "nothing"],
        ["get", "123456"],
        ["watch"],
        ["nonsense"],
    ],
)
def test_misuse_is_exit_code_2(words: list[str]) -> None:
    outcome = farm(*words)
    assert (outcome.code, outcome.out) == (2, "")
    assert "Usage: farm" in outcome.err


@pytest.mark.parametrize(
    "words",
    [
        ["submit", "x"],
        ["watch", "123456"],
        ["get", "123456", "--dest", "d"],
        ["cancel", "123456"],
        ["jobs"],
        ["job", "123456"],
        ["workers", "--json"],
    ],
)
def test_without_a_key_one_line_says_what_to_set(words: list[str]) -> None:
    outcome = farm(*words)
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err == (
        "Error: No API key is set. Set FARM_DATA, or FARM_API_URL and FARM_API_KEY.\n"
    )


def test_a_folder_beside_is_pointed_out(tmp_path: Path) -> None:
    (tmp_path / "farm-data").mkdir()
    (tmp_path / "farm-data" / "farm.env").touch()
    assert farm("jobs").err.endswith("This folder contains a farm: set FARM_DATA=farm-data.\n")


def test_a_farm_that_is_away_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("FARM_API_URL", url)
    monkeypatch.setenv("FARM_API_KEY", "k")
    outcome = farm("jobs")
    assert outcome.code == 1
    assert outcome.err.startswith(
        f"Error: The farm at {url} does not answer. Is `farm up` running?"
    )
    assert outcome.err.count("\n") == 1


def test_a_bad_setting_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARM_LEASE_SECONDS", "soon")
    outcome = farm("jobs")
    assert outcome.code == 1
    assert outcome.err.startswith("Error: FARM_LEASE_SECONDS: Input should be a valid number")
    assert outcome.err.count("\n") == 1


def test_the_unexpected_is_one_line_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("farm.config.load_settings", broken)
    outcome = farm("jobs")
    assert outcome.code == 1
    assert outcome.err == ("Error: The farm failed unexpectedly: ZeroDivisionError: by zero\n")


def test_a_held_folder_is_noticed(tmp_path: Path) -> None:
    assert not demo_farm.is_held(tmp_path / "nothing")
    lock = tmp_path / "lock"
    lock.touch()
    assert not demo_farm.is_held(tmp_path)
    with lock.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert demo_farm.is_held(tmp_path)
    assert not demo_farm.is_held(tmp_path)


def test_doctor_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv("FARM_DATABASE_URL", f"postgresql://farm@127.0.0.1:{port}/farm")
    monkeypatch.setenv("FARM_REDIS_URL", f"redis://127.0.0.1:{port}/0")
    monkeypatch.setenv("FARM_S3_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("FARM_PIPELINES", "nowhere.toml")
    outcome = farm("doctor", "--json")
    assert outcome.code == 1
    found = {check["name"]: check for check in outcome.json["checks"]}
    outcomes = {name: check["ok"] for name, check in found.items()}
    assert outcomes == {
        "settings": True,
        "postgres": False,
        "schema": None,
        "clock": None,
        "redis": False,
        "s3": False,
        "api": False,
        "janitor": None,
        "courier": None,
        "torch": True,
        "catalog": False,
    }
    assert all(check["remedy"] for check in found.values() if check["ok"] is False)
    assert "nowhere.toml cannot be read" in found["catalog"]["detail"]
