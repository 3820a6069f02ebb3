"""While the storage is away, finished pictures wait on disk. None is rendered again."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import pytest

from farm.config import Settings
from farm.context import Farm
from farm.domain.spec import FrameSpec, Priority
from farm.services import steering
from farm.storage import Artifacts, artifact_key
from farm.store import leases
from farm.store.circuit_breaker import TRIP_AFTER_FRAMES
from farm.store.claim import Lease
from farm.store.engine import transaction
from farm.store.leases import LeaseStatus
from tests.support.noise_family import Noise
from tests.support.store import attempts_of, frame_rows, job_row, sql, submit
from workers.render.assembly import Assembly
from workers.render.batch import RenderedBatch
from workers.render.finishing import MAX_BATCHES
from workers.render.loop import RenderLoop
from workers.render.scratch import Scratch
from workers.render.spool import FIRST_SECONDS, MAX_SECONDS, Spool
from workers.render.spool import MAX_BATCHES as MAX_KEPT


class Outage:
    """An outage of the storage: ends after `tries` tries with at least `files` pictures on disk."""

    def __init__(self, farm: Farm, assembly: Assembly, tries: int = 1, files: int = 0) -> None:
        self.farm, self.here, self.tries, self.files = farm, farm.artifacts, tries, files
        self.spool = assembly.spool
        self.kept: list[int] = []
        """Number of files on disk after each try."""
        self.waiting: list[int] = []
        """Number of waiting batches after each try."""
        self.then: Callable[[], None] = lambda: None
        """Extra action after each try."""
        nowhere = farm.settings.model_copy(update={"s3_endpoint_url": "http://127.0.0.1:1"})
        self.away = farm.artifacts = Artifacts(nowhere)
        self.spool.postpone = self.postpone  # type: ignore[method-assign]

    def postpone(self) -> None:
        self.kept.append(len(list(self.spool._folder.glob("*.png"))))
        self.waiting.append(len(self.spool))
        self.then()
        if len([kept for kept in self.kept if kept >= self.files]) == self.tries:
            self.farm.artifacts = self.here
            self.away.close()
        Spool.postpone(self.spool)


@pytest.fixture(autouse=True)
def _quick_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make each try fail at once: boto3 itself would wait between its tries."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")


def whole(farm: Farm, tenant: uuid.UUID, job_id: uuid.UUID) -> None:
    """Check that a job succeeded, that no frame was rendered twice, and its stored bytes."""
    assert job_row(farm, tenant, job_id).status == "succeeded"
    for ordinal, row in frame_rows(farm, job_id).items():
        # Frames claimed ahead are released when the spool is full; they were not rendered.
        assert {reason for _, reason in attempts_of(farm, job_id, ordinal)} <= {"released"}
        content = farm.artifacts.get(artifact_key(tenant, job_id, ordinal, row.sha256))
        assert (hashlib.sha256(content).digest(), len(content)) == (row.sha256, row.bytes)


def test_what_is_finished_meanwhile_is_stored_when_the_storage_is_back(
    farm: Farm, tenant: uuid.UUID, noise: Noise, loop: RenderLoop, assembly: Assembly
) -> None:
    job_id = submit(farm, tenant, pipeline="noise", images_per_prompt=12, max_attempts=1)
    outage = Outage(farm, assembly, tries=2, files=12)
    scratch, spooled = Scratch(farm.settings.scratch_dir, assembly.identity.id), []
    outage.then = lambda: spooled.append(scratch.spooled_bytes())
    loop.run()
    whole(farm, tenant, job_id)
    assert [len(batch) for batch in noise.batches] == [4, 4, 4]
    assert outage.kept[-2:] == [12, 12]
    stored = sum(row.bytes for row in frame_rows(farm, job_id).values())
    assert spooled[-2:] == [stored, stored]
    assert list(outage.spool._folder.iterdir()) == []
    assert outage.spool._bytes == scratch.spooled_bytes() == 0
    assert sql(farm, "SELECT count(*) FROM leases")[0][0] == 0
    assert sql(farm, "SELECT succeeded, batches FROM workers") == [(12, 3)]


@pytest.fixture
def _one_in_the_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.render.finishing.MAX_BATCHES", 1)


@pytest.mark.usefixtures("_one_in_the_tail")
@pytest.mark.parametrize("most_bytes", [1000, 0])  # room for about three pictures, or none
def test_a_full_spool_holds_the_line_back(
    farm: Farm,
    tenant: uuid.UUID,
    noise: Noise,
    loop: RenderLoop,
    assembly: Assembly,
    most_bytes: int,
) -> None:
    job_id = submit(farm, tenant, pipeline="noise", images_per_prompt=24)
    outage = Outage(farm, assembly, tries=4)
    outage.spool._max_bytes = most_bytes
    in_hand: list[int] = []

    def count() -> None:
        in_hand.append(sql(farm, "SELECT count(*) FROM leases WHERE NOT spooled")[0][0])

    outage.then = count
    loop.run()
    whole(farm, tenant, job_id)
    assert min(in_hand) == 0  # other workers may claim the released frames
    # One batch was spooled, one was denoised during this; four more could be claimed.
    assert max(outage.kept) <= 8


@pytest.mark.usefixtures("_one_in_the_tail")
def test_a_disk_that_refuses_holds_the_line_back(
    farm: Farm, tenant: uuid.UUID, noise: Noise, loop: RenderLoop, assembly: Assembly
) -> None:
    job_id = submit(farm, tenant, pipeline="noise", images_per_prompt=24)
    outage = Outage(farm, assembly, tries=4)
    outage.spool._folder.parent.parent.mkdir(parents=True, exist_ok=True)
    outage.spool._folder.parent.write_text("a file where the folder should be")
    loop.run()
    whole(farm, tenant, job_id)
    assert max(outage.kept) == 0
    assert max(outage.waiting) <= 2
    assert len(noise.batches) == 6


def test_a_kept_batch_that_is_cancelled_is_let_go(
    farm: Farm, tenant: uuid.UUID, noise: Noise, loop: RenderLoop, assembly: Assembly
) -> None:
    gone = submit(farm, tenant, pipeline="noise", images_per_prompt=4)
    stays = submit(farm, tenant, pipeline="noise", images_per_prompt=4)
    outage = Outage(farm, assembly)

    def disturb(claimed: Sequence[FrameSpec], step: int) -> None:
        if len(noise.batches) == 2 and step == 0:
            steering.cancel(farm, tenant, gone)

    noise.disturb = disturb
    loop.run()
    assert job_row(farm, tenant, gone).status == "cancelled"
    whole(farm, tenant, stays)
    assert list(outage.spool._folder.iterdir()) == []


def test_a_kept_batch_is_known_of_when_a_claim_s_reply_was_lost(
    farm: Farm,
    tenant: uuid.UUID,
    noise: Noise,
    loop: RenderLoop,
    assembly: Assembly,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Leases unknown to the child are released. Batches that wait in its spool are not."""
    job_id = submit(farm, tenant, pipeline="noise", images_per_prompt=8)
    Outage(farm, assembly)

    def disturb(claimed: Sequence[FrameSpec], step: int) -> None:
        assembly.claims.mark_uncertain()

    noise.disturb = disturb
    loop.run()
    whole(farm, tenant, job_id)


def test_a_kept_batch_shows_its_parent_that_it_is_looked_after(
    farm: Farm,
    tenant: uuid.UUID,
    noise: Noise,
    loop: RenderLoop,
    assembly: Assembly,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    submit(farm, tenant, pipeline="noise", images_per_prompt=4)
    Outage(farm, assembly, tries=3)
    touched: list[tuple[int, int]] = []

    def report_step(connection: object, lease: uuid.UUID, step: int, steps: int) -> LeaseStatus:
        touched.append((step, steps))
        return LeaseStatus(wanted=True)

    with monkeypatch.context() as patch:
        patch.setattr(leases, "report_step", report_step)
        loop.run()
    assert touched.count((10, 10)) >= 3  # at every try; the hook's own reports come in between


def test_at_every_end_of_a_kept_batch_the_next_has_just_been_looked_after(
    farm: Farm,
    tenant: uuid.UUID,
    noise: Noise,
    loop: RenderLoop,
    assembly: Assembly,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A child that stores one batch after another must not count as hung."""
    submit(farm, tenant, pipeline="noise", images_per_prompt=24)
    Outage(farm, assembly, tries=1, files=24)
    put, end = assembly.drain.put, assembly.committer.end
    fresh: list[bool] = []

    def put_late(batch: RenderedBatch) -> bool:
        stored = put(batch)
        sql(farm, "UPDATE leases SET stepped_at = stepped_at - interval '1 hour'")
        return stored

    def look(batches: Sequence[RenderedBatch]) -> None:
        if any(batch.account.spooled for batch in batches):
            others = "SELECT clock_timestamp() - max(stepped_at) FROM leases WHERE id <> :id"
            still = sql(farm, others, id=batches[0].lease.id)[0][0]
            if still is not None:
                fresh.append(still < timedelta(minutes=1))
        end(batches)

    monkeypatch.setattr(assembly.drain, "put", put_late)
    monkeypatch.setattr(assembly.committer, "end", look)
    loop.run()
    assert len(fresh) == 5
    assert all(fresh)


def test_what_is_kept_is_not_tried_at_once(tmp_path: Path) -> None:
    """No other picture is tried either: the storage has just refused one."""
    now = 0.0
    spool = Spool(tmp_path, 1, lambda: now)
    lease = Lease(uuid.uuid4(), uuid.uuid4(), "noise", Priority.BULK, ())
    batch = RenderedBatch(lease, lease.frames)
    assert not spool.away
    spool.keep(batch)
    assert spool.away
    assert spool.oldest() is None
    now = FIRST_SECONDS
    assert spool.oldest() is batch
    spool.end()
    assert not spool.away


def test_tries_are_further_and_further_apart(tmp_path: Path) -> None:
    now = 0.0
    spool = Spool(tmp_path, 1, lambda: now)
    pauses = []
    for _ in range(200):
        spool.postpone()
        pauses.append(spool._due - now)
        assert spool.oldest() is None
        now = spool._due
    assert max(pauses[:1]) <= FIRST_SECONDS
    assert MAX_SECONDS / 2 < max(pauses) <= MAX_SECONDS
    assert min(pauses[10:]) < MAX_SECONDS / 2  # full jitter: any pause below the maximum


def test_pictures_that_were_taken_away_are_rendered_again(
    farm: Farm,
    tenant: uuid.UUID,
    settings: Settings,
    noise: Noise,
    loop: RenderLoop,
    assembly: Assembly,
) -> None:
    """Someone empties the folder. The attempt ends like any failed one."""
    job_id = submit(farm, tenant, pipeline="noise")
    outage = Outage(farm, assembly)

    def empty() -> None:
        for path in outage.spool._folder.glob("*.png"):
            path.unlink()

    outage.then = empty
    loop.run()
    assert job_row(farm, tenant, job_id).status == "succeeded"
    assert attempts_of(farm, job_id) == [(1, "render_error")]


def test_all_that_a_worker_holds_is_given_back_at_once(
    farm: Farm, tenant: uuid.UUID, noise: Noise, loop: RenderLoop, assembly: Assembly
) -> None:
    """The parent does this when its time is up. The child stops, and no frame is charged."""
    job_id = submit(farm, tenant, pipeline="noise", images_per_prompt=8, max_attempts=1)
    outage = Outage(farm, assembly, tries=99)
    [worker_id] = sql(farm, "SELECT id FROM workers")[0]

    def give_up() -> None:
        with transaction(farm.store) as connection:
            leases.release_all(connection, worker_id)
            sql(farm, "UPDATE workers SET draining = true")

    outage.then = give_up
    loop.run()
    rows = frame_rows(farm, job_id)
    assert {row.state for row in rows.values()} == {"ready"}
    assert {attempts_of(farm, job_id, ordinal)[0] for ordinal in rows} == {(1, "released")}
    assert sql(farm, "SELECT count(*) FROM leases")[0][0] == 0
    assert sql(farm, "SELECT DISTINCT uncharged FROM frames") == [(1,)]


def test_a_storage_that_refuses_this_worker_is_left_to_others(
    farm: Farm, tenant: uuid.UUID, noise: Noise, loop: RenderLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its clock or its credentials are wrong. Waiting would not help, and no frame is at fault."""
    job_id = submit(farm, tenant, pipeline="noise", images_per_prompt=20, bucket=1, max_attempts=1)
    here, farm.artifacts = farm.artifacts, Artifacts(farm.settings)
    with monkeypatch.context() as wrong:
        wrong.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        wrong.setattr("boto3.DEFAULT_SESSION", None)  # it caches the correct one
        loop.run()
    farm.artifacts.close()
    # Pictures denoised before the storage's third refusal are refused too.
    assert TRIP_AFTER_FRAMES <= len(noise.batches) <= TRIP_AFTER_FRAMES + MAX_BATCHES + 1
    assert sql(farm, "SELECT DISTINCT reason FROM attempts") == [("storage_refused",)]
    assert sql(farm, "SELECT DISTINCT attempt - uncharged FROM frames") == [(0,)]
    farm.artifacts = here
    sql(farm, "UPDATE workers SET tripped_until = clock_timestamp()")
    loop.run()
    assert job_row(farm, tenant, job_id).status == "succeeded"


def test_a_kept_batch_that_the_database_refuses_is_not_kept_for_ever(
    farm: Farm, tenant: uuid.UUID, noise: Noise, loop: RenderLoop, assembly: Assembly
) -> None:
    job_id = submit(farm, tenant, pipeline="noise", images_per_prompt=2, max_attempts=1)
    outage = Outage(farm, assembly)
    sql(farm, "ALTER TABLE frames ADD CHECK (bytes < 10)")
    loop.run()
    assert len(outage.spool) == 0
    assert job_row(farm, tenant, job_id).status == "failed"
    assert sql(farm, "SELECT count(*) FROM leases")[0][0] == 0


@pytest.mark.parametrize(("kept", "full"), [(MAX_KEPT - 1, False), (MAX_KEPT, True)])
def test_it_is_full_with_so_many_batches(tmp_path: Path, kept: int, full: bool) -> None:
    spool = Spool(tmp_path / "pictures", 2**30)
    lease = Lease(uuid.uuid4(), uuid.uuid4(), "noise", Priority.NORMAL, ())
    spool._batches.extend(RenderedBatch(lease, ()) for _ in range(kept))
    assert spool.full is full
