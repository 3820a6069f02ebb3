"""Out of memory: an automatic bucket is halved for the rest of its job, and an event records it."""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence

import pytest

from farm.context import Farm
from farm.domain.spec import FrameSpec, run_of, shrunk
from farm.imaging.encoding import read
from farm.storage import artifact_key
from farm.store import frames
from farm.store.engine import transaction
from farm.store.frames import FailedAttempt
from tests.support.api_server import serving
from tests.support.noise_family import Noise
from tests.support.store import (
    attempts_of,
    fence,
    frame_rows,
    job_row,
    let_leases_expire,
    register_worker,
    sql,
    submit,
)
from workers.render.assembly import Assembly, assemble
from workers.render.loop import RenderLoop
from workers.render.scratch import Scratch


class Memory:
    """A device with memory for a limited number of pictures."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.buckets: list[int] = []

    def __call__(self, frames: Sequence[FrameSpec], step: int) -> None:
        if step == 0:
            self.buckets.append(frames[0].bucket)
        if frames[0].bucket > self.room:
            raise MemoryError


def run(loop: RenderLoop) -> int:
    """Answer bells until nothing can be claimed. Return the number of fresh children."""
    children = 0
    while True:
        loop.run()
        if not loop.out_of_memory:
            return children
        loop.out_of_memory = False  # as in a fresh child
        children += 1


def test_an_automatic_bucket_is_halved_for_the_rest_of_the_job(
    farm: Farm, tenant: uuid.UUID, noise: Noise, loop: RenderLoop
) -> None:
    job_id = submit(farm, tenant, pipeline="noise", images_per_prompt=10, max_attempts=1, seed=1)
    noise.disturb = memory = Memory(room=2)
    assert run(loop) == 1
    assert (memory.buckets[0], set(memory.buckets[1:])) == (4, {2})
    assert len(memory.buckets) <= 7  # the first frame is claimed after another one has succeeded
    assert job_row(farm, tenant, job_id).status == "succeeded"
    rows = frame_rows(farm, job_id)
    assert {row.bucket for row in rows.values()} == {2}
    for ordinal, row in rows.items():
        expected = [(1, "out_of_memory")] if ordinal < 4 else []
        assert attempts_of(farm, job_id, ordinal) == expected
        content = farm.artifacts.get(artifact_key(tenant, job_id, ordinal, row.sha256))
        assert read(content)[1].frame.bucket == 2
    with serving(farm) as api:
        frame = api.client("default").get(f"/v1/jobs/{job_id}/frames/9").json()
    assert frame["bucket"] == 2


def test_it_is_halved_until_it_fits(
    farm: Farm, tenant: uuid.UUID, noise: Noise, loop: RenderLoop
) -> None:
    job_id = submit(farm, tenant, pipeline="noise", images_per_prompt=8, max_attempts=1)
    noise.disturb = memory = Memory(room=1)
    assert run(loop) == 2
    assert memory.buckets == [4, 2] + [1] * 8
    assert job_row(farm, tenant, job_id).status == "succeeded"


def test_a_job_that_is_claimed_whole_is_halved_too(
    farm: Farm, tenant: uuid.UUID, noise: Noise, loop: RenderLoop
) -> None:
    job_id = submit(farm, tenant, pipeline="noise", images_per_prompt=4, max_attempts=1)
    noise.disturb = memory = Memory(room=1)
    assert run(loop) == 2
    assert memory.buckets == [4, 2, 1, 1, 1, 1]
    assert job_row(farm, tenant, job_id).status == "succeeded"


def test_a_worker_plans_no_bucket_again_for_which_its_memory_was_too_small(
    farm: Farm, tenant: uuid.UUID, noise: Noise, assembly: Assembly
) -> None:
    """Each job has one frame, so no job's own bucket can say it."""
    ids = [submit(farm, tenant, pipeline="noise", max_attempts=1) for _ in range(14)]
    noise.disturb = memory = Memory(room=2)
    scratch = Scratch(farm.settings.scratch_dir, assembly.identity.id)
    scratch.folder.mkdir(parents=True)
    loops = [assembly.loop]
    loops[0].run()
    while loops[-1].out_of_memory:  # as a fresh child
        again = assemble(farm, assembly.identity, assembly.resolved, assembly.loaded)
        loops.append(again.loop)
        again.loop.run()
    for loop in loops[1:]:
        loop.close()
    assert len(loops) == 2
    assert scratch.too_large() == {"8x8": 4}
    assert memory.buckets.count(4) == 1
    assert {job_row(farm, tenant, job_id).status for job_id in ids} == {"succeeded"}


def test_a_late_failure_halves_nothing(farm: Farm, tenant: uuid.UUID) -> None:
    """The lease is lost, and another worker holds the frames. Their bucket stays."""
    late, other = register_worker(farm, "late"), register_worker(farm, "other")
    job_id = submit(farm, tenant, images_per_prompt=8)
    lease = late.must_claim()
    let_leases_expire(farm)
    again = other.must_claim()
    failures = [
        FailedAttempt(fence(frame), "out_of_memory", "", charged=False, smaller=True)
        for frame in lease.frames
    ]
    with transaction(farm.store) as connection:
        assert frames.fail(connection, lease.id, failures, 0.0) == {}
    assert sql(farm, "SELECT DISTINCT bucket FROM requeued_frames") == [(8,)]
    assert other.complete(again)
    assert sql(farm, "SELECT runs -> 0 -> 2 FROM jobs WHERE id = :id", id=job_id) == [(8,)]


def test_a_bucket_that_was_asked_for_stays(
    farm: Farm, tenant: uuid.UUID, noise: Noise, loop: RenderLoop
) -> None:
    job_id = submit(farm, tenant, pipeline="noise", images_per_prompt=2, bucket=4, max_attempts=2)
    noise.disturb = memory = Memory(room=2)
    run(loop)
    assert set(memory.buckets) == {4}
    assert job_row(farm, tenant, job_id).status == "failed"
    assert attempts_of(farm, job_id) == [(attempt, "out_of_memory") for attempt in (1, 2, 3)]


def test_where_not_even_one_fits_the_frame_is_dead(
    farm: Farm, tenant: uuid.UUID, noise: Noise, loop: RenderLoop
) -> None:
    job_id = submit(farm, tenant, pipeline="noise", max_attempts=2)
    noise.disturb = Memory(room=0)
    run(loop)
    assert job_row(farm, tenant, job_id).status == "failed"
    assert attempts_of(farm, job_id) == [(attempt, "out_of_memory") for attempt in (1, 2)]


def test_two_workers_that_run_out_at_once_halve_it_once(
    farm: Farm, tenant: uuid.UUID, noise: Noise, assembly: Assembly
) -> None:
    loop = assembly.loop
    job_id = submit(farm, tenant, pipeline="noise", images_per_prompt=12)
    other = assemble(farm, assembly.identity, assembly.resolved, assembly.loaded)
    second = other.loop
    other.claims._unsure = False
    other.claims.mark_uncertain = lambda: None  # type: ignore[method-assign] # what the first one holds
    met: list[int] = []

    def disturb(frames: Sequence[FrameSpec], step: int) -> None:
        if frames[0].bucket == 4:
            met.append(step)
            if len(met) == 1:
                second.run()  # it claims while the first still denoises
            raise MemoryError

    noise.disturb = disturb
    run(loop)
    second.close()
    assert len(met) == 2
    assert job_row(farm, tenant, job_id).status == "succeeded"
    assert {row.bucket for row in frame_rows(farm, job_id).values()} == {2}


def test_the_line_asks_for_a_fresh_process(
    farm: Farm, tenant: uuid.UUID, noise: Noise, loop: RenderLoop
) -> None:
    submit(farm, tenant, pipeline="noise", images_per_prompt=12)
    noise.disturb = memory = Memory(room=2)
    loop.run()
    assert loop.out_of_memory
    assert memory.buckets == [4]  # this process claimed nothing more
    assert sql(farm, "SELECT count(*) FROM leases WHERE pid = :pid", pid=os.getpid())[0][0] == 0


RUNS = [(4, "a", 8), (8, "b", 8), (12, "a", 8), (16, "c", 2)]


@pytest.mark.parametrize(
    ("ordinal", "bucket", "after"),
    [
        (0, 4, [(4, "a/4", 4), (8, "b", 8), (12, "a/4", 4), (16, "c", 2)]),
        (5, 2, [(4, "a", 8), (8, "b/2", 2), (12, "a", 8), (16, "c", 2)]),
        (15, 2, RUNS),
        (15, 4, RUNS),
    ],
)
def test_runs_of_the_same_key_shrink_together(
    ordinal: int, bucket: int, after: list[tuple[int, str, int]]
) -> None:
    assert shrunk(RUNS, run_of(RUNS, ordinal), bucket) == after


def test_a_run_that_shrinks_again_keeps_one_name() -> None:
    assert shrunk(shrunk(RUNS, 0, 4), 2, 2)[0] == (4, "a/2", 2)
