"""Each extra brings what its commands need, and a caller needs neither torch nor a driver."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import httpx
import pytest

from farm.config import Settings
from farm.local.ports import free_port
from tests.support.cli_runner import inherited
from tests.support.distributions import Absent, closure, requirements
from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]


def run(extras: str, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.support.distributions", extras, *words],
        env=inherited() | env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_caller_needs_few_packages() -> None:
    callers = closure(requirements([]))
    assert {"httpx", "typer"} <= callers
    assert callers.isdisjoint({"torch", "diffusers", "psycopg", "sqlalchemy", "boto3", "celery"})
    assert closure(requirements(["server"])).isdisjoint({"torch", "transformers", "compel"})
    local = closure(requirements(["local"]))
    for extra in ("files", "server", "worker"):
        assert closure(requirements([extra])) <= local


def test_the_check_hides_modules() -> None:
    absent = Absent([]).modules
    assert {"torch", "sqlalchemy", "PIL", "numpy"} <= absent
    assert absent.isdisjoint({"httpx", "rich", "farm"})


@pytest.mark.parametrize(
    ("extras", "command", "package", "wanted"),
    [
        ("none", ["api"], "uvicorn", "server"),
        ("none", ["migrate"], "psycopg", "server"),
        ("none", ["keys", "list"], "sqlalchemy", "server"),
        ("server", ["calibrate", "demo"], "tomlkit", "worker"),
    ],
)
def test_a_missing_package_is_one_line_that_says_what_to_install(
    extras: str, command: list[str], package: str, wanted: str
) -> None:
    ended = run(extras, *command)
    assert ended.returncode == 1
    assert ended.stderr == (
        f"Error: `farm {command[0]}` needs the package {package}, which is not installed. "
        f"Run: pip install 'farm[{wanted}]'\n"
    )


def test_the_api_serves_without_torch(settings: Settings, farm: object, tmp_path: Path) -> None:
    """It describes pipelines, checks a job and stores it."""
    port = free_port()
    env = {
        "FARM_DATABASE_URL": settings.database_url.get_secret_value(),
        "FARM_REDIS_URL": settings.redis_url.get_secret_value(),
        "FARM_S3_ENDPOINT_URL": settings.s3_endpoint_url or "",
        "FARM_S3_BUCKET": settings.s3_bucket,
    }
    made = run("server", "keys", "create", "--role", "client", "--json", **env)
    key = json.loads(made.stdout)["key"]
    api = subprocess.Popen(
        [sys.executable, "-m", "tests.support.distributions", "server", "api", "--port", str(port)],
        env=inherited() | env,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        address = f"http://127.0.0.1:{port}"

        def serves() -> bool:
            try:
                return httpx.get(f"{address}/healthz").is_success
            except httpx.TransportError:
                return False

        wait_until(serves, 60, "the API serves")
        with httpx.Client(base_url=address, headers={"Authorization": f"Bearer {key}"}) as client:
            [demo] = client.get("/v1/pipelines").raise_for_status().json()["data"]
            assert demo["family"] == "stable_diffusion"
            job = client.post("/v1/jobs", json={"pipeline": "demo", "prompts": ["a red star"]})
            assert job.status_code == 202, job.text
    finally:
        api.terminate()
        _, log = api.communicate(timeout=30)
    assert "Traceback" not in log


@pytest.mark.slow
def test_an_empty_environment_has_the_callers_commands(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv/bin/python")
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    # From a copy: setuptools leaves a folder `build` in the tree, and takes modules from it later.
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        copy = tmp_path / "farm" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy)
    subprocess.run([*pip, str(tmp_path / "farm"), "-c", str(ROOT / "constraints.txt")], check=True)
    site = next((tmp_path / "venv").rglob("site-packages"))
    installed = {re.split(r"-\d", path.stem)[0] for path in site.glob("*.dist-info")}
    assert len(installed) < 40
    assert installed.isdisjoint({"torch", "diffusers", "psycopg", "boto3"})
    assert not (site / "farm/demo/training").exists()
    farm = str(tmp_path / "venv/bin/farm")
    for words in (["--help"], ["submit", "--help"], ["jobs", "--help"], ["export", "--help"]):
        assert subprocess.run([farm, *words], check=True, capture_output=True).stdout
    refused = subprocess.run([farm, "up"], check=False, capture_output=True, text=True, cwd=site)
    assert refused.returncode == 1
    assert "pip install 'farm[local]'" in refused.stderr
