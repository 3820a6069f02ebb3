"""Each figure of the rules and the dashboard is one that a running farm exports."""

from __future__ import annotations

import json
import re
import uuid

import httpx
import pytest
import yaml

from farm.context import Farm
from tests.helm.charts import CHART
from tests.helm.test_rules import RULES
from tests.integration.test_health_port import running
from tests.support.store import register_worker, sql, submit
from tests.support.waiting import wait_until

DASHBOARD = CHART / "dashboards/farm.json"
NAME = re.compile(r"\bfarm_[a-z_]+\b")
LABELLED = re.compile(r"\b(farm_[a-z_]+)\{([^}]*)\}")
RESERVED = {"app_kubernetes_io_component", "app_kubernetes_io_part_of"}
"""Labels that the scrape adds."""


def rules() -> list[str]:
    [group] = yaml.safe_load(RULES.read_text())["groups"]
    return [rule["expr"] for rule in group["rules"]]


def panels() -> list[str]:
    board = json.loads(DASHBOARD.read_text())
    return [target["expr"] for panel in board["panels"] for target in panel["targets"]]


@pytest.fixture
def exported(farm: Farm, tenant: uuid.UUID) -> dict[str, set[str]]:
    """The names of the metrics of a real janitor's port, with the labels of each."""
    submit(farm, tenant)
    sql(farm, "UPDATE tenants SET max_open_jobs = 5")
    register_worker(farm)
    with running(farm) as (url, status):
        wait_until(lambda: status.leading and status.swept_at is not None, 30, "it has swept")
        text = httpx.get(f"{url}/metrics").text
    found: dict[str, set[str]] = {}
    for name, labels in re.findall(r"^(\w+)(?:\{(.*)\})? ", text, re.MULTILINE):
        found.setdefault(name, set()).update(re.findall(r'(\w+)="', labels))
    return found


def test_every_metric_of_the_rules_and_the_dashboard_is_exported(
    exported: dict[str, set[str]],
) -> None:
    for expression in rules() + panels():
        names = {*NAME.findall(expression)}
        assert names <= exported.keys(), expression
        for name, labels in LABELLED.findall(expression):
            for pair in re.findall(r"(\w+)\s*(?:=~|!=|=)", labels):
                assert pair in exported[name] | RESERVED, (name, pair)


def test_every_exported_metric_is_on_the_dashboard(exported: dict[str, set[str]]) -> None:
    shown = {name for expression in panels() for name in NAME.findall(expression)}
    assert {name for name in exported if name.startswith("farm_")} == shown


def test_panels_do_not_add_up_the_processes_of_the_api() -> None:
    """Each of them exports the same figures. A janitor's own figures are the exception."""
    for expression in panels():
        assert "sum" not in expression
        inner = re.findall(r"(\w+)(?: by \([^)]*\))? ?\((?:rate\()?farm_", expression)
        assert inner
        assert {*inner} <= {"max", "min", "count"}


def test_the_dashboard_names_no_server_of_ours() -> None:
    board = json.loads(DASHBOARD.read_text())
    assert board["uid"] == "farm"
    assert "__inputs" not in board
    for panel in board["panels"]:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["title"]
    places = [tuple(panel["gridPos"].values()) for panel in board["panels"]]
    assert len({*places}) == len(places)
