"""Signs of life: the files `beat` and `ready` in FARM_RUN_DIR."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from farm.config import Settings
from farm.errors import FarmError
from farm.local.commands import environment
from farm.local.folder import Folder, Passwords
from farm.process import beat, set_ready, signs_of_life
from tests.integration.test_migrations import env_of
from tests.support.cli_runner import inherited
from tests.support.waiting import wait_until


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_files_of_an_earlier_process_are_removed_and_the_own_ones_at_the_end(
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run/worker"
    run_dir.mkdir(parents=True)
    (run_dir / "ready").touch()
    with signs_of_life(run_dir):
        assert files(run_dir) == {"beat"}
        set_ready(run_dir, ready=True)
        assert files(run_dir) == {"beat", "ready"}
        set_ready(run_dir, ready=False)
        set_ready(run_dir, ready=False)
        assert files(run_dir) == {"beat"}
    assert files(run_dir) == set()


def test_each_beat_has_the_time_of_now(tmp_path: Path) -> None:
    with signs_of_life(tmp_path):
        os.utime(tmp_path / "beat", (1, 1))
        beat(tmp_path)
        assert (tmp_path / "beat").stat().st_mtime > 1


def test_without_a_folder_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with signs_of_life(None):
        beat(None)
        set_ready(None, ready=True)
    assert files(tmp_path) == set()


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = r"^FARM_RUN_DIR: .*/file/run cannot be used: Not a directory\.$"
    with pytest.raises(FarmError, match=message), signs_of_life(tmp_path / "file/run"):
        pass


def test_a_file_that_cannot_be_written_later_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with signs_of_life(tmp_path / "run"):
        (tmp_path / "run/beat").unlink()
        (tmp_path / "run").rmdir()
        beat(tmp_path / "run")
    assert "cannot be changed: No such file" in caplog.text


def test_processes_of_farm_up_do_not_share_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FARM_RUN_DIR", str(tmp_path))
    folder = Folder(tmp_path, Passwords("", "", "", ""))
    assert "FARM_RUN_DIR" not in environment(folder, {})


@pytest.mark.parametrize("command", ["janitor", "exporter"])
def test_a_process_shows_them_while_it_runs(
    settings: Settings, tmp_path: Path, command: str
) -> None:
    """A worker does too: tests/integration/test_child.py."""
    env = inherited() | env_of(settings) | {"FARM_RUN_DIR": str(tmp_path / "run")}
    with subprocess.Popen([sys.executable, "-m", "farm.cli", command], env=env) as process:
        wait_until((tmp_path / "run/ready").exists, 60, "it is ready")
        (tmp_path / "run/beat").unlink()
        wait_until((tmp_path / "run/beat").exists, 30, "it beats")
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert files(tmp_path / "run") == set()
