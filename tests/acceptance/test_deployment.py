"""docs/deployment.md: what runs without a cluster is run, in the page's order."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from farm.config import Settings
from farm.local import embedded_servers, wheels
from farm.pipelines.catalog import Catalog
from tests.helm.charts import CHART, helm
from tests.support.docs_page import Block, blocks

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/deployment.md"
NOT_RUN = ("sh cluster", "sh other")
"""Blocks that need a cluster, or root and programs that are not here."""


@pytest.mark.slow
def test_the_page_runs(tmp_path: Path) -> None:
    [values] = blocks("yaml", PAGE)
    (tmp_path / "values.yaml").write_text(values.text)
    (tmp_path / "helm").symlink_to(ROOT / "helm")
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "helm").symlink_to(Path(sys.prefix) / "helm/helm4")
    postgres = Path(wheels.postgres("pg_dump")).parent
    folders = (programs, postgres, Path(sys.executable).parent, os.environ["PATH"])
    # One shell runs all blocks: a later one uses the variables of an earlier one.
    script = "\n".join(f"echo '## {block}'\n{block.text}" for block in runnable())
    with embedded_servers(tmp_path / "servers") as servers:
        env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("FARM_")},
            **servers.env,
            "PATH": os.pathsep.join(map(str, folders)),
        }
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=200,
        )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert done.stdout.count("\n## ") + 1 == len(runnable())
    assert done.stdout.rstrip().endswith("All checks passed."), done.stdout[-500:]
    assert [each["kind"] for each in yaml.safe_load_all((tmp_path / "farm.yaml").read_text())]


def runnable() -> list[Block]:
    return blocks("sh", PAGE)


def test_most_blocks_are_run() -> None:
    """The rest needs a cluster, a container engine, root, or a program of others."""
    left_out = [block for language in NOT_RUN for block in blocks(language, PAGE)]
    assert len(runnable()) >= 6
    for block in left_out:
        done = subprocess.run(["bash", "-n", "-c", block.text], capture_output=True, text=True)
        assert done.returncode == 0, f"{block}: {done.stderr}"
        needs = ("kubectl", "docker", "systemctl", "aws", "helm install", "helm test")
        assert any(word in block.text for word in needs), block
    total = len(re.findall(r"^```sh", PAGE.read_text(), re.MULTILINE))
    assert total == len(runnable()) + len(left_out)


def test_helm_commands_that_need_a_cluster_are_rendered() -> None:
    """Their values are correct, whatever a cluster would do."""
    done = helm(
        "template", "farm", str(CHART), "--set", "trial.enabled=true", "--set", "image.registry=x"
    )
    assert done.returncode == 0, done.stderr


COMPOSE = ROOT / "helm/compose.yaml"
VARIABLES = {
    "POSTGRES_PASSWORD": "choose-one",
    "S3_SECRET_KEY": "choose-another",
    "FARM_CATALOG": "/etc/farm",
}


@pytest.fixture
def services() -> dict[str, dict[str, object]]:
    """The services of Compose, with variables replaced as Compose does."""

    def value(found: re.Match[str]) -> str:
        return VARIABLES.get(found[1]) or (found[2] or "").partition("-")[2]

    text = re.sub(r"\$\{(\w+)(:[-?][^}]*)?\}", value, COMPOSE.read_text())
    loaded: dict[str, dict[str, object]] = yaml.safe_load(text)["services"]
    return loaded


def test_compose_gives_each_process_settings_that_it_reads(
    services: dict[str, dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    farms = {name: each for name, each in services.items() if "farm-" in str(each["image"])}
    servers = {"migrate", "api", "janitor", "exporter", "courier"}
    assert farms.keys() == {*servers, "worker", "worker-cpu"}
    for name, each in farms.items():
        environment = each["environment"]
        assert isinstance(environment, dict)
        with monkeypatch.context() as patch:
            for variable, value in environment.items():
                patch.setenv(variable, str(value))
            settings = Settings()
        assert settings.database_url.get_secret_value() == (
            "postgresql://farm:choose-one@postgres:5432/farm"
        )
        assert each["read_only"] is True, name
        assert each["cap_drop"] == ["ALL"], name
        if name.startswith("worker"):
            assert each["stop_grace_period"] == f"{settings.grace_seconds + 15:.0f}s"


def test_compose_demands_passwords() -> None:
    text = COMPOSE.read_text()
    for name in VARIABLES:
        assert f"${{{name}:?set it in .env}}" in text
        assert f"${{{name}}}" not in text


UNITS = sorted((ROOT / "helm/systemd").glob("*.service"))


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_units_run_commands_that_exist_as_an_unprivileged_user(unit: Path) -> None:
    lines = dict(
        line.partition("=")[::2] for line in unit.read_text().splitlines() if line[:1].isalpha()
    )
    assert lines["User"] == "farm"
    assert lines["NoNewPrivileges"] == lines["PrivateTmp"] == "true"
    program, *words = lines["ExecStart"].replace("$FARM_WORKER", "sd15 --device 0").split()
    assert program == "/opt/farm/.venv/bin/farm"
    done = subprocess.run(
        [sys.executable, "-m", "farm.cli", *words, "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    if "worker" in unit.stem:
        assert (lines["KillMode"], lines["TimeoutStopSec"]) == ("mixed", "75")


def test_the_values_of_the_page_are_a_catalog_that_the_farm_takes() -> None:
    [block] = blocks("yaml", PAGE)
    pipelines = yaml.safe_load(block.text)["pipelines"]
    Catalog.model_validate(
        {"pipelines": {name: each["catalog"] for name, each in pipelines.items()}}
    )


def test_versions_on_the_page_are_this_one() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert {*re.findall(r"farm-(?:server|worker):(\d[\w.]*)", PAGE.read_text())} == {version}
    assert f"FARM_VERSION:-{version}" in COMPOSE.read_text()
