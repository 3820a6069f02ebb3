"""Each alert fires when it should, and only then, with the figures of three API processes."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
RULES = ROOT / "helm/farm/rules/farm.rules.yaml"
PODS = ("api-1", "api-2", "api-3")

pytestmark = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed: Debian's prometheus"
)


@dataclass(frozen=True)
class Case:
    """Series, each with its values once a minute, that fire an alert, and others that do not."""

    alert: str
    fires: dict[str, str]
    silent: dict[str, str]
    at: str = "20m"
    labels: str = '{pipeline="a"}'


QUEUE = 'farm_queue_frames{pipeline="a",priority="normal"}'
URGENT = 'farm_oldest_waiting_seconds{pipeline="a",priority="interactive"}'
NORMAL = 'farm_oldest_waiting_seconds{pipeline="a",priority="normal"}'
SUCCEEDED = 'farm_frames_total{pipeline="a",outcome="succeeded"}'
DEAD = 'farm_frames_total{pipeline="a",outcome="dead"}'
EXPIRED = 'farm_lease_expiries_total{pipeline="a"}'
DENOISE = 'farm_stage_seconds_total{pipeline="a",stage="denoise"}'
WORK = 'farm_work_seconds_total{pipeline="a"}'
SWEPT = "farm_janitor_swept_timestamp_seconds"
SPOOLED = 'farm_spooled_bytes{pipeline="a"}'
LIMIT = 'farm_spool_limit_bytes{pipeline="a"}'
UP = 'up{app_kubernetes_io_part_of="farm",app_kubernetes_io_component="api"}'


def workers(state: str) -> str:
    return f'farm_workers{{pipeline="a",state="{state}"}}'


CASES = [
    Case(
        "FarmLaneWithoutWorker",
        {QUEUE: "5x60", workers("idle"): "0x60", workers("failed"): "2x60"},
        {QUEUE: "5x60", workers("idle"): "0x60", workers("loading"): "1x60"},
    ),
    Case(
        "FarmLaneStalled",
        {QUEUE: "5x60", workers("rendering"): "1x60", SUCCEEDED: "7x60"},
        {QUEUE: "5x60", workers("rendering"): "1x60", SUCCEEDED: "0+1x60"},
        at="40m",
    ),
    Case("FarmInteractiveWaits", {URGENT: "0+10x60"}, {URGENT: "20x60", NORMAL: "0+60x60"}),
    Case(
        "FarmFramesDying",
        {DEAD: "0+10x60", SUCCEEDED: "0+100x60"},
        {DEAD: "0+10x60", SUCCEEDED: "0+1000x60"},
    ),
    Case("FarmLeasesExpire", {EXPIRED: "0+1x60"}, {EXPIRED: "0 1 1 2 2x56"}),
    Case("FarmWorkersFailed", {workers("failed"): "1x60"}, {workers("failed"): "0x10 1x5 0x60"}),
    Case(
        "FarmWorkerLoadsTooLong",
        {workers("loading"): "1x60"},
        {workers("loading"): "1x20 0x1 1x60"},
        at="40m",
    ),
    Case("FarmJanitorMissing", {SWEPT: "0x60"}, {SWEPT: "0+60x60"}, labels="{}"),
    Case("FarmJanitorMissing", {QUEUE: "0x60"}, {SWEPT: "0+60x60"}, labels="{}"),
    Case("FarmApiDown", {UP: "0x60"}, {UP: "1x60"}, labels="{}"),
    Case("FarmApiDown", {QUEUE: "0x60"}, {UP: "1x60"}, labels="{}"),
    Case("FarmStorageAway", {"farm_storage_up": "0x60"}, {"farm_storage_up": "1x60"}, labels="{}"),
    Case(
        "FarmStorageAway",
        {SPOOLED: "60x60", LIMIT: "100x60"},
        {SPOOLED: "40x60", LIMIT: "100x60"},
        labels="{}",
    ),
    Case(
        "FarmDeviceIdleWithWork",
        {QUEUE: "500x90", DENOISE: "0+20x90", WORK: "0+60x90"},
        {QUEUE: "500x90", DENOISE: "0+50x90", WORK: "0+60x90"},
        at="60m",
    ),
    Case(
        "FarmBacklogTooLong",
        {QUEUE: "10000000x180", SUCCEEDED: "0+60x180"},
        {QUEUE: "10000x180", SUCCEEDED: "0+60x180"},
        at="120m",
    ),
    Case(
        "FarmWebhooksWait",
        {"farm_webhook_lag_seconds": "0+60x60"},
        {"farm_webhook_lag_seconds": "90x60"},
        labels="{}",
    ),
    Case(
        "FarmDatabaseGrows",
        {"farm_database_bytes": "1000000+100000x900"},
        {"farm_database_bytes": "1000000+1x900"},
        at="840m",
        labels="{}",
    ),
]


def alerts() -> dict[str, dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return {rule["alert"]: rule for rule in groups[0]["rules"] if "alert" in rule}


def on_each_pod(series: str, values: str) -> list[dict[str, str]]:
    """Give a series to three API processes. The second one is always a step behind."""
    name, _, labels = series.rstrip("}").partition("{")
    return [
        {"series": f'{name}{{{labels},instance="{pod}"}}'.replace("{,", "{"), "values": values}
        for pod in PODS
    ]


def told(case: Case, series: dict[str, str], fires: bool) -> dict[str, Any]:
    """Write a test for promtool."""
    own = case.labels.strip("{}")
    labels = f'{{{own}{"," if own else ""}severity="{alerts()[case.alert]["labels"]["severity"]}"}}'
    return {
        "interval": "1m",
        "input_series": [each for item in series.items() for each in on_each_pod(*item)],
        "promql_expr_test": [
            {
                "expr": "sum by (pipeline, severity) "
                f'(ALERTS{{alertname="{case.alert}",alertstate="firing"}})',
                "eval_time": case.at,
                "exp_samples": [{"labels": labels, "value": 1}] if fires else [],
            }
        ],
    }


def promtool(folder: Path, tests: list[dict[str, Any]]) -> subprocess.CompletedProcess[str]:
    file = folder / "tests.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "tests": tests}))
    return subprocess.run(
        ["promtool", "test", "rules", str(file)], capture_output=True, text=True, timeout=120
    )


def test_every_alert_fires_when_it_should_and_only_then(tmp_path: Path) -> None:
    tests = [told(case, case.fires, fires=True) for case in CASES]
    tests += [told(case, case.silent, fires=False) for case in CASES]
    done = promtool(tmp_path, tests)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_check_sees_each_alert_that_fires_wrongly(tmp_path: Path) -> None:
    tests = [told(case, case.silent, fires=True) for case in CASES]
    tests += [told(case, case.fires, fires=False) for case in CASES]
    done = promtool(tmp_path, tests)
    assert (done.stdout + done.stderr).count("expr: ") == len(tests)


def test_every_alert_has_a_case_and_a_runbook() -> None:
    assert {case.alert for case in CASES} == alerts().keys()
    page = (ROOT / "docs/runbooks.md").read_text()
    headings = re.findall(r"^## (\w+)$", page, re.MULTILINE)
    assert headings == [*alerts()]
    for section in page.split("\n## ")[1:]:
        assert "**Look at**" in section
        assert "**Do**" in section


def test_promtool_accepts_the_rules() -> None:
    done = subprocess.run(
        ["promtool", "check", "rules", "--lint=all", "--lint-fatal", str(RULES)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
