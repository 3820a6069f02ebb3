"""A caller with `pip install farm` alone: submits, downloads, exports; no torch, no driver."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow
from PIL import Image, ImageDraw
from pyarrow import parquet

from tests.acceptance.farms import LiveFarm
from tests.support.cli_runner import Outcome, inherited

ROOT = Path(__file__).parents[3]


def caller(live: LiveFarm, folder: Path, extras: str, *words: str) -> Outcome:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.support.distributions", extras, *words],
        env=inherited()
        | {
            "FARM_API_URL": live.farm.url,
            "FARM_API_KEY": live.farm.api_key,
            "PYTHONPATH": str(ROOT),
        },
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    return Outcome(ended.returncode, ended.stdout, ended.stderr)


def test_a_caller_needs_no_other_package(live: LiveFarm, tmp_path: Path) -> None:
    picture = Image.new("RGB", (64, 64))
    ImageDraw.Draw(picture).ellipse((8, 8, 56, 56), fill="white")
    picture.save(tmp_path / "edges.png")
    (tmp_path / "prompts.csv").write_text("prompt,key\na red star,one\na blue star,two\n")

    def run(*words: str) -> Outcome:
        return caller(live, tmp_path, "none", *words)

    submitted = run("submit", "--from", "prompts.csv", "--steps", "3", "--watch", "--json")
    assert submitted.code == 0, submitted.err
    job = submitted.json
    assert job["status"] == "succeeded"
    assert run("get", job["id"], "--dest", "pictures").code == 0
    assert len([*(tmp_path / "pictures").glob("*.png")]) == 2
    exported = run("export", job["id"], "--to", "webdataset", "--dest", "shapes")
    assert exported.code == 0, exported.err
    assert run("images", "edges.png", "--json").code == 0
    for words in (["jobs"], ["job", job["id"]], ["workers"]):
        assert run(*words).code == 0


def test_parquet_needs_the_extra_files(live: LiveFarm, tmp_path: Path) -> None:
    table = pyarrow.table({"prompt": ["a red star"]})
    parquet.write_table(table, tmp_path / "prompts.parquet")
    words = ("submit", "--from", "prompts.parquet", "--dry-run", "--json")
    refused = caller(live, tmp_path, "none", *words)
    assert (refused.code, refused.err) == (
        1,
        "Error: `farm submit` needs the package pyarrow, which is not installed. "
        "Run: pip install 'farm[files]'\n",
    )
    quoted = caller(live, tmp_path, "files", *words)
    assert quoted.code == 0, quoted.err
    assert json.loads(quoted.out)["frames"] == 1
