"""Install, upgrade, a failing migration and a rollback, by real helm against a fake API."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from psycopg import connect
from psycopg.errors import DuplicateObject
from sqlalchemy import make_url

from farm.local import Servers
from tests.helm.charts import CHART, HELMS
from tests.helm.fake_api import FakeCluster, serving
from tests.support.databases import Databases

JOB = "farm-migrate"

pytestmark = pytest.mark.slow


@dataclass
class Release:
    """A release of the chart on a fake cluster."""

    cluster: FakeCluster
    version: str
    env: dict[str, str]

    def helm(self, *words: str, check: bool = True) -> str:
        """Run helm. Return what it wrote to standard error."""
        done = subprocess.run(
            [Path(sys.prefix) / "helm" / self.version, *words],
            env=self.env,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert not check or done.returncode == 0, done.stderr
        assert check or done.returncode != 0
        return done.stderr

    def install(self) -> None:
        self.helm("install", "farm", str(CHART), *VALUES, *self.waits())

    def upgrade(self, *words: str, check: bool = True) -> str:
        return self.helm("upgrade", "farm", str(CHART), *VALUES, *self.waits(), *words, check=check)

    def waits(self) -> tuple[str, ...]:
        """Wait for the objects too. helm 3 would ask for ReplicaSets, which nobody makes here."""
        return ("--timeout=20s", *(("--wait",) if self.version == "helm4" else ()))

    def writes(self) -> list[str]:
        """Take the writes since the last call, without the words for created or changed."""
        log, self.cluster.log = self.cluster.log, []
        return log

    def image(self) -> str:
        api = self.cluster.objects["apps/v1", "deployments", "farm-api"]
        return str(api["spec"]["template"]["spec"]["containers"][0]["image"])


VALUES = (
    f"--values={CHART}/ci/minimal.yaml",
    "--set=pipelines.sd15.worker.weights.mode=download",
    "--set=pipelines.sd15.worker.weights.claim=hub",
)


@pytest.fixture(params=HELMS)
def release(
    request: pytest.FixtureRequest, servers: Servers, databases: Databases, tmp_path: Path
) -> Iterator[Release]:
    """helm keeps its records in Postgres here: in Secrets it would send protobuf."""
    cluster = FakeCluster()
    with serving(cluster) as url, databases.copy() as database:
        config = tmp_path / "config"
        context = {"name": "fake", "context": {"cluster": "fake", "user": "fake"}}
        config.write_text(
            yaml.safe_dump(
                {
                    "clusters": [{"name": "fake", "cluster": {"server": url}}],
                    "users": [{"name": "fake", "user": {}}],
                    "contexts": [context],
                    "current-context": "fake",
                }
            )
        )
        with suppress(DuplicateObject), connect(databases.url(database), autocommit=True) as own:
            own.execute(
                "SET scram_iterations = 4096"
            )  # helm's driver refuses the tests' single one
            own.execute("CREATE ROLE helm SUPERUSER LOGIN PASSWORD 'helm'")
        records = make_url(databases.url(database)).set(username="helm", password="helm")
        address = records.render_as_string(hide_password=False)
        env = {
            **os.environ,
            "HOME": str(tmp_path),
            "KUBECONFIG": str(config),
            "HELM_DRIVER": "sql",
            "HELM_DRIVER_SQL_CONNECTION_STRING": f"{address}?sslmode=disable",
        }
        yield Release(cluster, request.param, env)


def test_an_install_migrates_before_anything_else(release: Release) -> None:
    release.install()
    writes = release.writes()
    kinds = [write.split()[1] for write in writes]
    assert writes[0].split()[1:] == ["Job", JOB]
    assert {"Deployment", "Service", "ConfigMap", "ServiceAccount", "PodDisruptionBudget"} <= {
        *kinds
    }
    assert ("batch/v1", "jobs", JOB) not in release.cluster.objects, "it is deleted when it is done"
    assert {name for _, word, name in release.cluster.objects if word == "deployments"} == {
        "farm-api",
        "farm-janitor",
        "farm-exporter",
        "farm-courier",
        "farm-worker-sd15",
    }


def test_an_upgrade_migrates_before_it_replaces_anything(release: Release) -> None:
    release.install()
    release.writes()
    release.upgrade("--set", "image.tag=0.2.0")
    kinds = [write.split()[1] for write in release.writes()]
    assert kinds.index("Job") < kinds.index("Deployment")
    assert release.image() == "farm-server:0.2.0"


def test_a_migration_that_fails_stops_the_upgrade_before_any_pod_changes(release: Release) -> None:
    release.install()
    release.writes()
    release.cluster.failing.add(JOB)
    told = release.upgrade("--set", "image.tag=0.2.0", check=False)
    assert "pre-upgrade hooks failed" in told
    kinds = {write.split()[1] for write in release.writes()}
    assert kinds == {"Job"}
    assert release.image() == "farm-server:0.1.0"
    assert ("batch/v1", "jobs", JOB) in release.cluster.objects, "its log says why"


def test_a_failed_migration_is_repaired_by_the_next_upgrade(release: Release) -> None:
    release.install()
    release.cluster.failing.add(JOB)
    release.upgrade("--set", "image.tag=0.2.0", check=False)
    release.cluster.failing.clear()
    release.upgrade("--set", "image.tag=0.2.0")
    assert release.image() == "farm-server:0.2.0"


def test_a_rollback_replaces_processes_and_leaves_the_database_alone(release: Release) -> None:
    release.install()
    release.upgrade("--set", "image.tag=0.2.0")
    release.writes()
    release.helm("rollback", "farm", "1", *release.waits())
    writes = release.writes()
    assert "Deployment" in {write.split()[1] for write in writes}
    assert not any(JOB in write for write in writes)
    assert release.image() == "farm-server:0.1.0"


def test_post_steps_run_after_everything_else_if_they_are_asked_for(release: Release) -> None:
    release.install()
    release.writes()
    release.upgrade("--set", "image.tag=0.2.0", "--set", "migrate.post=true")
    writes = release.writes()
    [last] = [
        at
        for at, write in enumerate(writes)
        if write.endswith(f"Job {JOB}-post") and "DELETE" not in write
    ]
    deployments = [at for at, write in enumerate(writes) if " Deployment " in write]
    assert max(deployments) < last


def test_an_uninstall_leaves_nothing(release: Release) -> None:
    release.install()
    release.helm("uninstall", "farm")
    assert release.cluster.objects == {}


def test_what_cannot_be_changed_is_seen(release: Release) -> None:
    """So the fake refuses what a cluster refuses, and the upgrades above did not try it."""
    job = {"kind": "Job", "spec": {"template": {"spec": POD}}}
    release.cluster.write("POST", "batch/v1", "jobs", "x", job)
    other = {"spec": {"template": {"spec": {"containers": [{"name": "x", "image": "y:2"}]}}}}
    with pytest.raises(ValueError, match="immutable"):
        release.cluster.write("PATCH", "batch/v1", "jobs", "x", other)


POD = {"restartPolicy": "Never", "containers": [{"name": "x", "image": "y:1"}]}


def test_the_server_refuses_what_has_a_wrong_form(release: Release) -> None:
    """So the fake looks at what it is sent."""
    told = release.helm(
        "install", "farm", str(CHART), *VALUES,
        "--set-json", 'podDefaults.tolerations=[{"tolerationSeconds": "long"}]', check=False,
    )  # fmt: skip
    assert "tolerationSeconds" in told or "long" in told
