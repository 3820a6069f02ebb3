"""The chart as helm renders it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm/farm"
CASES = sorted(path.stem for path in (CHART / "ci").glob("*.yaml"))
"""Sets of values."""
HELMS = ("helm3", "helm4")
OLDEST, NEWEST = "1.30.0", "1.37.0"
"""Versions of Kubernetes."""
OPERATORS = ("keda.sh/v1alpha1", "monitoring.coreos.com/v1")
"""APIs of operators that a cluster may have, and that some values need."""

Object = dict[str, Any]
"""An object of Kubernetes."""


def helm(*words: str, version: str = "helm4") -> subprocess.CompletedProcess[str]:
    """Run helm. `make test` fetches both versions into the environment."""
    program = Path(sys.prefix) / "helm" / version
    if not program.exists():
        pytest.fail(f"{program} is missing: run `make chart-tools`.")
    return subprocess.run([program, *words], capture_output=True, text=True, timeout=60)


def template(
    *cases: str, more: tuple[str, ...] = (), version: str = "helm4", kubernetes: str = NEWEST
) -> subprocess.CompletedProcess[str]:
    """Render the chart with some sets of values, and further words of the command line."""
    files = [f"--values={CHART}/ci/{case}.yaml" for case in cases]
    apis = [f"--api-versions={api}" for api in OPERATORS]
    words = ("template", "farm", str(CHART), *files, f"--kube-version={kubernetes}", *apis, *more)
    return helm(*words, version=version)


@cache
def objects(
    *cases: str, more: tuple[str, ...] = (), version: str = "helm4", kubernetes: str = NEWEST
) -> list[Object]:
    """Render the chart, and return its objects."""
    done = template(*cases, more=more, version=version, kubernetes=kubernetes)
    assert done.returncode == 0, done.stderr
    return [each for each in yaml.load_all(done.stdout, yaml.CSafeLoader) if each]


def refusal(*cases: str, more: tuple[str, ...] = (), kubernetes: str = NEWEST) -> str:
    """Return why helm refuses these values."""
    done = template(*cases, more=more, kubernetes=kubernetes)
    assert done.returncode != 0, "it was not refused"
    return done.stderr


def pods(of: list[Object]) -> Iterator[tuple[str, Object]]:
    """Yield the pods of objects: a name for messages, and the pod's spec."""
    for each in of:
        name = f"{each['kind']} {each['metadata']['name']}"
        if each["kind"] == "Pod":
            yield name, each["spec"]
        elif "template" in each.get("spec", {}):
            yield name, each["spec"]["template"]["spec"]


def by_kind(of: list[Object], kind: str) -> dict[str, Object]:
    """Return the objects of a kind, by name."""
    return {each["metadata"]["name"]: each for each in of if each["kind"] == kind}


def variables(deployment: Object) -> dict[str, str | None]:
    """Return the environment of a deployment's container. None: the value is in a Secret."""
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    return {each["name"]: each.get("value") for each in container["env"]}
