"""The audit reports nothing on a sound farm, and reports each damage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from farm.config import Settings
from farm.context import Farm, open_farm
from farm.domain.invariants import Invariant
from farm.errors import Unavailable
from farm.local import Servers
from farm.services import audit as auditing
from farm.services.audit import audited
from farm.store import audit as questions
from farm.store.engine import transaction
from tests.conftest import settings_on
from tests.integration.damages import DAMAGES, Damage
from tests.integration.situations import Jobs, fill
from tests.support.databases import Databases
from tests.support.store import new_tenant, sql


@pytest.fixture(scope="module")
def filled_once(
    servers: Servers, databases: Databases, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Jobs]]:
    """Return the name of a database with a job in each situation, and the jobs' IDs."""
    with databases.fresh() as name:
        folder = tmp_path_factory.mktemp("filled")
        farm = open_farm(settings_on(servers, databases.url(name), folder))
        jobs = fill(farm, new_tenant(farm, "default"))
        farm.close()
        yield name, jobs


@pytest.fixture
def settings(
    servers: Servers, databases: Databases, filled_once: tuple[str, Jobs], tmp_path: Path
) -> Iterator[Settings]:
    """Return settings of a farm on a copy of that database. All copies share the stored images."""
    with databases.copy(filled_once[0]) as name:
        yield settings_on(servers, databases.url(name), tmp_path)


@pytest.fixture
def filled(filled_once: tuple[str, Jobs]) -> Jobs:
    return filled_once[1]


def test_a_sound_farm_has_no_findings(farm: Farm, filled: Jobs) -> None:
    statuses = sql(farm, "SELECT status, count(*) FROM jobs GROUP BY 1 ORDER BY 1")
    assert statuses == [
        ("cancelled", 1), ("partial", 1), ("queued", 1), ("running", 3), ("succeeded", 2),
    ]  # fmt: skip
    report = audited(farm)
    assert report.findings == []
    assert (report.ok, report.wrong) == (True, dict.fromkeys(Invariant, 0))
    assert report.checked == {
        "durability": 8, "conservation": 8, "ledger": 14, "single_winner": 6, "artifact_truth": 6,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("invariant", "damage"),
    [
        pytest.param(invariant, damage, id=f"{invariant}: {name}")
        for invariant, damages in DAMAGES.items()
        for name, damage in damages.items()
    ],
)
def test_each_damage_is_found(
    farm: Farm, filled: Jobs, invariant: Invariant, damage: Damage
) -> None:
    job_id = getattr(filled, damage.job)
    for statement in damage.statements.split("; "):
        sql(farm, statement, id=job_id)
    report = audited(farm)
    expected = [
        finding
        for finding in report.findings
        if (finding.invariant, finding.job_id, finding.ordinal) == (invariant, job_id, damage.frame)
        and damage.detail in finding.detail
    ]
    assert len(expected) == 1, report.findings
    assert {finding.job_id for finding in report.findings} == {job_id}
    assert (report.ok, sum(report.wrong.values())) == (False, len(report.findings))


def test_all_findings_are_counted_and_the_first_described(
    farm: Farm, filled: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auditing, "FINDINGS_KEPT", 5)
    sql(farm, "UPDATE frames SET uncharged = 9")
    report = audited(farm)
    assert report.wrong[Invariant.LEDGER] == 14
    assert len(report.findings) == 5


def test_an_audit_only_reads(farm: Farm, filled: Jobs) -> None:
    def write() -> None:
        with transaction(farm.store) as connection:
            questions.only_read(connection)
            connection.execute(text("UPDATE jobs SET labels = '{}'"))

    with pytest.raises(Unavailable) as caught:
        write()
    assert "read-only" in str(caught.value.__cause__)
    before = sql(farm, "SELECT * FROM jobs ORDER BY id")
    audited(farm)
    assert sql(farm, "SELECT * FROM jobs ORDER BY id") == before
