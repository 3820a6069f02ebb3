"""docs/datasets.md and docs/tables.md, run block by block: from a file to `load_dataset`."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from farm.pipelines.runtime.devices import torch_threads
from tests.acceptance.farms import LiveFarm
from tests.support.cli_runner import farm
from tests.support.docs_page import PAGE
from tests.support.png_text import parsed

DATASETS = PAGE.with_name("datasets.md")
REPLAYED = 2
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def page(live: LiveFarm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run every block of docs/datasets.md in an empty folder. Return the folder."""
    return run_blocks(DATASETS, live, tmp_path_factory.mktemp("datasets"))


def run_blocks(page: Path, live: LiveFarm, folder: Path) -> Path:
    env = {
        **os.environ,
        "FARM_DATA": str(live.farm.data),
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    for language, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        argv = [sys.executable, "-c", text] if language == "python" else ["bash", "-ec", text]
        done = subprocess.run(
            argv, cwd=folder, env=env, capture_output=True, text=True, timeout=580
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
    import pandas

    keys = pandas.read_parquet(page / "shapes" / "data" / "00000.parquet")["key"]
    assert sorted(keys) == sorted(4 * [f"shape-{number}" for number in range(6)])


def test_a_table_becomes_a_dataset(live: LiveFarm, tmp_path: Path) -> None:
    folder = run_blocks(DATASETS.with_name("tables.md"), live, tmp_path)
    import pandas

    [shard] = (folder / "dataset" / "data").glob("*.parquet")
    rows = pandas.read_parquet(shard)
    assert [*rows["width"]] == [64, 64, 96, 64, 64, 64, 64, 64, 96, 64, 64, 64]
    assert [json.loads(labels)["set"] for labels in rows["labels"]] == ["train"] * 8 + ["test"] * 4


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
    with torch_threads(1):  # each replay sets its picture's number of threads
        for name in random.Random(5).sample(pngs, rows):
            replayed = farm("replay", str(page / "out" / name), "--json")
            assert replayed.code == 0, replayed.err
            assert replayed.json["identical"] is True
