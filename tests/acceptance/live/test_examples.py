"""The five examples, run by the commands of their page in an empty folder on a running farm."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tests.acceptance.farms import LiveFarm
from tests.support.cli_runner import inherited

EXAMPLES = Path(__file__).parents[3] / "examples"

Run = Callable[..., str]


@pytest.fixture
def run(live: LiveFarm, tmp_path: Path) -> Run:
    def command(*words: str, code: int = 0) -> str:
        ended = subprocess.run(
            words,
            env=inherited()
            | {
                "FARM_API_URL": live.farm.url,
                "FARM_API_KEY": live.farm.api_key,
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            },
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert ended.returncode == code, ended.stderr
        return ended.stdout

    return command


def test_a_backend_submits_once_and_downloads(run: Run, tmp_path: Path) -> None:
    words = (sys.executable, str(EXAMPLES / "backend.py"), "1001", "a red star")
    first, second = run(*words), run(*words)
    assert first == second, "the same request is the same job"
    images = sorted(tmp_path.glob("*.png"))
    said = first.split()
    addresses = [word for word in said if "/p/" in word]
    assert [path.name for path in images] == [word for word in said if word.endswith(".png")][::2]
    for path, address in zip(images, addresses, strict=True):
        assert httpx.get(address).content == path.read_bytes()
    with Image.open(images[0]) as image:
        assert image.info["farm"]
    refused = run(*words[:3], "another prompt for the same order", code=1)
    assert refused == "", "an order that changed is no second job"


def test_a_grid_is_one_contact_sheet(run: Run, tmp_path: Path) -> None:
    assert "2 x 3 images" in run(sys.executable, str(EXAMPLES / "grid.py"), "grid.png")
    with Image.open(tmp_path / "grid.png") as file:
        sheet = file.copy()
    width, height = sheet.width // 3, sheet.height // 2
    cells = {
        sheet.crop((x * width, y * height, (x + 1) * width, (y + 1) * height)).tobytes()
        for x in range(3)
        for y in range(2)
    }
    assert len(cells) == 6


def test_prompts_become_a_dataset(run: Run, tmp_path: Path) -> None:
    listed = run(str(EXAMPLES / "dataset.sh"), "shapes").splitlines()
    assert len([name for name in listed if name.endswith(".png")]) == 6
    assert (tmp_path / "shapes/README.md").is_file()
    assert run(str(EXAMPLES / "dataset.sh"), "shapes").splitlines() == listed, "run again"


def test_an_image_is_rendered_again(run: Run) -> None:
    assert "identical" in run(str(EXAMPLES / "replay.sh"))


def test_lanes_show_waiting_work_and_workers(run: Run) -> None:
    lines = run(sys.executable, str(EXAMPLES / "lanes.py")).splitlines()
    assert any(line.split()[0] == "demo" and line.split()[-2] == "1" for line in lines)


def test_the_page_lists_them_all() -> None:
    page = (EXAMPLES / "README.md").read_text()
    files = [path.name for path in EXAMPLES.iterdir() if path.suffix in {".py", ".sh"}]
    assert len(files) == 5
    assert [name for name in files if f"]({name})" not in page] == []
