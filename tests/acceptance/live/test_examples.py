"""The six examples, run by the commands of their page in an empty folder on a running farm."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from html import unescape
from pathlib import Path

import httpx
import pandas
import pytest
from PIL import Image

from farm.local.ports import free_port
from tests.acceptance.farms import LiveFarm
from tests.support.cli_runner import inherited
from tests.support.waiting import wait_until

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
            timeout=580,
            check=False,
        )
        assert ended.returncode == code, ended.stderr
        return ended.stdout

    return command


def test_a_backend_hears_and_shows_the_pictures(live: LiveFarm) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    words = ("-m", "uvicorn", "--app-dir", str(EXAMPLES), "backend:app", "--port", str(port))
    known = {
        "FARM_API_URL": live.farm.url,
        "FARM_API_KEY": live.farm.api_key,
        "BACKEND_URL": url,
    }
    process = subprocess.Popen([sys.executable, *words], env=inherited() | known)
    try:
        wait_until(lambda: answers(url), 30, "the backend serves")
        taken = [httpx.post(f"{url}/orders/1001", content="a red star") for _ in range(2)]
        assert [answer.status_code for answer in taken] == [202, 202]
        assert taken[0].json() == taken[1].json(), "the same order is the same job"
        page = wait_until(lambda: shown(url), 60, "the backend has heard of the end")
        addresses = re.findall(r'src="([^"]+)"', page)
        assert len(addresses) == 2
        for address in addresses:
            with Image.open(io.BytesIO(httpx.get(unescape(address)).content)) as image:
                assert "farm" not in image.info, "customers see no prompt"
        changed = httpx.post(f"{url}/orders/1001", content="another prompt for the same order")
        assert changed.status_code == 422
        assert "order-1001" in changed.text
        unsigned = httpx.post(f"{url}/hooks/farm", json={"type": "job.succeeded"})
        assert unsigned.status_code == 401
    finally:
        process.terminate()
        process.wait(20)


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/orders/none").status_code == 202
    except httpx.TransportError:
        return False


def shown(url: str) -> str:
    page = httpx.get(f"{url}/orders/1001")
    return page.text if page.status_code == 200 else ""


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


def test_a_table_becomes_a_dataset(run: Run, tmp_path: Path) -> None:
    listed = run(str(EXAMPLES / "table.sh"), "table").splitlines()
    assert len([name for name in listed if name.endswith(".png")]) == 5
    rows = pandas.read_parquet(tmp_path / "table/data/00000/metadata.parquet")
    assert [*rows["step"]] == [10, 25, 25, 25, 25]
    assert [*rows["width"]] == [64, 64, 96, 64, 64]


def test_an_image_is_rendered_again(run: Run) -> None:
    assert "identical" in run(str(EXAMPLES / "replay.sh"))


def test_lanes_show_waiting_work_and_workers(run: Run) -> None:
    lines = run(sys.executable, str(EXAMPLES / "lanes.py")).splitlines()
    assert any(line.split()[0] == "demo" and line.split()[-2] == "1" for line in lines)


def test_the_page_lists_them_all() -> None:
    page = (EXAMPLES / "README.md").read_text()
    files = [path.name for path in EXAMPLES.iterdir() if path.suffix in {".py", ".sh"}]
    assert len(files) == 6
    assert [name for name in files if f"]({name})" not in page] == []
