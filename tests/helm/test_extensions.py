"""Objects of KEDA, the Prometheus operator and the Gateway API have the form of their schemas."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helm.charts import CASES, HELMS, Object, objects
from tests.helm.test_chart import EXTENSIONS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed"),
]
# Pinned: without a version, npm takes old ones that fit the machine's Node.
PACKAGES = (
    "@kubernetes-models/keda@2.0.0",
    "@kubernetes-models/prometheus-operator@6.0.0",
    "@kubernetes-models/gateway-api@2.0.0",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("npm")
    npm = ["npm", "install", "--silent", "--no-audit", "--no-fund", *PACKAGES]
    subprocess.run(npm, cwd=made, check=True, timeout=280)
    shutil.copy(Path(__file__).with_name("extensions.mjs"), made)
    return made


def problems(folder: Path, of: list[Object]) -> list[str | None]:
    """Return what is wrong with each object; None if nothing is."""
    done = subprocess.run(
        ["node", "extensions.mjs"], cwd=folder, input=json.dumps(of), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def extensions(case: str, version: str = "helm4") -> list[Object]:
    found = objects(case, version=version)
    return [each for each in found if each["apiVersion"].startswith(EXTENSIONS)]


@pytest.mark.parametrize("version", HELMS)
def test_every_object_has_the_form_of_its_schema(folder: Path, version: str) -> None:
    found = [each for case in CASES for each in extensions(case, version)]
    assert {each["kind"] for each in found} == {
        "ScaledObject",
        "TriggerAuthentication",
        "PodMonitor",
        "PrometheusRule",
        "HTTPRoute",
    }
    assert problems(folder, found) == [None] * len(found)


WRONG: dict[str, Object] = {
    "ScaledObject": {"minReplicaCount": "two"},
    "TriggerAuthentication": {"secretTargetRef": 1},
    "PodMonitor": {"podMetricsEndpoints": 1},
    "PrometheusRule": {"groups": [{"rules": 3}]},
    "HTTPRoute": {"rules": [{"matches": [{"path": {"type": "Wrong"}}]}]},
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_form_is_seen(folder: Path, kind: str) -> None:
    [right, *_] = [each for each in extensions("production") if each["kind"] == kind]
    wrong = copy.deepcopy(right)
    wrong["spec"] |= WRONG[kind]
    [said] = problems(folder, [wrong])
    assert said is not None
    assert next(iter(WRONG[kind])) in said
