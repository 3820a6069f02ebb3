"""A dataset is created while every process that creates it is killed."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.farms import LiveFarm
from tests.support.cli_runner import farm
from tests.support.waiting import wait_until

KILLED_FRAMES = 1_000


@pytest.mark.full_size
def test_whatever_is_killed_the_dataset_holds_each_key_once(
    disturbed: LiveFarm, tmp_path: Path
) -> None:
    """Submitter, API, exporter and worker are each killed by SIGKILL at a random moment."""
    frames = int(os.environ.get("FARM_TEST_KILLED_FRAMES", KILLED_FRAMES))
    drawn = random.Random(11)
    path = tmp_path / "prompts.jsonl"
    with path.open("w") as file:
        for number in range(frames):
            file.write(json.dumps({"prompt": f"noise {number}", "key": f"k{number}"}) + "\n")
    env = {"FARM_DATA": str(disturbed.farm.data)}
    words = ["submit", "--from", str(path), "--pipeline", "null", "--steps", "1", "--json"]
    words += ["--set", "width=16", "--set", "height=16", "--set", "step_seconds=0.01"]
    submitter = start(words, env)
    kill_at(submitter, drawn.uniform(0.3, 1.5))
    job_id = finished(words, env)["id"]
    assert finished(words, env)["id"] == job_id

    names = ["api", "exporter", "worker null-1"]
    over = threading.Event()
    killed: list[str] = []

    def kill() -> None:
        for name in itertools.cycle(drawn.sample(names, len(names))):
            if over.wait(drawn.uniform(1.0, 3.0)):
                return
            pid = disturbed.farm.children[name].pid
            if pid:
                os.kill(pid, signal.SIGKILL)
                killed.append(name)

    killer = threading.Thread(target=kill)
    killer.start()
    dest = tmp_path / "set"
    export = ["export", job_id, "--to", "webdataset", "--dest", str(dest), "--json"]
    export += ["--shard-frames", str(frames // 10)]
    try:
        for _ in range(3):
            exporter = start(export, env)
            kill_at(exporter, drawn.uniform(0.5, 4.0))
        wait_until(lambda: {*killed} == {*names}, 300, "all were killed")
    finally:
        over.set()
        killer.join()
    told = finished(export, env)
    assert (told["images"], told["missing"]) == (frames, 0)
    keys: list[str] = []
    for shard in sorted(dest.glob("data/*.tar")):
        with tarfile.open(shard) as tar:
            keys += [
                json.load(member)["key"]
                for name in tar.getnames()
                if name.endswith(".json") and (member := tar.extractfile(name)) is not None
            ]
    assert sorted(keys) == sorted(f"k{number}" for number in range(frames))
    audit = farm("audit", "--json", env=env)
    assert audit.code == 0, audit.out


def kill_at(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Kill a process after this many seconds, unless it has ended by itself."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    process.kill()
    process.wait()


def start(words: list[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FARM_")}
    return subprocess.Popen(
        [sys.executable, "-m", "farm.cli", *words],
        env={**inherited, **env},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def finished(words: list[str], env: dict[str, str]) -> Any:
    """Run a command until it succeeds, because the API may be away."""
    last = ""

    def done() -> Any:
        nonlocal last
        outcome = farm(*words, env=env)
        last = outcome.err
        return outcome.json if outcome.code == 0 else None

    found = wait_until(done, 300, "the command succeeded")
    assert found is not None, last
    return found
