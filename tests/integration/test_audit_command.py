"""`farm audit`: its output, its exit codes, and an audit that continues after a stop."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from farm.context import Farm
from farm.domain.invariants import Invariant
from farm.services import audit as auditing
from farm.services.audit import Phase, Progress, Report, audit, audited
from tests.integration.situations import Jobs, fill
from tests.support.cli_runner import farm as command
from tests.support.store import sql


@pytest.fixture
def filled(farm: Farm, tenant: uuid.UUID) -> Jobs:
    return fill(farm, tenant)


@pytest.fixture
def commanded(farm: Farm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Farm:
    settings = farm.settings
    for name, value in {
        "FARM_DATABASE_URL": settings.database_url.get_secret_value(),
        "FARM_S3_ENDPOINT_URL": str(settings.s3_endpoint_url),
        "FARM_S3_BUCKET": settings.s3_bucket,
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return farm


def test_the_command_prints_what_was_checked_and_exits_0(commanded: Farm, filled: Jobs) -> None:
    outcome = command("audit")
    assert outcome.code == 0
    assert outcome.out.splitlines()[-1] == "All checks passed."
    rows = [line.split()[:4] for line in outcome.out.splitlines()[1:-1]]
    assert ["conservation", "8", "jobs", "0"] in rows
    assert ["ledger", "14", "frames", "0"] in rows
    assert "Checking frames 14/14" in outcome.err
    assert command("audit", "--no-artifacts", "--json").json == {
        "ok": True,
        "checked": {
            "durability": 8, "conservation": 8, "ledger": 14, "single_winner": 6,
            "artifact_truth": 0,
        },
        "wrong": dict.fromkeys(Invariant, 0),
        "findings": [],
        "findings_left_out": 0,
    }  # fmt: skip


def test_the_command_prints_each_finding_and_exits_4(commanded: Farm, filled: Jobs) -> None:
    sql(commanded, "UPDATE frames SET uncharged = 9 WHERE job_id = :id", id=filled.partial)
    outcome = command("audit")
    assert outcome.code == 4
    assert (
        f"ledger: job {filled.partial} frame 1 attempt 1: -8 attempts are charged; the maximum is 1"
        in outcome.out.splitlines()
    )
    assert outcome.out.splitlines()[-1] == "2 findings."
    outcome = command("audit", "--json")
    assert outcome.code == 4
    assert outcome.json["wrong"]["ledger"] == 2
    assert outcome.json["findings"][0] == {
        "invariant": "ledger",
        "job_id": str(filled.partial),
        "ordinal": 0,
        "attempt": 1,
        "detail": "-8 attempts are charged; the maximum is 1",
    }


# An interrupted audit


def test_an_audit_goes_on_where_it_stopped(
    farm: Farm, filled: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    sql(farm, "UPDATE frames SET uncharged = 9 WHERE job_id = :id", id=filled.partial)
    whole = audited(farm)
    assert whole.wrong[Invariant.LEDGER] == 2
    for name in ("JOBS_PER_CHUNK", "FRAMES_PER_CHUNK", "EVENTS_PER_CHUNK"):
        monkeypatch.setattr(auditing, name, 3)
    report, sittings, phases = Report(), 0, set()
    while not report.finished:
        report = Report.model_validate_json(report.model_dump_json())
        step = next(step for step in audit(farm, report) if isinstance(step, Progress))
        phases.add(step.phase)
        assert step.done == report.walked[step.phase] <= step.total
        sittings += 1
    assert sittings > 12
    assert phases == set(Phase) - {Phase.DONE}
    assert (report.checked, report.wrong) == (whole.checked, whole.wrong)
    assert {finding.where for finding in report.findings} == {
        finding.where for finding in whole.findings
    }
    assert report.walked[Phase.FRAMES] == 14


def test_the_command_keeps_its_place_in_a_file_and_goes_on(
    commanded: Farm, filled: Jobs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "audit.json"
    monkeypatch.setattr(auditing, "FRAMES_PER_CHUNK", 5)
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _seconds: None)
    bucket = commanded.settings.s3_bucket
    whole = command("audit", "--json").json
    monkeypatch.setenv("FARM_S3_BUCKET", "no-such-bucket")
    outcome = command("audit", "--resume", str(file))
    assert (outcome.code, outcome.out) == (5, "")
    assert outcome.err.splitlines()[-1].startswith("Error: The image storage did not return")
    kept = Report.model_validate_json(file.read_bytes())
    assert kept.place.phase is Phase.FRAMES
    assert kept.checked[Invariant.CONSERVATION] == 8
    monkeypatch.setenv("FARM_S3_BUCKET", bucket)
    outcome = command("audit", "--resume", str(file), "--json")
    assert (outcome.code, outcome.json) == (0, whole)
    assert list(tmp_path.iterdir()) == []
