"""A batch whose process is gone: charging, the stored last output, and retry delays."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from farm.context import Farm
from farm.errors import FarmError
from farm.pipelines.family import StopBatch
from farm.store import job_commands, leases, workers
from farm.store.engine import transaction
from farm.store.frames import MAX_UNCHARGED_LOSSES
from tests.support.api_server import serving
from tests.support.noise_family import Noise
from tests.support.store import (
    attempts_of,
    frame_rows,
    job_row,
    let_leases_expire,
    register_worker,
    sql,
    state_of,
    submit,
)
from tests.support.waiting import wait_until
from workers.render.assembly import Assembly
from workers.render.batch_log import BatchLog
from workers.render.identity import Identity
from workers.render.loop import RenderLoop
from workers.render.parent import ENDED, WorkerSupervisor, is_running_child
from workers.render.scratch import NO_LEASE, SHOWN_BYTES, Scratch


def all_due(farm: Farm) -> None:
    sql(farm, "UPDATE requeued_frames SET not_before = clock_timestamp() - interval '1 second'")


@pytest.mark.parametrize("reason", ["worker_lost", "lease_expired"])
def test_a_lost_batch_charges_nobody_and_a_lost_frame_its_own(
    farm: Farm, tenant: uuid.UUID, reason: str
) -> None:
    worker = register_worker(farm)
    job_id = submit(farm, tenant, images_per_prompt=8, bucket=8, max_attempts=3)

    def lose() -> None:
        if reason == "worker_lost":
            worker.lose()
        else:
            let_leases_expire(farm)

    assert len(worker.must_claim().frames) == 8
    lose()
    assert {(row.state, row.attempt) for row in frame_rows(farm, job_id).values()} == {("ready", 1)}
    assert sql(farm, "SELECT DISTINCT uncharged FROM frames") == [(1,)]
    deaths = 1
    while job_row(farm, tenant, job_id).status == "running":
        all_due(farm)
        lease = worker.must_claim()
        [frame] = lease.frames
        if frame.ordinal == 5:
            deaths += 1
            lose()
        else:
            worker.complete(lease)
    rows = frame_rows(farm, job_id)
    assert [row.state for row in rows.values()].count("succeeded") == 7
    assert rows[5].state == "dead"
    assert attempts_of(farm, job_id, 5) == [(attempt, reason) for attempt in (1, 2, 3, 4)]
    assert deaths == 4  # the batch's, and its own three


def test_a_frame_that_took_its_child_down_waits_for_what_loading_costs(
    farm: Farm, tenant: uuid.UUID
) -> None:
    worker = register_worker(farm)
    with transaction(farm.store) as connection:
        workers.set_state(connection, worker.id, "idle", load_seconds=5.0)
    submit(farm, tenant)
    worker.must_claim()
    worker.lose()
    [row] = sql(
        farm,
        "SELECT extract(epoch FROM not_before - clock_timestamp())::float FROM requeued_frames",
    )
    assert 0.9 * leases.RETRY_DELAY_PER_LOAD * 5.0 < row[0] <= leases.RETRY_DELAY_PER_LOAD * 5.0


def test_an_operator_reads_the_last_words_and_a_tenant_does_not(
    farm: Farm, tenant: uuid.UUID
) -> None:
    worker = register_worker(farm)
    job_id = submit(farm, tenant)
    assert len(worker.must_claim().frames) == 1
    worker.lose("The child ended: signal 11.", "Fatal Python error: Segmentation fault")
    told = {"operator": "Fatal Python error: Segmentation fault", "client": None, "viewer": None}
    with serving(farm) as api:
        for role, log in told.items():
            client = api.client("default", role)
            for frame in (
                client.get(f"/v1/jobs/{job_id}/frames/0").json(),
                client.get(f"/v1/jobs/{job_id}/frames").json()["data"][0],
            ):
                [attempt] = frame["attempts"]
                assert attempt["message"] == "The child ended: signal 11."
                assert attempt["log"] == log


SPEAK = """
import ctypes, logging, sys
from pathlib import Path
from typing import Any
from workers.render.batch_log import BatchLog
words = BatchLog(Path(sys.argv[1]))
words.listen()
logging.getLogger("a").warning("of the batch before")
words.begin()
logging.getLogger("b").warning("of this \\ud800 batch")
ctypes.string_at(0)
"""


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Scratch]:
    scratch = Scratch(tmp_path / "scratch", uuid.uuid4())
    with scratch.held():
        yield scratch


def test_words_outlive_a_crash(scratch: Scratch) -> None:
    run = subprocess.run(
        [sys.executable, "-c", SPEAK, str(scratch.log(7))], check=False, capture_output=True
    )
    assert run.returncode == -11
    said = scratch.log_tail(7)
    assert said is not None
    assert "of the batch before" not in said
    assert "WARNING b: of this ? batch" in said
    assert "Segmentation fault" in said
    assert "ctypes" in said  # the Python stack
    scratch.forget(7)
    assert scratch.log_tail(7) is None


def test_words_are_shown_from_their_end(scratch: Scratch) -> None:
    words = BatchLog(scratch.log(7))
    for number in range(2000):
        words.handle(logging.makeLogRecord({"msg": f"line {number}", "levelno": 20}))
    said = scratch.log_tail(7)
    assert said is not None
    assert len(said) <= SHOWN_BYTES
    assert said.endswith("line 1999")
    words.close()


HOLD = """
import sys, uuid
from pathlib import Path
from typing import Any
from workers.render.scratch import Scratch
with Scratch(Path(sys.argv[1]), uuid.UUID(int=int(sys.argv[2]))).held():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_folders_of_workers_that_were_killed_are_swept(tmp_path: Path) -> None:
    root = tmp_path / "scratch"

    def hold(number: int) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(root), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        return process

    def folders() -> set[str]:
        return {path.name for path in root.iterdir() if path.is_dir()}

    killed, alive = hold(1), hold(2)
    killed.kill()
    killed.communicate()
    assert len(folders()) == 2
    mine = Scratch(root, uuid.UUID(int=3))
    with mine.held():
        assert folders() == {f"worker-{uuid.UUID(int=number)}" for number in (2, 3)}
        assert mine.folder.stat().st_mode & 0o777 == 0o700
    assert folders() == {f"worker-{uuid.UUID(int=2)}"}
    alive.communicate(b"")
    assert alive.returncode == 0
    assert folders() == set()


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with (
        pytest.raises(FarmError, match=r"FARM_SCRATCH_DIR: .* others can write to it"),
        Scratch(tmp_path, uuid.uuid4()).held(),
    ):
        raise AssertionError
    with (
        pytest.raises(FarmError, match=r"FARM_SCRATCH_DIR: .* cannot be used"),
        Scratch(Path("/proc/none"), uuid.uuid4()).held(),
    ):
        raise AssertionError


def test_unfinished_loads_are_counted(scratch: Scratch) -> None:
    assert scratch.unfinished_loads() == 0
    scratch.begin_load()
    scratch.begin_load()
    assert scratch.unfinished_loads() == 2
    scratch.end_load()
    assert scratch.unfinished_loads() == 0


def test_a_folder_that_is_gone_stops_nobody(tmp_path: Path) -> None:
    gone = Scratch(tmp_path / "gone", uuid.uuid4())
    gone.begin_load()
    gone.end_load()
    gone.forget(1)
    words = BatchLog(gone.log(1))
    words.begin()
    words.handle(logging.makeLogRecord({"msg": "into the void", "levelno": 20}))
    words.close()
    assert gone.log_tail(1) is None


def test_all_leases_of_a_worker_are_given_back(farm: Farm, tenant: uuid.UUID) -> None:
    mine, other = register_worker(farm, "mine"), register_worker(farm, "other")
    job_id = submit(farm, tenant, images_per_prompt=24, bucket=8, max_attempts=1)
    held = [mine.must_claim(), mine.must_claim(), other.must_claim()]
    with transaction(farm.store) as connection:
        assert leases.release_all(connection, mine.id) == {"demo"}
        assert leases.release_all(connection, mine.id) == set()
    assert mine.complete(held[0]) == set()
    assert len(other.complete(held[2])) == 8
    states = [row.state for row in frame_rows(farm, job_id).values()]
    assert (states.count("ready"), states.count("succeeded")) == (16, 8)
    assert len(mine.must_claim().frames) == 8  # in one batch again: no frame was at fault


def test_what_a_lost_child_only_kept_is_nobody_s_fault(farm: Farm, tenant: uuid.UUID) -> None:
    """Twenty pictures wait for the storage. The next frame crashes the process."""
    worker = register_worker(farm)
    job_id = submit(farm, tenant, images_per_prompt=21, bucket=1, max_attempts=1)
    for _ in range(20):
        lease = worker.must_claim()
        with transaction(farm.store) as connection:
            leases.mark_spooled(connection, lease.id)
    worker.must_claim()
    with transaction(farm.store) as connection:
        lost = leases.end_child_leases(connection, worker.id, worker.pid, "It ended.", 0.0)
    assert [fence for _, fence in lost if fence is not None] == [(job_id, 20, 1)]
    rows = frame_rows(farm, job_id)
    assert [rows[ordinal].state for ordinal in range(21)] == ["ready"] * 20 + ["dead"]
    assert sql(farm, "SELECT count(*) FROM requeued_frames WHERE isolated") == [(0,)]


def test_alone_stays_alone_whatever_comes_next(farm: Farm, tenant: uuid.UUID) -> None:
    """A suspect released uncharged still gets no neighbours. A retry of dead frames clears it."""
    worker = register_worker(farm)
    job_id = submit(farm, tenant, images_per_prompt=8, bucket=8, max_attempts=1)
    worker.must_claim()
    worker.lose()
    all_due(farm)
    for lease in [worker.must_claim(), worker.must_claim()]:  # two frames that could share a batch
        worker.release(lease)
    for _ in range(8):
        lease = worker.must_claim()
        assert len(lease.frames) == 1
        worker.fail(lease)
    assert job_row(farm, tenant, job_id).status == "failed"
    with transaction(farm.store) as connection:
        assert job_commands.retry_job(connection, tenant, job_id).frames == 8
    assert len(worker.must_claim().frames) == 8


def test_only_what_was_on_the_device_is_suspected(farm: Farm, tenant: uuid.UUID) -> None:
    """Frames that the child stored or had claimed ahead did not cause its end."""
    submit(farm, tenant, images_per_prompt=3, bucket=1, max_attempts=1)
    worker = register_worker(farm)
    stored, denoised, ahead = [worker.must_claim() for _ in range(3)]
    with transaction(farm.store) as connection:
        lost = leases.end_child_leases(
            connection, worker.id, worker.pid, "It ended.", 0.0, "words", denoised.id
        )
    [guilty] = denoised.frames
    assert [fence for _, fence in lost if fence] == [guilty.fence]
    assert state_of(farm, guilty.job_id, guilty.ordinal) == "dead"
    for lease in (stored, ahead):
        [frame] = lease.frames
        assert state_of(farm, frame.job_id, frame.ordinal) == "ready"
        [row] = sql(
            farm, "SELECT uncharged, isolated FROM frames WHERE ordinal = :n", n=frame.ordinal
        )
        assert row == (1, False)
    told = sql(farm, "SELECT ordinal, traceback FROM attempts ORDER BY ordinal")
    assert [(row.ordinal, row.traceback) for row in told if row.traceback] == [
        (guilty.ordinal, "words")
    ]


def test_a_frame_that_is_never_suspected_is_charged_in_the_end(
    farm: Farm, tenant: uuid.UUID
) -> None:
    job_id = submit(farm, tenant, images_per_prompt=1, max_attempts=2)
    worker = register_worker(farm)
    losses = MAX_UNCHARGED_LOSSES + 2
    other = submit(farm, tenant, images_per_prompt=losses, bucket=1, priority="bulk")
    for _ in range(losses):
        lease = worker.must_claim()
        assert lease.frames[0].job_id == job_id
        innocent = worker.must_claim()
        with transaction(farm.store) as connection:
            leases.end_child_leases(
                connection, worker.id, worker.pid, "It ended.", 0.0, None, innocent.id
            )
        sql(farm, "UPDATE requeued_frames SET not_before = clock_timestamp()")
        sql(farm, "UPDATE workers SET failing = '{}', trips = 0, tripped_until = NULL")
    assert state_of(farm, job_id) == "dead"
    assert job_row(farm, tenant, other).status == "running"


@pytest.mark.parametrize("hangs", [True, False])
def test_a_child_is_judged_by_what_is_on_its_device(
    farm: Farm, tenant: uuid.UUID, hangs: bool
) -> None:
    """Batches that wait for the storage keep their leases while another batch hangs."""
    submit(farm, tenant, images_per_prompt=2, bucket=1)
    worker = register_worker(farm)
    with subprocess.Popen(["sleep", "60"]) as child:
        worker = replace(worker, pid=child.pid)
        old, fresh = worker.must_claim(), worker.must_claim()
        ago = "clock_timestamp() - interval '1 hour'"
        sql(farm, f"UPDATE leases SET stepped_at = {ago} WHERE id = :id", id=old.id)
        scratch = Scratch(farm.settings.scratch_dir, worker.id)
        scratch.folder.mkdir(parents=True)
        scratch.hold(child.pid, old.id if hangs else fresh.id)
        WorkerSupervisor(farm, Identity(worker.id, "demo", "here", 1), scratch)._heartbeat()
        if not hangs:
            assert child.poll() is None
            child.kill()
        assert child.wait(30) == -signal.SIGKILL


def test_a_process_that_has_a_childs_number_is_left_alone(farm: Farm, tenant: uuid.UUID) -> None:
    """A dead child's process ID now belongs to another program. The child's lease is released."""
    job_id = submit(farm, tenant)
    worker = register_worker(farm)
    argv = ["sh", "-c", "sleep 60 >/dev/null 2>&1 & echo $!"]
    innocent = int(subprocess.run(argv, capture_output=True, text=True, check=True).stdout)
    try:
        lease = replace(worker, pid=innocent).must_claim()
        ago = "clock_timestamp() - interval '1 hour'"
        sql(farm, f"UPDATE leases SET stepped_at = {ago} WHERE id = :id", id=lease.id)
        scratch = Scratch(farm.settings.scratch_dir, worker.id)
        scratch.folder.mkdir(parents=True)
        scratch.hold(innocent, lease.id)
        supervisor = WorkerSupervisor(farm, Identity(worker.id, "demo", "here", 1), scratch)
        supervisor._heartbeat()
        supervisor._heartbeat()
        assert attempts_of(farm, job_id) == [(1, "worker_lost")]
    finally:
        os.kill(innocent, signal.SIGKILL)  # it still runs


@pytest.mark.parametrize("lost", [True, False])
def test_a_child_that_stays_at_a_batch_whose_lease_is_lost_is_ended(
    farm: Farm, tenant: uuid.UUID, lost: bool
) -> None:
    """It hung while Postgres was away, so the watchdog finds no lease of it."""
    submit(farm, tenant)
    worker = register_worker(farm)
    farm.settings.step_timeout_seconds = 0.2
    with subprocess.Popen(["sleep", "60"]) as child:
        worker = replace(worker, pid=child.pid)
        lease = worker.must_claim()
        scratch = Scratch(farm.settings.scratch_dir, worker.id)
        scratch.folder.mkdir(parents=True)
        scratch.hold(child.pid, lease.id if lost else None)
        supervisor = WorkerSupervisor(farm, Identity(worker.id, "demo", "here", 1), scratch)
        let_leases_expire(farm)
        supervisor._heartbeat()
        assert child.poll() is None  # it may still notice by itself

        def ended() -> bool:
            supervisor._heartbeat()
            return child.poll() is not None

        if lost:
            wait_until(ended, 30, "it was ended")
        else:
            started = time.monotonic()
            wait_until(lambda: ended() or time.monotonic() - started > 1.0, 30, "a second passed")
            assert child.poll() is None
            child.kill()
        assert child.wait(30) == -signal.SIGKILL


@pytest.mark.parametrize("words", ["It ended: SIGKILL.", None])
def test_how_a_child_ended_is_waited_for_a_moment(
    farm: Farm, tenant: uuid.UUID, words: str | None
) -> None:
    """The supervisor may miss the child before Celery does. Without a report it continues."""
    job_id = submit(farm, tenant)
    worker = register_worker(farm)
    with subprocess.Popen(["true"]) as child:
        child.wait(30)
    replace(worker, pid=child.pid).must_claim()
    scratch = Scratch(farm.settings.scratch_dir, worker.id)
    supervisor = WorkerSupervisor(farm, Identity(worker.id, "demo", "here", 1), scratch)
    supervisor._heartbeat()
    assert sql(farm, "SELECT FROM attempts WHERE reason IS NOT NULL") == []
    if words is not None:
        supervisor.child_lost(words)
    supervisor._heartbeat()
    told = sql(farm, "SELECT message FROM attempts WHERE job_id = :id", id=job_id)
    assert {row.message for row in told} == {words or ENDED}


def test_a_grace_that_ends_during_a_heartbeat_charges_no_attempt(
    farm: Farm, tenant: uuid.UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Postgres was slow. The child was killed at the end of the grace, and Celery reported it."""
    job_id = submit(farm, tenant)
    worker = register_worker(farm)
    with subprocess.Popen(["sleep", "60"]) as child:
        replace(worker, pid=child.pid).must_claim()
        scratch = Scratch(farm.settings.scratch_dir, worker.id)
        supervisor = WorkerSupervisor(farm, Identity(worker.id, "demo", "here", 1), scratch)
        renew = leases.renew

        def slow(*args: Any) -> Sequence[leases.RenewedLease]:
            found = renew(*args)
            supervisor._give_up()
            child.kill()
            child.wait(30)
            supervisor.child_lost("It ended: SIGKILL.")
            return found

        monkeypatch.setattr(leases, "renew", slow)
        supervisor._heartbeat()
    assert [reason for _, reason in attempts_of(farm, job_id)] == ["released"]
    assert sql(farm, "SELECT FROM leases") == []
    assert len(sql(farm, "SELECT FROM requeued_frames WHERE not_before <= clock_timestamp()")) == 1


def test_to_look_after_a_child_leaves_its_exit_code_to_celery() -> None:
    with subprocess.Popen(["sh", "-c", "read wait; exit 7"], stdin=subprocess.PIPE) as child:
        assert is_running_child(child.pid)
        assert child.stdin is not None
        child.stdin.close()
        wait_until(lambda: not is_running_child(child.pid), 30, "it ended")
        assert child.wait(30) == 7
    assert not is_running_child(child.pid)


@pytest.mark.parametrize("ends", ["well", "badly", "stopped"])
def test_nothing_is_on_the_device_after_a_batch_however_it_ended(
    farm: Farm, tenant: uuid.UUID, noise: Noise, loop: RenderLoop, assembly: Assembly, ends: str
) -> None:
    """Otherwise an idle child would count as one that stays at a lost batch."""
    scratch = Scratch(farm.settings.scratch_dir, assembly.identity.id)
    seen: list[uuid.UUID | None] = []

    def disturb(_frames: object, _step: int) -> None:
        seen.append(scratch.held_by(os.getpid()))
        if ends == "badly":
            raise FarmError("It breaks.")
        if ends == "stopped":
            raise StopBatch

    noise.disturb = disturb
    submit(farm, tenant, pipeline="noise", max_attempts=1)
    with scratch.held():
        if ends == "stopped":
            lease = assembly.claims.claim_now()
            assert lease is not None
            loop._render(lease)
        else:
            loop.run()
        assert seen[0] not in (None, NO_LEASE)
        assert scratch.held_by(os.getpid()) == NO_LEASE
