"""The audit reports no changes made while it reads, and no server that is away."""

from __future__ import annotations

import random
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from farm.config import Settings
from farm.context import Farm, open_farm
from farm.domain.invariants import Invariant
from farm.errors import Conflict, NotFound, Unavailable
from farm.services import audit as auditing
from farm.services import steering
from farm.services.audit import Report, audit, audited
from farm.store import retention
from farm.store.claim import Lease
from farm.store.engine import transaction
from tests.integration.situations import Jobs, fill
from tests.support.api_server import render
from tests.support.store import FakeWorker, job_row, register_worker, sql, submit
from tests.support.waiting import wait_until
from workers.janitor.janitor import Janitor
from workers.janitor.storage_cleaner import StorageCleaner


@pytest.fixture
def filled(farm: Farm, tenant: uuid.UUID) -> Jobs:
    return fill(farm, tenant)


# A busy farm


def test_nothing_that_merely_moves_is_reported(
    farm: Farm, tenant: uuid.UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake workers, an owner of jobs and a janitor work during the audits."""
    for name, size in {"JOBS_PER_CHUNK": 7, "FRAMES_PER_CHUNK": 7, "EVENTS_PER_CHUNK": 50}.items():
        monkeypatch.setattr(auditing, name, size)
    moves = [0, 0]
    reports: list[Report] = []
    at_work = [
        *(hand_at_work(farm, number, moves) for number in range(2)),
        owner_at_work(farm, tenant),
        upkeep_at_work(farm),
    ]
    with repeated_in_threads(at_work) as failures:
        wait_until(lambda: min(moves) > 3, 30, "the hands have begun")
        while len(reports) < 12 or min(moves) < 60:
            reports.append(audited(farm))
            assert reports[-1].findings == []
            assert failures == []
    assert failures == []
    assert audited(farm).findings == []
    assert sum(report.checked[Invariant.ARTIFACT_TRUTH] for report in reports) > 50
    assert sql(farm, "SELECT count(*) FROM events WHERE kind = 'job.removed'")[0][0] > 0


@contextmanager
def repeated_in_threads(works: list[Iterator[None]]) -> Iterator[list[BaseException]]:
    """Iterate over each of these in a thread until the block ends. Yield the errors they raise."""
    over = threading.Event()
    failures: list[BaseException] = []

    def repeat(work: Iterator[None]) -> None:
        try:
            while not over.is_set():
                next(work)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=repeat, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield failures
    finally:
        over.set()
        for thread in threads:
            thread.join()


def hand_at_work(farm: Farm, number: int, moves: list[int]) -> Iterator[None]:
    """Claim, then render, fail, release, render a part, or let the lease expire."""
    worker = register_worker(farm, f"hand {number}")
    choice = random.Random(number)
    while True:
        lease = worker.claim()
        if lease is not None:
            move = choice.choice(["render", "render", "render", "fail", "release", "part", "leave"])
            if move == "render":
                render_what_is_held(worker, lease)
            elif move == "fail":
                worker.fail(lease, retryable=choice.random() < 0.7)
            elif move == "release":
                worker.release(lease)
            elif move == "part":
                render_what_is_held(worker, lease, lease.frames[0].ordinal)
                worker.fail(lease)
            moves[number] += 1
        yield


def render_what_is_held(worker: FakeWorker, lease: Lease, *ordinals: int) -> None:
    with suppress(AssertionError):  # the frames were cancelled, or the lease expired
        render(worker, lease, *ordinals)


def owner_at_work(farm: Farm, tenant: uuid.UUID) -> Iterator[None]:
    """Keep eight jobs open, and cancel, pause, resume or retry any of them."""
    choice = random.Random(7)
    known: list[uuid.UUID] = []
    verbs: list[Callable[[Farm, uuid.UUID, uuid.UUID], object]] = [
        steering.cancel, steering.pause, steering.resume, steering.resume, steering.retry,
        steering.retry,
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


def upkeep_at_work(farm: Farm) -> Iterator[None]:
    """Expire leases after a second, and remove ended jobs and their images at once."""
    farm.settings = farm.settings.model_copy(update={"retention_days": 1e-9, "orphan_seconds": 0.0})
    janitor, work = Janitor(farm), StorageCleaner(farm)
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


# Removed jobs


def test_pruned_events_are_no_finding(farm: Farm, filled: Jobs) -> None:
    sql(farm, "DELETE FROM events WHERE id < (SELECT max(id) FROM events)")
    assert audited(farm).ok


def test_a_removed_job_is_no_finding_while_an_event_tells_of_its_removal(
    farm: Farm, filled: Jobs, tenant: uuid.UUID
) -> None:
    sql(farm, "DELETE FROM events WHERE id < (SELECT max(id) FROM events)")
    worker = register_worker(farm)
    job_id = submit(farm, tenant, priority="interactive")
    render(worker, worker.must_claim())
    sql(
        farm,
        "UPDATE jobs SET finished_at = finished_at - interval '9 days' WHERE id = ANY(:ids)",
        ids=[job_id, filled.succeeded, filled.partial],
    )
    with transaction(farm.store) as connection:
        assert len(retention.remove_due(connection, 5.0)) == 3
    for _ in range(6):  # after each deleted piece
        assert audited(farm).ok
        with transaction(farm.store) as connection:
            retention.delete_rows(connection, 1)
    work = StorageCleaner(farm)
    work.step()
    assert sql(farm, "SELECT count(*) FROM jobs WHERE removed_at IS NOT NULL") == [(0,)]
    assert audited(farm).ok
    sql(farm, "DELETE FROM events WHERE kind = 'job.removed'")
    assert [finding.job_id for finding in audited(farm).findings] == [job_id]


def test_a_job_removed_while_its_image_is_read_is_no_finding(
    farm: Farm, tenant: uuid.UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = submit(farm, tenant)
    worker = register_worker(farm)
    render(worker, worker.must_claim())
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


# Unreachable servers


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
    monkeypatch.setattr(auditing, "MAX_CONCURRENT_READS", 1)
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
