"""A user without a name, a home and variables, as OpenShift gives to a container."""

from __future__ import annotations

import signal
import subprocess
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path

import pytest

from farm.config import Settings
from farm.context import Farm
from farm.pipelines.families.null import write_checkpoint
from tests.integration.test_migrations import env_of
from tests.support.checkpoints import save
from tests.support.store import job_row, submit
from tests.support.waiting import wait_until

NAMELESS = ["unshare", "--user", "--map-user=12345", "--map-group=12345"]


def is_possible() -> bool:
    try:
        return subprocess.run([*NAMELESS, "true"], check=False, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


pytestmark = pytest.mark.skipif(
    not is_possible(), reason="this user may not create a user namespace"
)


@pytest.fixture
def settings(settings: Settings, tmp_path: Path) -> Settings:
    write_checkpoint(tmp_path / "null")
    save("stable_diffusion", tmp_path / "stable_diffusion")
    catalog = tmp_path / "pipelines.toml"
    catalog.write_text(
        '[pipelines.null]\nsource = "null"\n[pipelines.sd]\nsource = "stable_diffusion"\n'
    )
    return settings.model_copy(update={"pipelines": catalog})


def command(*words: str) -> list[str]:
    return [*NAMELESS, sys.executable, *words]


def variables(settings: Settings, folder: Path) -> Mapping[str, str]:
    """Return the whole environment: no HOME, no USER, and not even a PATH."""
    (folder / "tmp").mkdir()
    return env_of(settings) | {
        "FARM_REDIS_URL": settings.redis_url.get_secret_value(),
        "FARM_PIPELINES": str(settings.pipelines),
        "FARM_ENVIRONMENT": "development",
        "FARM_DISCARD_IMAGES": "true",
        "TMPDIR": str(folder / "tmp"),
        "OMP_NUM_THREADS": "1",
    }


def test_the_user_has_neither_a_name_nor_a_home() -> None:
    """Otherwise the tests below would prove nothing."""
    script = "import os, pwd; print(os.getuid()); pwd.getpwuid(os.getuid())"
    ended = subprocess.run(
        command("-c", script), env={}, capture_output=True, text=True, check=False
    )
    assert ended.stdout == "12345\n"
    assert "uid not found: 12345" in ended.stderr


def test_a_worker_renders(farm: Farm, tenant: uuid.UUID, tmp_path: Path) -> None:
    job_id = submit(farm, tenant, pipeline="null", steps=2)
    env = variables(farm.settings, tmp_path)
    process = subprocess.Popen(command("-m", "farm.cli", "worker", "null"), env=env)
    try:
        wait_until(lambda: job_row(farm, tenant, job_id).status == "succeeded", 60, "it renders")
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


LOAD = """
from farm.config import Settings
from farm.pipelines.catalog import load_catalog
from farm.pipelines.disk_cache import configure
from farm.pipelines.resolve import resolve_pipeline
import torch

settings = Settings()
configure(settings.cache_dir)
resolved = resolve_pipeline("sd", load_catalog(settings.pipelines).pipelines["sd"])
print(resolved.family.load(resolved.pipeline).device)
print(torch.compile(lambda x: torch.sin(x) + 1)(torch.zeros(2)).tolist())
"""


@pytest.mark.slow
def test_torch_loads_and_compiles(settings: Settings, tmp_path: Path) -> None:
    """Inductor asks for the user's name, unless it is told where its cache is."""
    env = {**variables(settings, tmp_path), "PATH": "/usr/bin:/bin"}  # inductor calls a compiler
    ended = subprocess.run(
        command("-c", LOAD), env=env, capture_output=True, text=True, timeout=580, check=False
    )
    assert ended.stdout.splitlines()[-2:] == ["cpu", "[1.0, 1.0]"], ended.stderr
