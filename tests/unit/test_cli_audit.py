"""`farm audit` without a farm: misuse, servers that are away, a file of another program."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from farm.local.ports import free_port
from tests.support.cli_runner import farm


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in os.environ:
        if name.startswith("FARM_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("FARM_DATABASE_URL", f"postgresql://farm@127.0.0.1:{free_port()}/farm")
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _seconds: None)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("share", ["-0.1", "1.1", "some"])
def test_a_share_outside_is_misuse(share: str) -> None:
    assert farm("audit", "--sample", share).code == 2


@pytest.mark.parametrize("words", [[], ["--json"], ["--resume", "kept.json"]])
def test_a_database_that_is_away_is_one_line_and_exit_code_5(words: list[str]) -> None:
    outcome = farm("audit", *words)
    assert (outcome.code, outcome.out) == (5, "")
    assert outcome.err == "Error: Postgres does not answer.\n"


@pytest.mark.parametrize("content", ["", "{", '{"place": {"phase": "moon"}}', '{"checked": 3}'])
def test_a_file_that_no_audit_kept_is_refused_and_left(content: str, tmp_path: Path) -> None:
    file = tmp_path / "kept.json"
    file.write_text(content)
    outcome = farm("audit", "--resume", str(file))
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err == (
        f"Error: --resume: {file} is not a progress file of an audit. "
        "Remove it or choose another.\n"
    )
    assert file.read_text() == content


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    outcome = farm("audit", "--resume", str(tmp_path / "missing" / "kept.json"))
    assert outcome.code == 1
    assert "kept.json cannot be written: No such file or directory." in outcome.err


def test_its_exit_codes_stand_in_the_help() -> None:
    text = " ".join(farm("--help").out.split())
    assert "4 a check failed (audit); 5 a server does not answer (audit)" in text
