"""A worker trips when frame after frame fails on it. No frame is spent, and it recovers."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

import pytest

from farm.context import Farm
from farm.domain.spec import FrameSpec
from farm.errors import RenderError
from farm.store.circuit_breaker import MAX_SECONDS, TRIP_AFTER_FRAMES, note_failure
from farm.store.engine import transaction
from farm.store.specs import frame_specs
from tests.support.api_server import serving
from tests.support.noise_family import Noise
from tests.support.store import job_row, new_tenant, register_worker, sql, submit
from workers.render.loop import RenderLoop


def broken(frames: Sequence[FrameSpec], step: int) -> None:
    raise RuntimeError("The device fell off the bus.")


def well(frames: Sequence[FrameSpec], step: int) -> None:
    pass


def rest_ends(farm: Farm) -> None:
    """Let the pause of a tripped worker, and waits of its frames, be over."""
    sql(farm, "UPDATE workers SET tripped_until = clock_timestamp() - interval '1 second'")


def all_due(farm: Farm) -> None:
    sql(farm, "UPDATE requeued_frames SET not_before = clock_timestamp() - interval '1 second'")


def trips(farm: Farm) -> tuple[int, int, float]:
    """Read the failures in a row, the number of trips, and the seconds left of the last trip."""
    [row] = sql(
        farm,
        "SELECT cardinality(failing), trips,"
        " coalesce(extract(epoch FROM tripped_until - clock_timestamp()), 0)::float FROM workers",
    )
    return row[0], row[1], row[2]


def spec_of(farm: Farm, job_id: uuid.UUID, ordinal: int) -> FrameSpec:
    with transaction(farm.store) as connection:
        [(_, spec)] = frame_specs(connection, [(job_id, ordinal)])
    return spec


def test_after_three_different_frames_a_worker_claims_nothing(
    farm: Farm, tenant: uuid.UUID, noise: Noise, loop: RenderLoop
) -> None:
    job_id = submit(farm, tenant, pipeline="noise", images_per_prompt=40, bucket=1)
    noise.disturb = broken
    loop.run()
    failing, count, seconds = trips(farm)
    assert (failing, count) == (TRIP_AFTER_FRAMES, 1)
    assert 0 < seconds <= farm.settings.trip_seconds
    batches = len(noise.batches)
    loop.run()
    assert len(noise.batches) == batches
    assert job_row(farm, tenant, job_id).dead == 0


def test_it_tries_one_frame_more_each_time_another_and_rests_grow(
    farm: Farm, tenant: uuid.UUID, noise: Noise, loop: RenderLoop
) -> None:
    job_id = submit(farm, tenant, pipeline="noise", images_per_prompt=40, bucket=1)
    noise.disturb = broken
    loop.run()
    lengths = []
    for trial in range(8):
        rest_ends(farm)
        all_due(farm)
        batches = len(noise.batches)
        loop.run()
        assert len(noise.batches) == batches + 1, trial  # one frame, then it trips again
        lengths.append(trips(farm)[2])
    assert sql(farm, "SELECT DISTINCT attempt FROM frames WHERE job_id = :id", id=job_id) == [(1,)]
    base = farm.settings.trip_seconds
    wanted = [min(base * 2.0**n, MAX_SECONDS) for n in range(1, 9)]
    assert lengths == pytest.approx(wanted, abs=2.0)


def test_a_success_ends_it(farm: Farm, tenant: uuid.UUID, noise: Noise, loop: RenderLoop) -> None:
    job_id = submit(farm, tenant, pipeline="noise", images_per_prompt=8, bucket=1)
    noise.disturb = broken
    loop.run()
    noise.disturb = well
    rest_ends(farm)
    all_due(farm)
    loop.run()
    assert trips(farm) == (0, 0, 0.0)
    assert job_row(farm, tenant, job_id).status == "succeeded"


def test_the_next_trial_is_another_frame_s(
    farm: Farm, tenant: uuid.UUID, noise: Noise, loop: RenderLoop
) -> None:
    """Three frames of one job are at fault. Between two trips the other job's frames continue.

    No frame needs more than its attempts.
    """
    guilty = submit(
        farm, tenant, pipeline="noise", prompts=["guilty"], images_per_prompt=3, bucket=1
    )
    healthy = submit(farm, tenant, pipeline="noise", images_per_prompt=4, bucket=2)

    def disturb(frames: Sequence[FrameSpec], step: int) -> None:
        if any(frame.prompt == "guilty" for frame in frames):
            raise RuntimeError("It is the frame.")

    noise.disturb = disturb
    loop.run()
    assert trips(farm)[:2] == (3, 1)
    assert job_row(farm, tenant, healthy).succeeded == 0
    rest_ends(farm)
    loop.run()
    assert job_row(farm, tenant, healthy).succeeded == 2
    rested = 2
    while job_row(farm, tenant, guilty).status == "running":
        rest_ends(farm)
        all_due(farm)
        loop.run()
        rested += 1
    assert rested <= 4
    assert job_row(farm, tenant, guilty).status == "failed"
    loop.run()
    assert job_row(farm, tenant, healthy).status == "succeeded"


def test_one_frame_that_fails_again_and_again_is_no_reason(
    farm: Farm, tenant: uuid.UUID, noise: Noise, loop: RenderLoop
) -> None:
    job_id = submit(farm, tenant, pipeline="noise", max_attempts=10)
    noise.disturb = broken
    loop.run()
    assert job_row(farm, tenant, job_id).dead == 1
    assert trips(farm)[1] == 0


def test_a_job_of_nothing_else_ends_all_the_same(
    farm: Farm, tenant: uuid.UUID, noise: Noise, loop: RenderLoop
) -> None:
    """Each frame is charged as on a sound worker."""
    job_id = submit(farm, tenant, pipeline="noise", images_per_prompt=3, bucket=1, max_attempts=2)
    noise.disturb = broken
    trials = 0
    while job_row(farm, tenant, job_id).status != "failed":
        rest_ends(farm)
        all_due(farm)
        loop.run()
        trials += 1
        assert trials <= 3 * 2


def test_a_frame_that_cannot_be_is_no_reason_either(
    farm: Farm, tenant: uuid.UUID, noise: Noise, loop: RenderLoop
) -> None:
    """It is dead at once, and so is the next one, so their owner learns it soon."""
    job_id = submit(farm, tenant, pipeline="noise", images_per_prompt=20, bucket=1)

    def disturb(frames: Sequence[FrameSpec], step: int) -> None:
        raise RenderError("This cannot be drawn.")

    noise.disturb = disturb
    loop.run()
    assert job_row(farm, tenant, job_id).status == "failed"
    assert trips(farm) == (0, 0, 0.0)


def test_it_is_said_to_all(farm: Farm, tenant: uuid.UUID, noise: Noise, loop: RenderLoop) -> None:
    noise.disturb = broken
    with serving(farm) as api:
        client = api.client("default")
        job = submit(farm, tenant, pipeline="noise", images_per_prompt=9, bucket=1)
        loop.run()
        [worker] = client.get("/v1/workers").json()["data"]
        assert worker["state"] == "failed"
        assert worker["problem"].startswith("3 different frames failed in a row. The worker tries")
        because = client.get(f"/v1/jobs/{job}").json()["waiting_because"]
        assert because == f"The workers cannot render pipeline noise: {worker['problem']}"


def test_an_unknown_worker_rests_from_nothing(farm: Farm, tenant: uuid.UUID) -> None:
    with transaction(farm.store) as connection:
        assert note_failure(connection, uuid.uuid4(), uuid.uuid4(), 0, 1.0) is None


def test_a_resting_worker_claims_nothing_while_another_does(farm: Farm, tenant: uuid.UUID) -> None:
    resting, other = register_worker(farm, "resting"), register_worker(farm, "other")
    submit(farm, tenant, images_per_prompt=8)
    with transaction(farm.store) as connection:
        for ordinal in range(TRIP_AFTER_FRAMES):
            until = note_failure(connection, resting.id, uuid.uuid4(), ordinal, 60.0)
    assert until is not None
    assert resting.claim() is None
    assert other.claim() is not None


def test_bad_frames_of_one_tenant_rest_a_worker_for_this_tenant_alone(
    farm: Farm, tenant: uuid.UUID, noise: Noise, loop: RenderLoop
) -> None:
    """Their urgency does not matter. A success of another tenant does not reset the breaker."""
    bob = new_tenant(farm, "bob")
    bad = submit(
        farm, tenant, pipeline="noise", images_per_prompt=40, bucket=1, priority="interactive"
    )
    good = submit(farm, bob, pipeline="noise", images_per_prompt=8, bucket=1)

    def judged(frames: Sequence[FrameSpec], step: int) -> None:
        if frames[0].seed in bad_seeds:
            raise RuntimeError("It breaks the device.")

    bad_seeds = {spec_of(farm, bad, ordinal).seed for ordinal in range(40)}
    noise.disturb = judged
    loop.run()
    assert job_row(farm, bob, good).status == "succeeded"
    assert trips(farm)[:2] == (TRIP_AFTER_FRAMES, 1)
    with serving(farm) as api:
        [worker] = api.client("bob").get("/v1/workers").json()["data"]
        assert (worker["state"], worker["problem"]) == ("loading", None), "as a test's line is"
        [worker] = api.client("default").get("/v1/workers").json()["data"]
        assert worker["state"] == "failed"
    batches = len(noise.batches)
    loop.run()
    assert len(noise.batches) == batches, "of the other tenant nothing is claimed"
    rest_ends(farm)
    all_due(farm)
    loop.run()
    assert trips(farm)[:2] == (TRIP_AFTER_FRAMES + 1, 2)
    assert job_row(farm, tenant, bad).dead == 0


def test_bad_frames_of_two_tenants_rest_a_worker_for_all(
    farm: Farm, tenant: uuid.UUID, noise: Noise, loop: RenderLoop
) -> None:
    bob, carol = new_tenant(farm, "bob"), new_tenant(farm, "carol")
    for each in (tenant, bob):
        submit(farm, each, pipeline="noise", images_per_prompt=9, bucket=1)
    noise.disturb = broken
    loop.run()
    assert trips(farm)[:2] == (TRIP_AFTER_FRAMES, 1)
    waiting = submit(farm, carol, pipeline="noise", priority="interactive")
    loop.run()
    assert job_row(farm, carol, waiting).status == "queued"
