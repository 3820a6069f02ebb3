"""docs/datasets.md, run block by block: from a Parquet of prompts to `load_dataset`."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas
import pytest
from PIL import Image

from tests.acceptance.conftest import Live, null_catalog, running
from tests.commanding import farm, farm_process
from tests.documented import PAGE
from tests.parsing import parsed
from tests.rendering import torch_threads
from tests.waiting import wait_until

DATASETS = PAGE.with_name("datasets.md")
REPLAYED = 5
KILLED_FRAMES = 2_000
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def page(live: Live, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run every block in an empty folder; gives the folder."""
    folder = tmp_path_factory.mktemp("datasets")
    env = {
        **os.environ,
        "FARM_DATA": str(live.farm.data),
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    for language, text in BLOCK.findall(DATASETS.read_text(encoding="utf-8")):
        argv = [sys.executable, "-c", text] if language == "python" else ["bash", "-ec", text]
        done = subprocess.run(
            argv, cwd=folder, env=env, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    return folder


def test_the_page_runs(page: Path) -> None:
    assert sorted(path.name for path in (page / "shapes").iterdir() if path.name[0] != ".") == [
        "README.md",
        "croissant.json",
        "data",
        "manifest.json",
        "missing.jsonl",
    ]
    keys = pandas.read_parquet(page / "shapes" / "data" / "00000.parquet")["key"]
    assert sorted(keys) == sorted(4 * [f"shape-{number}" for number in range(6)])


@pytest.mark.full_size
def test_every_picture_says_how_it_was_rendered(page: Path) -> None:
    with tarfile.open(page / "shapes" / "data" / "00000.tar") as tar:
        pngs = [name for name in tar.getnames() if name.endswith(".png")]
        tar.extractall(page / "out", filter="data")
    assert len(pngs) == 24
    for name in pngs:
        row = json.loads((page / "out" / name).with_suffix(".json").read_text())
        assert row["sha256"] == hashlib.sha256((page / "out" / name).read_bytes()).hexdigest()
        told = parsed(str(page / "out" / name))
        assert [prompt.value for prompt in told.prompts] == [row["prompt"]]
        with Image.open(page / "out" / name) as picture:
            assert f"Seed: {row['seed']}" in picture.info["parameters"]
    rows = int(os.environ.get("FARM_TEST_REPLAYED_ROWS", REPLAYED))
    with torch_threads(1):  # each replay sets what its picture was rendered with
        for name in random.Random(5).sample(pngs, rows):
            replayed = farm("replay", str(page / "out" / name), "--json")
            assert replayed.code == 0, replayed.err
            assert replayed.json["identical"] is True


@pytest.fixture
def killable(tmp_path: Path) -> Iterator[Live]:
    """A farm of its own, with null renders: its processes are killed."""
    with running(tmp_path / "data", "null", null_catalog(tmp_path)) as farm:
        yield farm


@pytest.mark.full_size
def test_whatever_is_killed_the_dataset_holds_each_key_once(killable: Live, tmp_path: Path) -> None:
    """Submitter, API, exporter and worker, each by SIGKILL at a random moment."""
    frames = int(os.environ.get("FARM_TEST_KILLED_FRAMES", KILLED_FRAMES))
    drawn = random.Random(11)
    path = tmp_path / "prompts.jsonl"
    with path.open("w") as file:
        for number in range(frames):
            file.write(json.dumps({"prompt": f"noise {number}", "key": f"k{number}"}) + "\n")
    env = {"FARM_DATA": str(killable.farm.data)}
    words = ["submit", "--from", str(path), "--pipeline", "null", "--steps", "1", "--json"]
    words += ["--set", "width=16", "--set", "height=16", "--set", "step_seconds=0.01"]
    submitter = start(words, env)
    kill_at(submitter, drawn.uniform(0.3, 1.5))
    job_id = finished(words, env)["id"]
    assert finished(words, env)["id"] == job_id

    names = ["api", "chores", "worker null-1"]
    over = threading.Event()
    killed: list[str] = []

    def kill() -> None:
        for name in itertools.cycle(drawn.sample(names, len(names))):
            if over.wait(drawn.uniform(1.0, 3.0)):
                return
            pid = killable.farm.children[name].pid
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
    assert (told["pictures"], told["missing"]) == (frames, 0)
    keys: list[str] = []
    for shard in sorted(dest.glob("data/*.tar")):
        with tarfile.open(shard) as tar:
            keys += [
                json.load(member)["key"]
                for name in tar.getnames()
                if name.endswith(".json") and (member := tar.extractfile(name)) is not None
            ]
    assert sorted(keys) == sorted(f"k{number}" for number in range(frames))
    audit = farm_process("audit", "--json", env=env)
    assert audit.code == 0, audit.out


def kill_at(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Kill a process after so long, unless it has ended by itself."""
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
    """Run a command until it succeeds: the API may be away when it asks."""
    last = ""

    def done() -> Any:
        nonlocal last
        outcome = farm_process(*words, env=env)
        last = outcome.err
        return outcome.json if outcome.code == 0 else None

    found = wait_until(done, 300, "the command succeeded")
    assert found is not None, last
    return found
