"""The render line with a family of the test's own: every way that a batch can end."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import threading
import time
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sqlalchemy.exc import DataError

from farm import jobs
from farm.artifacts import artifact_key
from farm.context import Farm
from farm.encoding import pixels_as_stored, read
from farm.errors import RenderError
from farm.formats import Format
from farm.spec import FrameSpec
from farm.store import frames, leases, workers
from farm.store.claim import Lease
from farm.store.engine import transaction
from farm.store.frames import Done
from tests.farming import (
    Hand,
    attempts_of,
    fence,
    frame_rows,
    hire,
    job_row,
    let_leases_expire,
    new_tenant,
    sql,
    submit,
)
from tests.noise import Noise
from tests.waiting import wait_until
from workers.child import Child
from workers.line import RenderLine
from workers.scratch import NO_LEASE
from workers.spool import Finished
from workers.tail import ENCODERS
from workers.watch import LeaseWatch


def sums(farm: Farm) -> dict[str, Any]:
    with transaction(farm.store) as connection:
        return dict(workers.sums(connection)[0]._mapping)


def test_a_batch_is_rendered_stored_and_completed(
    farm: Farm, tenant: uuid.UUID, noise: Noise, line: RenderLine
) -> None:
    job_id = submit(farm, tenant, pipeline="noise", images_per_prompt=6, seed=1)
    line.run()
    assert job_row(farm, tenant, job_id).status == "succeeded"
    assert [len(batch) for batch in noise.batches] == [4, 4]  # the short one is padded
    for ordinal, row in frame_rows(farm, job_id).items():
        content = farm.artifacts.get(artifact_key(tenant, job_id, ordinal, row.sha256))
        assert (hashlib.sha256(content).digest(), len(content)) == (row.sha256, row.bytes)
        image, provenance, _ = read(content)
        expected = np.random.default_rng(1 + ordinal).integers(0, 255, (8, 8, 3), np.uint8)
        assert (np.asarray(image) == expected).all()
        assert provenance.frame.seed == 1 + ordinal
        assert provenance.frame.bucket == 4
        assert row.slot == ordinal % 4
    told = sums(farm)
    assert (told["succeeded"], told["batches"]) == (6, 2)
    assert told["denoise_seconds"] > 0 < told["encode_seconds"]
    assert sql(farm, "SELECT count(*) FROM leases")[0][0] == 0


def test_the_busy_share_is_that_of_the_clock(
    farm: Farm, tenant: uuid.UUID, noise: Noise, line: RenderLine
) -> None:
    """Against a stopwatch of the test's own, around every denoise and around the whole run."""
    denoised: list[float] = []

    def disturb(frames: Sequence[FrameSpec], step: int) -> None:
        if step == 0:
            denoised.append(-time.monotonic())
        threading.Event().wait(0.01)
        if step == 9:
            denoised[-1] += time.monotonic()

    noise.disturb = disturb
    submit(farm, tenant, pipeline="noise", images_per_prompt=12)
    started = time.monotonic()
    line.run()
    whole = time.monotonic() - started
    with transaction(farm.store) as connection:
        [worker] = workers.list_workers(connection)
    assert len(denoised) == 3
    assert sum(denoised) / whole <= worker.busy <= 1
    assert sums(farm)["work_seconds"] <= whole


class Encodings:
    """Notes what a line's tail encodes, and how many pictures at once."""

    def __init__(self, line: RenderLine, monkeypatch: pytest.MonkeyPatch) -> None:
        self._encode, self._lock = line._tail._encoder.encode, threading.Lock()
        self.seeds: list[int] = []
        self.now = self.most = 0
        monkeypatch.setattr(line._tail._encoder, "encode", self)

    def __call__(self, image: Image.Image, frame: FrameSpec) -> bytes:
        with self._lock:
            self.seeds.append(frame.seed)
            self.now += 1
            self.most = max(self.most, self.now)
        threading.Event().wait(0.02)
        content = self._encode(image, frame)
        with self._lock:
            self.now -= 1
        return content


def test_pictures_are_taken_up_when_the_device_has_its_next_batch(
    farm: Farm,
    tenant: uuid.UUID,
    noise: Noise,
    line: RenderLine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encodings, ahead, begin = Encodings(line, monkeypatch), line._claims.ahead, line._begin
    monkeypatch.setattr(line._claims, "ahead", lambda *_: ahead(0.0, 0.0))
    before: list[list[int]] = []

    def begin_watched(lease: Lease) -> tuple[Finished, LeaseWatch]:
        threading.Event().wait(0.2 if before else 0.0)
        before.append(encodings.seeds[:])
        return begin(lease)

    def disturb(frames: Sequence[FrameSpec], step: int) -> None:
        if step == 5:  # until now the next batch is claimed, and later the one before encoded
            wait_until(lambda: line._claims.is_ahead or frames[0].seed == 4, 10, "it was ahead")
            wait_until(lambda: len(encodings.seeds) >= frames[0].seed, 10, "it was encoded")

    monkeypatch.setattr(line, "_begin", begin_watched)
    noise.disturb = disturb
    submit(farm, tenant, pipeline="noise", images_per_prompt=8, seed=0)
    line.run()
    assert before == [[], []]
    assert sorted(encodings.seeds) == [*range(8)]
    assert encodings.most <= ENCODERS  # a core is left to the device's thread


def test_the_next_batch_is_claimed_before_the_last_step(
    farm: Farm, tenant: uuid.UUID, noise: Noise, line: RenderLine
) -> None:
    """After it would be late, and a step may be longer than a claim."""
    begun: list[int] = []

    def disturb(frames: Sequence[FrameSpec], step: int) -> None:
        line._claims._seconds = 0.0  # however long the first one took
        threading.Event().wait(0.1)
        if line._claims._ahead is not None and len(noise.batches) == 1:
            begun.append(step)

    noise.disturb = disturb
    submit(farm, tenant, pipeline="noise", images_per_prompt=8)
    line.run()
    assert 9 in begun


def test_an_interactive_picture_does_not_queue_behind_the_encoding_of_others(
    farm: Farm, tenant: uuid.UUID, line: RenderLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line._tail, "_encoding", None)  # who would wait for it fails
    for priority, status in (("interactive", "succeeded"), ("bulk", "failed")):
        job_id = submit(farm, tenant, pipeline="noise", priority=priority, max_attempts=1)
        line.run()
        assert job_row(farm, tenant, job_id).status == status


def test_pictures_are_taken_up_at_once_where_no_batch_is_at_hand(
    farm: Farm,
    tenant: uuid.UUID,
    noise: Noise,
    line: RenderLine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encodings, claim = Encodings(line, monkeypatch), line._claims.next
    monkeypatch.setattr(line._claims, "ahead", lambda *_: None)

    def claim_late() -> Lease | None:
        done = 4 * len(noise.batches)
        wait_until(lambda: len(encodings.seeds) == done, 10, "the batch before was encoded")
        return claim()

    monkeypatch.setattr(line._claims, "next", claim_late)
    job_id = submit(farm, tenant, pipeline="noise", images_per_prompt=8, seed=0)
    line.run()
    assert job_row(farm, tenant, job_id).status == "succeeded"


@pytest.mark.parametrize(("form", "extension"), [("jpeg", "jpg"), ("webp", "webp")])
def test_pictures_are_stored_in_the_jobs_format(
    farm: Farm, tenant: uuid.UUID, line: RenderLine, form: Format, extension: str
) -> None:
    job_id = submit(farm, tenant, pipeline="noise", seed=1, format=form)
    line.run()
    row = frame_rows(farm, job_id)[0]
    key = artifact_key(tenant, job_id, 0, row.sha256, form)
    assert key.endswith(f".{extension}")
    content = farm.artifacts.get(key)
    assert (hashlib.sha256(content).digest(), len(content)) == (row.sha256, row.bytes)
    image, provenance, found = read(content)
    assert (found, provenance.frame.format, provenance.frame.seed) == (form, form, 1)
    drawn = Image.fromarray(np.random.default_rng(1).integers(0, 255, (8, 8, 3), np.uint8))
    assert image.tobytes() == pixels_as_stored(drawn, form).tobytes()


def test_jobs_of_different_formats_share_a_batch(
    farm: Farm, tenant: uuid.UUID, noise: Noise, line: RenderLine
) -> None:
    jobs_of = {
        form: submit(farm, tenant, pipeline="noise", bucket=4, images_per_prompt=2, format=form)
        for form in ("png", "webp")
    }
    line.run()
    assert len(noise.batches) == 1
    for job_id in jobs_of.values():
        assert job_row(farm, tenant, job_id).status == "succeeded"


def test_a_cancelled_batch_stops_between_two_steps(
    farm: Farm, tenant: uuid.UUID, noise: Noise, line: RenderLine
) -> None:
    job_id = submit(farm, tenant, pipeline="noise", images_per_prompt=4)
    steps: list[int] = []

    def disturb(frames: Sequence[FrameSpec], step: int) -> None:
        steps.append(step)
        if step == 2:
            jobs.cancel(farm, tenant, job_id)
        if step > 2:
            threading.Event().wait(0.1)  # a step of a real pipeline takes its time

    noise.disturb = disturb
    line.run()
    assert 3 <= len(steps) < 10
    assert job_row(farm, tenant, job_id).status == "cancelled"
    assert {row.state for row in frame_rows(farm, job_id).values()} == {"cancelled"}
    assert sql(farm, "SELECT count(*) FROM leases")[0][0] == 0


def test_a_batch_goes_on_while_one_frame_of_it_is_wanted(
    farm: Farm, tenant: uuid.UUID, noise: Noise, line: RenderLine
) -> None:
    first = submit(farm, tenant, pipeline="noise", images_per_prompt=2, bucket=4)
    second = submit(farm, tenant, pipeline="noise", images_per_prompt=2, bucket=4)

    def disturb(frames: Sequence[FrameSpec], step: int) -> None:
        if step == 2:
            jobs.cancel(farm, tenant, first)
        threading.Event().wait(0.03)

    noise.disturb = disturb
    line.run()
    assert len(noise.batches) == 1
    assert job_row(farm, tenant, first).status == "cancelled"
    assert job_row(farm, tenant, second).status == "succeeded"
    assert sums(farm)["dropped"] == 2


def test_a_batch_whose_lease_is_lost_is_dropped(
    farm: Farm,
    tenant: uuid.UUID,
    noise: Noise,
    line: RenderLine,
    caplog: pytest.LogCaptureFixture,
) -> None:
    job_id = submit(farm, tenant, pipeline="noise", images_per_prompt=2)
    lost: list[int] = []

    def disturb(frames: Sequence[FrameSpec], step: int) -> None:
        if step == 9 and not lost:  # too late for the hook to see it
            lost.append(step)
            let_leases_expire(farm)

    noise.disturb = disturb
    with caplog.at_level(logging.WARNING):
        line.run()
    assert job_row(farm, tenant, job_id).status == "succeeded"
    assert attempts_of(farm, job_id) == [(1, "lease_expired")]
    assert f"job {job_id} frame 0 attempt 1 was dropped" in caplog.text
    assert {row.attempt for row in frame_rows(farm, job_id).values()} == {2}


def test_an_error_ends_in_attempts_and_then_dead(
    farm: Farm, tenant: uuid.UUID, noise: Noise, line: RenderLine
) -> None:
    job_id = submit(farm, tenant, pipeline="noise")

    def disturb(frames: Sequence[FrameSpec], step: int) -> None:
        raise RuntimeError("a\x00b")

    noise.disturb = disturb
    line.run()
    assert job_row(farm, tenant, job_id).status == "failed"
    assert attempts_of(farm, job_id) == [(attempt, "render_error") for attempt in (1, 2, 3)]
    stored = sql(farm, "SELECT message, traceback FROM attempts WHERE attempt = 3")[0]
    assert stored.message == "RuntimeError: ab"
    assert "in disturb" in stored.traceback
    assert sums(farm)["dead"] == 1


def test_a_failpoint_acts_on_the_frames_that_name_it(
    farm: Farm, tenant: uuid.UUID, line: RenderLine
) -> None:
    development = {"environment": "development", "failpoints": "render.step=oom:BIG"}
    farm.settings = farm.settings.model_copy(update=development)
    prompts = ["a BIG star", "a star"]
    job_id = submit(farm, tenant, pipeline="noise", prompts=prompts, bucket=1, max_attempts=1)
    line.run()
    line.out_of_memory = False  # as in a fresh child
    line.run()
    assert [row.state for row in frame_rows(farm, job_id).values()] == ["dead", "succeeded"]
    assert attempts_of(farm, job_id) == [(1, "out_of_memory")]


def test_an_error_that_no_retry_can_help_is_dead_at_once(
    farm: Farm, tenant: uuid.UUID, noise: Noise, line: RenderLine
) -> None:
    job_id = submit(farm, tenant, pipeline="noise")

    def disturb(frames: Sequence[FrameSpec], step: int) -> None:
        raise RenderError("This cannot be drawn.")

    noise.disturb = disturb
    line.run()
    assert attempts_of(farm, job_id) == [(1, "render_error")]
    assert frame_rows(farm, job_id)[0].error == "This cannot be drawn."


def test_postgres_away_at_the_commit_loses_nothing(
    farm: Farm, tenant: uuid.UUID, noise: Noise, line: RenderLine
) -> None:
    """Every connection is cut while the batch denoises; the commit is tried again."""
    job_id = submit(farm, tenant, pipeline="noise", images_per_prompt=4)

    def disturb(frames: Sequence[FrameSpec], step: int) -> None:
        if step == 9:
            sql(
                farm,
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()",
            )

    noise.disturb = disturb
    line.run()
    assert job_row(farm, tenant, job_id).status == "succeeded"
    assert attempts_of(farm, job_id) == []


def test_a_batch_that_cannot_be_written_is_given_back(
    farm: Farm, tenant: uuid.UUID, noise: Noise, line: RenderLine
) -> None:
    """Postgres refuses the row itself: the attempts fail, and no lease is left to be renewed.

    The first is not charged: another frame of the batch might have been why.
    """
    job_id = submit(farm, tenant, pipeline="noise", images_per_prompt=2)
    sql(farm, "ALTER TABLE frames ADD CHECK (bytes < 10)")
    line.run()
    assert sql(farm, "SELECT count(*) FROM leases")[0][0] == 0
    assert attempts_of(farm, job_id) == [(attempt, "render_error") for attempt in (1, 2, 3, 4)]
    assert job_row(farm, tenant, job_id).status == "failed"


def test_a_frame_that_fails_costs_its_neighbours_nothing(
    farm: Farm, tenant: uuid.UUID, noise: Noise, line: RenderLine
) -> None:
    """Two tenants share a batch: what is wrong with one's frame is the other's neither to bear
    nor to read."""
    other = new_tenant(farm, "other")
    guilty = submit(farm, tenant, pipeline="noise", prompts=["guilty"], max_attempts=1, bucket=4)
    healthy = submit(farm, other, pipeline="noise", prompts=["a"], max_attempts=1, bucket=4)

    def disturb(frames: Sequence[FrameSpec], step: int) -> None:
        if any(frame.prompt == "guilty" for frame in frames):
            raise RenderError("A secret of the guilty.")

    noise.disturb = disturb
    line.run()
    assert len({frame.prompt for frame in noise.batches[0]}) == 2
    assert job_row(farm, other, healthy).status == "succeeded"
    assert frame_rows(farm, healthy)[0].error is None
    told = sql(farm, "SELECT message FROM attempts WHERE job_id = :id", id=healthy)
    assert told == [("Its batch failed; it is tried again without the others.",)]
    assert job_row(farm, tenant, guilty).status == "failed"
    assert frame_rows(farm, guilty)[0].error == "A secret of the guilty."


def test_a_claim_whose_reply_was_lost_is_found_again(
    farm: Farm, tenant: uuid.UUID, noise: Noise, line: RenderLine
) -> None:
    """The child does not know of its lease, so it gives it back before it claims."""
    job_id = submit(farm, tenant, pipeline="noise", images_per_prompt=4)
    worker_id = sql(farm, "SELECT id FROM workers")[0].id
    forgotten = Hand(farm, worker_id, "forgetful", os.getpid()).claim("noise")
    assert forgotten is not None
    line.run()
    assert job_row(farm, tenant, job_id).status == "succeeded"
    assert attempts_of(farm, job_id) == [(1, "released")]
    assert sql(farm, "SELECT count(*) FROM leases")[0][0] == 0


def test_a_commit_whose_reply_was_lost_is_known_again(farm: Farm, tenant: uuid.UUID) -> None:
    job_id = submit(farm, tenant)
    hand = hire(farm)
    lease = hand.must_claim()
    done = [Done(fence(lease.frames[0]), b"\x01" * 32, 10, 0)]
    with transaction(farm.store) as connection:
        assert not frames.already_complete(connection, done)
        assert frames.complete(connection, lease.id, done)
    with transaction(farm.store) as connection:
        assert not frames.complete(connection, lease.id, done)
        assert frames.already_complete(connection, done)
        other = [Done(fence(lease.frames[0]), b"\x02" * 32, 10, 0)]
        assert not frames.already_complete(connection, other)
    assert job_row(farm, tenant, job_id).succeeded == 1


def test_a_full_batch_wakes_another_worker(farm: Farm, tenant: uuid.UUID, line: RenderLine) -> None:
    other = new_tenant(farm, "other")
    submit(farm, other, pipeline="noise", images_per_prompt=8)
    connection = farm.bells._redis
    connection.flushdb()
    line.run()
    assert connection.llen("render.noise") == 2  # one a full batch, and never more than two
    submit(farm, tenant, pipeline="noise", images_per_prompt=80)
    line.run()
    assert connection.llen("render.noise") == 2


def test_progress_is_told_while_a_batch_denoises(
    farm: Farm, tenant: uuid.UUID, noise: Noise, line: RenderLine
) -> None:
    submit(farm, tenant, pipeline="noise")
    seen: list[tuple[int, int]] = []

    def told() -> bool:
        rows = sql(farm, "SELECT step, steps FROM leases")
        seen.extend((row.step, row.steps) for row in rows)
        return any(row.step > 0 for row in rows)

    def disturb(frames: Sequence[FrameSpec], step: int) -> None:
        if step == 5:
            wait_until(told, 10.0, "the fifth step was told")

    noise.disturb = disturb
    line.run()
    assert (5, 10) in seen


def test_an_unreadable_picture_is_refused(farm: Farm) -> None:
    from farm.errors import InvalidRequest

    for content in (b"", b"not a picture", _bare_png()):
        with pytest.raises(InvalidRequest):
            read(content)


def _bare_png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_broken_tail_ends_its_process_and_claims_nothing_more(
    farm: Farm,
    tenant: uuid.UUID,
    noise: Noise,
    line: RenderLine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("It broke.")

    monkeypatch.setattr(line._tail._ending, "end", broken)
    submit(farm, tenant, pipeline="noise", images_per_prompt=40)
    child = Child(farm, line._identity)
    child._line = line
    assert child.answer() is False
    assert 1 <= len(noise.batches) < 10
    with transaction(farm.store) as connection:
        for _, suspected in leases.lose(
            connection, line._identity.id, os.getpid(), "It ended.", 0.0, None, NO_LEASE
        ):
            assert suspected is None
    assert sql(farm, "SELECT count(*) FROM leases")[0][0] == 0
    assert sql(farm, "SELECT sum(spared), count(*) FROM frames WHERE state = 'ready'")[0][0] > 0


def test_a_tenant_is_not_told_what_is_asked_of_the_database(
    farm: Farm, tenant: uuid.UUID, noise: Noise, line: RenderLine
) -> None:
    def refuse(_frames: Sequence[FrameSpec], _step: int) -> None:
        raise DataError("SELECT a_secret", {}, Exception("no"))

    noise.disturb = refuse
    job_id = submit(farm, tenant, pipeline="noise", max_attempts=1)
    line.run()
    [message] = sql(farm, "SELECT message FROM attempts WHERE job_id = :id", id=job_id)
    assert message == ("DataError",)
