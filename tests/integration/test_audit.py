"""The audit: silent on a sound farm, also on one at work; each damage is found and named."""

from __future__ import annotations

import random
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from farm import audit as auditing
from farm import jobs
from farm.artifacts import artifact_key
from farm.audit import Phase, Progress, Report, audit, audited
from farm.config import Settings
from farm.context import Farm, open_farm
from farm.errors import Conflict, NotFound, Unavailable
from farm.formats import Format
from farm.invariants import Invariant
from farm.store import auditing as questions
from farm.store import retention
from farm.store.claim import Lease
from farm.store.engine import transaction
from tests.commanding import farm as command
from tests.farming import Hand, hire, job_row, let_leases_expire, sql, submit
from tests.serving import render
from tests.waiting import wait_until
from workers.janitor import Janitor
from workers.storage import StorageWork

CLEAN = dict.fromkeys(Invariant, 0)


@dataclass
class Jobs:
    """A job in each situation, of two frames; the cancelled one of four, two never claimed."""

    queued: uuid.UUID
    running: uuid.UUID
    ready: uuid.UUID
    paused: uuid.UUID
    partial: uuid.UUID
    retried: uuid.UUID
    cancelled: uuid.UUID
    succeeded: uuid.UUID


@pytest.fixture
def filled(farm: Farm, tenant: uuid.UUID) -> Jobs:
    hand = hire(farm)

    def of_two(**fields: object) -> uuid.UUID:
        return submit(farm, tenant, images_per_prompt=2, bucket=2, **fields)

    succeeded = of_two()
    render(hand, hand.must_claim())
    cancelled = submit(farm, tenant, images_per_prompt=4, bucket=2)
    lease = hand.must_claim()
    render(hand, lease, 0)
    jobs.cancel(farm, tenant, cancelled)
    retried = of_two(max_attempts=2)
    hand.fail(hand.must_claim())
    hand.fail(hand.must_claim(), retryable=False)
    hand.fail(hand.must_claim(), retryable=False)
    jobs.retry(farm, tenant, retried)
    render(hand, hand.must_claim())
    partial = of_two(max_attempts=1)
    lease = hand.must_claim()
    render(hand, lease, 0)
    hand.fail(lease, fences=[(partial, 1, 1)])
    paused = of_two(priority="interactive")
    hand.release(hand.must_claim())
    jobs.pause(farm, tenant, paused)
    ready = of_two()
    hand.must_claim()
    let_leases_expire(farm)
    running = of_two(priority="interactive")
    hand.must_claim()
    queued = of_two(priority="bulk")
    return Jobs(queued, running, ready, paused, partial, retried, cancelled, succeeded)


def test_a_sound_farm_has_no_findings(farm: Farm, filled: Jobs) -> None:
    statuses = sql(farm, "SELECT status, count(*) FROM jobs GROUP BY 1 ORDER BY 1")
    assert statuses == [
        ("cancelled", 1), ("partial", 1), ("queued", 1), ("running", 3), ("succeeded", 2),
    ]  # fmt: skip
    report = audited(farm)
    assert report.findings == []
    assert (report.ok, report.wrong) == (True, CLEAN)
    assert report.checked == {
        "durability": 8, "conservation": 8, "ledger": 14, "single_winner": 6, "artifact_truth": 6,
    }  # fmt: skip


DAMAGE: dict[str, tuple[str, str, str, int | None, str]] = {
    # what: (the job it is done to, the statement, the invariant, the frame, a word of the detail)
    "a job that is gone": (
        "succeeded", "DELETE FROM jobs WHERE id = :id", "durability", None, "not there",
    ),
    "no event of its submission": (
        "partial", "DELETE FROM events WHERE kind = 'job.queued' AND job_id = :id",
        "durability", None, "0 events",
    ),
    "submitted twice": (
        "queued", "INSERT INTO events (job_id, tenant_id, kind, data)"
        " SELECT id, tenant_id, 'job.queued', '{}' FROM jobs WHERE id = :id",
        "durability", None, "2 events",
    ),
    "a counter": (
        "cancelled", "UPDATE jobs SET cancelled = cancelled - 1 WHERE id = :id",
        "conservation", None, "counter says 2 cancelled, and 3",
    ),
    "waiting frames too many": (
        "ready", "UPDATE jobs SET total = total + 1, open = true WHERE id = :id; "
        "UPDATE jobs SET cursor = cursor + 1, open = false WHERE id = :id",
        "conservation", None, "its cursor is 3",
    ),
    "a frame of a live job that is gone": (
        "running", "DELETE FROM frames WHERE job_id = :id AND ordinal = 1",
        "conservation", 1, "at none",
    ),
    "a status": (
        "partial", "UPDATE jobs SET status = 'succeeded' WHERE id = :id",
        "conservation", None, "it is succeeded, and its counters say partial",
    ),
    "a job that never ends": (
        "succeeded", "UPDATE jobs SET status = 'running', finished_at = NULL WHERE id = :id",
        "conservation", None, "it is running, and its counters say succeeded",
    ),
    "an end that is not": (
        "queued", "UPDATE jobs SET finished_at = clock_timestamp() WHERE id = :id",
        "conservation", None, "its end is",
    ),
    "a job closed to claims": (
        "queued", "UPDATE jobs SET open = false WHERE id = :id", "conservation", None, "closed",
    ),
    "a ready frame nobody can claim": (
        "ready", "DELETE FROM returns WHERE job_id = :id AND ordinal = 0",
        "conservation", 0, "not among the returned",
    ),
    "a succeeded frame that may be claimed": (
        "succeeded", "INSERT INTO returns SELECT :id, 1, pipeline, tenant_id, priority, batch_key,"
        " bucket, not_before, job_created_at, paused, alone FROM returns LIMIT 1",
        "conservation", 1, "it is succeeded, and among the returned",
    ),
    "a running frame nobody holds": (
        "running", "DELETE FROM leases", "conservation", 0, "held by 0 leases",
    ),
    "a frame held twice": (
        "running", "INSERT INTO leases SELECT gen_random_uuid(), worker_id, pid, pipeline,"
        " created_at, expires_at, job_ids, ordinals, attempts FROM leases",
        "conservation", 1, "held by 2 leases",
    ),
    "a lease on an attempt that never was": (
        "running", "UPDATE leases SET attempts = '{1,7}'", "conservation", 1, "the frame is at 1",
    ),
    "an attempt that is missing": (
        "retried", "DELETE FROM attempts WHERE job_id = :id AND ordinal = 0 AND attempt = 1",
        "ledger", 0, "1 earlier attempts are on record, not 2",
    ),
    "an attempt too many": (
        "partial", "INSERT INTO attempts SELECT job_id, ordinal, 9, worker, reason, message,"
        " traceback, started_at, ended_at FROM attempts WHERE job_id = :id",
        "ledger", 1, "that it never had",
    ),
    "a dead frame's last attempt": (
        "partial", "DELETE FROM attempts WHERE job_id = :id", "ledger", 1, "is not on record",
    ),
    "a running frame that has ended": (
        "running", "INSERT INTO attempts SELECT job_id, ordinal, attempt, worker, 'x', '', '',"
        " started_at FROM frames WHERE job_id = :id AND ordinal = 0",
        "ledger", 0, "it is running, and on record as ended",
    ),
    "an attempt without a reason": (
        "ready", "UPDATE attempts SET reason = '' WHERE job_id = :id AND ordinal = 1",
        "ledger", 1, "without a reason",
    ),
    "more attempts than allowed": (
        "retried", "UPDATE frames SET spared = 0 WHERE job_id = :id AND ordinal = 0",
        "ledger", 0, "3 attempts are charged, of 2",
    ),
    "less than none charged": (
        "partial", "UPDATE frames SET spared = 2 WHERE job_id = :id AND ordinal = 1",
        "ledger", 1, "-1 attempts are charged",
    ),
    "a winner that had failed": (
        "succeeded", "INSERT INTO attempts SELECT job_id, ordinal, attempt, worker, 'x', '', '',"
        " started_at FROM frames WHERE job_id = :id AND ordinal = 0",
        "single_winner", 0, "on record as failed",
    ),
    "two winners told": (
        "succeeded", "INSERT INTO events (job_id, tenant_id, kind, data)"
        " SELECT job_id, tenant_id, kind, '{\"frames\": [[1, 1]]}' FROM events"
        " WHERE job_id = :id AND kind = 'frames.succeeded'",
        "single_winner", 1, "attempt 1, 1 succeeded",
    ),
    "another winner than the row's": (
        "succeeded", "UPDATE frames SET attempt = 2 WHERE job_id = :id AND ordinal = 1; "
        "INSERT INTO attempts SELECT job_id, ordinal, 1, worker, 'x', '', '', started_at"
        " FROM frames WHERE job_id = :id AND ordinal = 1",
        "single_winner", 1, "attempt 1 succeeded; it is succeeded at attempt 2",
    ),
    "a winner told of a frame that failed": (
        "partial", "INSERT INTO events (job_id, tenant_id, kind, data)"
        " SELECT id, tenant_id, 'frames.succeeded', '{\"frames\": [[1, 1]]}' FROM jobs"
        " WHERE id = :id",
        "single_winner", 1, "it is dead at attempt 1",
    ),
    "another length": (
        "succeeded", "UPDATE frames SET bytes = bytes + 1 WHERE job_id = :id AND ordinal = 0",
        "artifact_truth", 0, "are stored, not",
    ),
    "an image that is not there": (
        "succeeded", "UPDATE frames SET sha256 = '\\x" + "ab" * 32 + "'"
        " WHERE job_id = :id AND ordinal = 1",
        "artifact_truth", 1, "not stored",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_each_damage_is_found(farm: Farm, filled: Jobs, what: str) -> None:
    job, statements, invariant, ordinal, word = DAMAGE[what]
    job_id = getattr(filled, job)
    for statement in statements.split("; "):
        sql(farm, statement, id=job_id)
    report = audited(farm)
    told = [
        finding
        for finding in report.findings
        if (finding.invariant, finding.job_id, finding.ordinal) == (invariant, job_id, ordinal)
        and word in finding.detail
    ]
    assert len(told) == 1, report.findings
    assert {finding.job_id for finding in report.findings} == {job_id}
    assert (report.ok, sum(report.wrong.values())) == (False, len(report.findings))


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_images_of_every_format_are_read(farm: Farm, tenant: uuid.UUID, form: Format) -> None:
    job_id = submit(farm, tenant, format=form)
    hand = hire(farm)
    render(hand, hand.must_claim())
    assert audited(farm).ok
    [(digest,)] = sql(farm, "SELECT sha256 FROM frames WHERE job_id = :id", id=job_id)
    farm.artifacts.delete(artifact_key(tenant, job_id, 0, bytes(digest), form))
    assert [finding.detail for finding in audited(farm).findings] == ["its image is not stored"]


def test_an_image_with_other_bytes_is_found(farm: Farm, filled: Jobs, tenant: uuid.UUID) -> None:
    row = sql(
        farm, "SELECT sha256, bytes FROM frames WHERE job_id = :id LIMIT 1", id=filled.succeeded
    )[0]
    key = artifact_key(tenant, filled.succeeded, 0, bytes(row.sha256))
    content = farm.artifacts.get(key)
    farm.artifacts.put(key, content[:-1] + b"\x00")
    found = audited(farm).findings
    assert [(finding.invariant, finding.ordinal, finding.attempt) for finding in found] == [
        ("artifact_truth", 0, 1)
    ]
    assert found[0].where == f"job {filled.succeeded} frame 0 attempt 1"
    farm.artifacts.delete(key)
    assert [finding.detail for finding in audited(farm).findings] == ["its image is not stored"]
    assert audited(farm, sample=0.0).ok
    farm.artifacts.put(key, content)
    assert audited(farm).ok


def test_a_sample_reads_a_part(farm: Farm, tenant: uuid.UUID) -> None:
    submit(farm, tenant, images_per_prompt=64, bucket=64)
    hand = hire(farm)
    render(hand, hand.must_claim())
    report = audited(farm, sample=0.5)
    assert report.ok
    assert 5 < report.checked[Invariant.ARTIFACT_TRUTH] < 59
    assert report.checked[Invariant.LEDGER] == 64


def test_what_was_pruned_or_removed_is_no_finding(
    farm: Farm, filled: Jobs, tenant: uuid.UUID
) -> None:
    sql(farm, "DELETE FROM events WHERE id < (SELECT max(id) FROM events)")
    assert audited(farm).ok
    hand = hire(farm)
    job_id = submit(farm, tenant, priority="interactive")
    render(hand, hand.must_claim())
    sql(
        farm,
        "UPDATE jobs SET finished_at = finished_at - interval '9 days' WHERE id = ANY(:ids)",
        ids=[job_id, filled.succeeded, filled.partial],
    )
    with transaction(farm.store) as connection:
        assert len(retention.remove_due(connection, 5.0)) == 3
    for _ in range(6):  # after each piece that goes
        assert audited(farm).ok
        with transaction(farm.store) as connection:
            retention.delete_rows(connection, 1)
    work = StorageWork(farm, threading.Event())
    work.lead(True)
    work.step()
    assert sql(farm, "SELECT count(*) FROM jobs WHERE removed_at IS NOT NULL") == [(0,)]
    assert audited(farm).ok
    sql(farm, "DELETE FROM events WHERE kind = 'job.removed'")
    assert [finding.job_id for finding in audited(farm).findings] == [job_id]


def test_it_writes_nothing(farm: Farm, filled: Jobs) -> None:
    def write() -> None:
        with transaction(farm.store) as connection:
            questions.only_read(connection)
            connection.execute(text("UPDATE jobs SET labels = '{}'"))

    with pytest.raises(DBAPIError, match="read-only"):
        write()
    before = sql(farm, "SELECT * FROM jobs ORDER BY id")
    audited(farm)
    assert sql(farm, "SELECT * FROM jobs ORDER BY id") == before


# A farm at work


def test_nothing_that_merely_moves_is_reported(
    farm: Farm, tenant: uuid.UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hands that do everything there is, a janitor that removes, and audits meanwhile."""
    for name in ("JOBS_A_CHUNK", "FRAMES_A_CHUNK", "EVENTS_A_CHUNK"):
        monkeypatch.setattr(auditing, name, 7)
    over = threading.Event()
    moves = [0, 0]
    failures: list[BaseException] = []
    threads = [
        threading.Thread(target=_until, args=(over, failures, _hand_at_work(farm, number, moves)))
        for number in range(2)
    ]
    threads += [
        threading.Thread(target=_until, args=(over, failures, _owner(farm, tenant))),
        threading.Thread(target=_until, args=(over, failures, _upkeep(farm))),
    ]
    for thread in threads:
        thread.start()
    reports: list[Report] = []
    try:
        wait_until(lambda: min(moves) > 3, 30, "the hands have begun")
        while len(reports) < 12 or min(moves) < 60:
            reports.append(audited(farm))
            assert reports[-1].findings == []
            assert failures == []
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert failures == []
    assert audited(farm).findings == []
    assert sum(report.checked[Invariant.ARTIFACT_TRUTH] for report in reports) > 50
    assert sql(farm, "SELECT count(*) FROM events WHERE kind = 'job.removed'")[0][0] > 0


def _until(over: threading.Event, failures: list[BaseException], moves: Iterator[None]) -> None:
    try:
        while not over.is_set():
            next(moves)
    except BaseException as error:
        failures.append(error)


def _hand_at_work(farm: Farm, number: int, moves: list[int]) -> Iterator[None]:
    hand = hire(farm, f"hand {number}")
    choice = random.Random(number)
    while True:
        lease = hand.claim()
        if lease is not None:
            move = choice.choice(["render", "render", "render", "fail", "release", "part", "leave"])
            if move == "render":
                _render(hand, lease)
            elif move == "fail":
                hand.fail(lease, retryable=choice.random() < 0.7)
            elif move == "release":
                hand.release(lease)
            elif move == "part":
                _render(hand, lease, lease.frames[0].ordinal)
                hand.fail(lease)
            moves[number] += 1
        yield


def _render(hand: Hand, lease: Lease, *ordinals: int) -> None:
    with suppress(AssertionError):  # cancelled, or expired, meanwhile
        render(hand, lease, *ordinals)


def _owner(farm: Farm, tenant: uuid.UUID) -> Iterator[None]:
    choice = random.Random(7)
    known: list[uuid.UUID] = []
    verbs: list[Callable[[Farm, uuid.UUID, uuid.UUID], object]] = [
        jobs.cancel, jobs.pause, jobs.resume, jobs.resume, jobs.retry, jobs.retry,
    ]  # fmt: skip
    while True:
        if sql(farm, "SELECT count(*) FROM jobs WHERE open")[0][0] < 8:
            size = choice.choice([1, 2, 8])
            known.append(
                submit(farm, tenant, images_per_prompt=size, bucket=min(size, 4), max_attempts=2)
            )
        with suppress(Conflict, NotFound):
            choice.choice(verbs)(farm, tenant, choice.choice(known))
        yield


def _upkeep(farm: Farm) -> Iterator[None]:
    farm.settings = farm.settings.model_copy(update={"retention_days": 1e-9, "orphan_seconds": 0.0})
    janitor, work = Janitor(farm), StorageWork(farm, threading.Event())
    work.lead(True)
    while True:
        sql(
            farm,
            "UPDATE leases SET expires_at = clock_timestamp() - interval '1 s'"
            " WHERE created_at < clock_timestamp() - interval '1 s'",
        )
        with farm.store.connect() as connection:
            janitor.sweep(connection)
        work.step()
        yield


def test_a_job_removed_while_its_image_is_read_is_no_finding(
    farm: Farm, tenant: uuid.UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = submit(farm, tenant)
    hand = hire(farm)
    render(hand, hand.must_claim())
    measure = farm.artifacts.measure

    def too_late(key: str) -> tuple[int, bytes]:
        sql(farm, "UPDATE jobs SET removed_at = clock_timestamp()")
        farm.artifacts.delete(key)
        return measure(key)

    monkeypatch.setattr(farm.artifacts, "measure", too_late)
    assert audited(farm).findings == []
    sql(farm, "UPDATE jobs SET removed_at = NULL")
    assert job_row(farm, tenant, job_id).succeeded == 1
    monkeypatch.setattr(farm.artifacts, "measure", measure)
    assert not audited(farm).ok


def test_a_server_that_is_away_for_a_moment_is_asked_again(
    farm: Farm, filled: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _seconds: None)
    measure, tries = farm.artifacts.measure, iter(range(1000))

    def now_and_then(key: str) -> tuple[int, bytes]:
        if next(tries) % 4:
            raise Unavailable("The image storage did not give it.")
        return measure(key)

    monkeypatch.setattr(farm.artifacts, "measure", now_and_then)
    monkeypatch.setattr(auditing, "AT_ONCE", 1)
    report = audited(farm)
    assert (report.ok, report.checked[Invariant.ARTIFACT_TRUTH]) == (True, 6)


def test_a_storage_that_stays_away_is_no_finding(
    settings: Settings, filled: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _seconds: None)
    lost = open_farm(settings.model_copy(update={"s3_bucket": "no-such-bucket"}))
    report = Report()
    with pytest.raises(Unavailable):
        list(audit(lost, report))
    assert report.findings == []
    assert not report.finished
    lost.close()


# Breaking off and going on


def test_an_audit_goes_on_where_it_was_broken_off(
    farm: Farm, filled: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    sql(farm, "UPDATE frames SET spared = 9 WHERE job_id = :id", id=filled.partial)
    whole = audited(farm)
    assert whole.wrong[Invariant.LEDGER] == 2
    for name in ("JOBS_A_CHUNK", "FRAMES_A_CHUNK", "EVENTS_A_CHUNK"):
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


def test_a_report_counts_all_and_describes_the_first(
    farm: Farm, filled: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auditing, "FINDINGS_KEPT", 5)
    sql(farm, "UPDATE frames SET spared = 9")
    report = audited(farm)
    assert report.wrong[Invariant.LEDGER] == 14
    assert len(report.findings) == 5


# The command


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


def test_the_command_says_that_all_is_well(commanded: Farm, filled: Jobs) -> None:
    outcome = command("audit")
    assert outcome.code == 0
    assert outcome.out.splitlines()[-1] == "Everything that was checked holds."
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
        "wrong": CLEAN,
        "findings": [],
        "findings_left_out": 0,
    }  # fmt: skip


def test_the_command_names_what_it_found(commanded: Farm, filled: Jobs) -> None:
    sql(commanded, "UPDATE frames SET spared = 9 WHERE job_id = :id", id=filled.partial)
    outcome = command("audit")
    assert outcome.code == 4
    assert (
        f"ledger: job {filled.partial} frame 1 attempt 1: -8 attempts are charged, of 1 at most"
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
        "detail": "-8 attempts are charged, of 1 at most",
    }


def test_the_command_keeps_where_it_is_and_goes_on(
    commanded: Farm, filled: Jobs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "audit.json"
    monkeypatch.setattr(auditing, "FRAMES_A_CHUNK", 5)
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _seconds: None)
    bucket = commanded.settings.s3_bucket
    whole = command("audit", "--json").json
    monkeypatch.setenv("FARM_S3_BUCKET", "no-such-bucket")
    outcome = command("audit", "--resume", str(file))
    assert (outcome.code, outcome.out) == (5, "")
    assert outcome.err.splitlines()[-1].startswith("Error: The image storage did not give")
    kept = Report.model_validate_json(file.read_bytes())
    assert kept.place.phase is Phase.FRAMES
    assert kept.checked[Invariant.CONSERVATION] == 8
    monkeypatch.setenv("FARM_S3_BUCKET", bucket)
    outcome = command("audit", "--resume", str(file), "--json")
    assert (outcome.code, outcome.json) == (0, whole)
    assert list(tmp_path.iterdir()) == []
