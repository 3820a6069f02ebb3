"""Every transition of the state machine is made. The database refuses every other one."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from farm.context import Farm
from farm.domain.spec import Priority
from farm.domain.states import FRAME_TRANSITIONS, JOB_TRANSITIONS, FrameState, JobStatus, settled
from farm.errors import Conflict
from farm.store import events
from farm.store import job_commands as stored
from farm.store.claim import Fence, Lease
from farm.store.engine import transaction
from tests.support.store import (
    FakeWorker,
    attempts_of,
    counts_add_up,
    fence,
    frame_rows,
    job_row,
    let_leases_expire,
    register_worker,
    state_of,
    submit,
)


@dataclass
class Scene:
    """One job of one frame, with the worker that holds or held it."""

    farm: Farm
    tenant: uuid.UUID
    job_id: uuid.UUID
    hand: FakeWorker
    lease: Lease | None = None

    def fences(self) -> list[Fence]:
        return [fence(frame) for frame in self.lease.frames] if self.lease else []


def running(scene: Scene) -> None:
    scene.lease = scene.hand.must_claim()


def ready(scene: Scene) -> None:
    running(scene)
    scene.hand.fail(_lease(scene))


def succeeded(scene: Scene) -> None:
    running(scene)
    scene.hand.complete(_lease(scene))


def dead(scene: Scene) -> None:
    running(scene)
    scene.hand.fail(_lease(scene), retryable=False)


def cancelled(scene: Scene) -> None:
    running(scene)
    cancel(scene)


def claim(scene: Scene) -> None:
    register_worker(scene.farm, "other").claim()


def complete(scene: Scene) -> None:
    scene.hand.complete(_lease(scene))


def fail(scene: Scene) -> None:
    scene.hand.fail(_lease(scene))


def release(scene: Scene) -> None:
    scene.hand.release(_lease(scene))


def expire(scene: Scene) -> None:
    let_leases_expire(scene.farm)


def cancel(scene: Scene) -> None:
    with transaction(scene.farm.store) as connection:
        stored.cancel_job(connection, scene.tenant, scene.job_id)


def retry(scene: Scene) -> None:
    with transaction(scene.farm.store) as connection:
        stored.retry_job(connection, scene.tenant, scene.job_id)


def _lease(scene: Scene) -> Lease:
    if scene.lease is None:
        # A worker that never claimed, with an invented fence.
        claimed = register_worker(scene.farm, "elsewhere").must_claim()
        scene.hand.release(claimed)
        raise AssertionError("a waiting frame has no fence")
    return scene.lease


REACH: dict[FrameState, Callable[[Scene], None]] = {
    FrameState.WAITING: lambda _scene: None,
    FrameState.RUNNING: running,
    FrameState.READY: ready,
    FrameState.SUCCEEDED: succeeded,
    FrameState.DEAD: dead,
    FrameState.CANCELLED: cancelled,
}
TAKE: dict[str, Callable[[Scene], None]] = {
    "claim": claim,
    "complete": complete,
    "fail": fail,
    "release": release,
    "expire": expire,
    "cancel": cancel,
    "retry": retry,
}
FENCED = {"complete", "fail", "release"}


@pytest.fixture
def scene(farm: Farm, tenant: uuid.UUID) -> Scene:
    return Scene(farm, tenant, submit(farm, tenant), register_worker(farm))


def test_the_tables_name_every_transition() -> None:
    assert set(TAKE) == set(FRAME_TRANSITIONS)
    assert set(REACH) == set(FrameState)


@pytest.mark.parametrize("state", list(FrameState))
@pytest.mark.parametrize("transition", list(FRAME_TRANSITIONS))
def test_a_frame_takes_the_transitions_of_the_table_and_no_others(
    scene: Scene, state: FrameState, transition: str
) -> None:
    if state is FrameState.WAITING and transition in FENCED:
        made_up = (scene.job_id, 0, 1)
        lease = Lease(uuid.uuid4(), scene.hand.id, "demo", Priority.BULK, ())
        assert scene.hand.complete(lease, [made_up]) == set()
        assert scene.hand.fail(lease, fences=[made_up]) == {}
        assert state_of(scene.farm, scene.job_id) is FrameState.WAITING
        return
    REACH[state](scene)
    assert state_of(scene.farm, scene.job_id) is state
    before = frame_rows(scene.farm, scene.job_id).get(0)

    with contextlib.suppress(Conflict):
        TAKE[transition](scene)

    after = state_of(scene.farm, scene.job_id)
    allowed = FRAME_TRANSITIONS[transition].get(state)
    if allowed is not None:
        assert after in allowed
    elif state is FrameState.WAITING:
        assert after is FrameState.WAITING
    else:
        assert frame_rows(scene.farm, scene.job_id).get(0) == before
    counts_add_up(scene.farm, scene.tenant, scene.job_id)


@pytest.mark.parametrize("transition", ["complete", "fail", "release"])
def test_a_lost_attempt_changes_nothing_once_the_next_is_claimed(
    scene: Scene, transition: str
) -> None:
    running(scene)
    let_leases_expire(scene.farm)
    register_worker(scene.farm, "successor").must_claim()
    before = frame_rows(scene.farm, scene.job_id)
    TAKE[transition](scene)
    assert frame_rows(scene.farm, scene.job_id) == before
    assert before[0].attempt == 2
    assert before[0].worker == "successor"


def test_a_frame_is_dead_after_its_last_attempt(scene: Scene) -> None:
    for attempt in (1, 2, 3):
        running(scene)
        assert _lease(scene).frames[0].attempt == attempt
        fail(scene)
    assert state_of(scene.farm, scene.job_id) is FrameState.DEAD
    expected = [(attempt, "render_error") for attempt in (1, 2, 3)]
    assert attempts_of(scene.farm, scene.job_id) == expected
    assert job_row(scene.farm, scene.tenant, scene.job_id).status == "failed"


def test_a_released_frame_is_not_charged(scene: Scene) -> None:
    for _ in range(5):
        running(scene)
        release(scene)
    for _ in range(3):
        assert state_of(scene.farm, scene.job_id) is FrameState.READY
        running(scene)
        fail(scene)
    assert state_of(scene.farm, scene.job_id) is FrameState.DEAD
    reasons = [reason for _, reason in attempts_of(scene.farm, scene.job_id)]
    assert reasons == ["released"] * 5 + ["render_error"] * 3


def test_retry_gives_fresh_attempts(scene: Scene) -> None:
    dead(scene)
    retry(scene)
    for _ in range(2):
        running(scene)
        fail(scene)
    running(scene)
    complete(scene)
    assert job_row(scene.farm, scene.tenant, scene.job_id).status == "succeeded"
    assert frame_rows(scene.farm, scene.job_id)[0].attempt == 4


def reach_job(scene: Scene, status: JobStatus) -> None:
    """Move a job of two frames to a status. With two frames `partial` is possible."""
    scene.job_id = submit(scene.farm, scene.tenant, images_per_prompt=2, bucket=2)
    if status is JobStatus.QUEUED:
        return
    running(scene)
    fences = scene.fences()
    if status is JobStatus.CANCELLED:
        cancel(scene)
    elif status is JobStatus.SUCCEEDED:
        complete(scene)
    elif status in {JobStatus.PARTIAL, JobStatus.FAILED}:
        good = fences[:1] if status is JobStatus.PARTIAL else []
        scene.hand.complete(_lease(scene), good)
        scene.hand.fail(_lease(scene), retryable=False, fences=fences[len(good) :])


@pytest.mark.parametrize("status", list(JobStatus))
@pytest.mark.parametrize("transition", ["cancel", "retry"])
def test_a_job_is_cancelled_and_retried_only_where_the_table_says(
    farm: Farm, tenant: uuid.UUID, status: JobStatus, transition: str
) -> None:
    scene = Scene(farm, tenant, uuid.uuid4(), register_worker(farm))
    reach_job(scene, status)
    assert job_row(farm, tenant, scene.job_id).status == status

    allowed = JOB_TRANSITIONS[transition].get(status)
    if allowed is None and status is not JobStatus.CANCELLED:
        with pytest.raises(Conflict):
            TAKE[transition](scene)
    elif allowed is None and transition == "retry":
        with pytest.raises(Conflict):
            retry(scene)
    else:
        TAKE[transition](scene)
    expected = status if allowed is None else next(iter(allowed))
    assert job_row(farm, tenant, scene.job_id).status == expected
    counts_add_up(farm, tenant, scene.job_id)


@pytest.mark.parametrize("status", list(JobStatus))
@pytest.mark.parametrize("wish", ["pause", "resume"])
def test_only_a_living_job_is_paused_and_resumed(
    farm: Farm, tenant: uuid.UUID, status: JobStatus, wish: str
) -> None:
    scene = Scene(farm, tenant, uuid.uuid4(), register_worker(farm))
    reach_job(scene, status)
    steer = stored.pause_job if wish == "pause" else stored.resume_job
    if status in {JobStatus.QUEUED, JobStatus.RUNNING}:
        with transaction(farm.store) as connection:
            steer(connection, tenant, scene.job_id)
        assert job_row(farm, tenant, scene.job_id).paused is (wish == "pause")
    else:
        with pytest.raises(Conflict), transaction(farm.store) as connection:
            steer(connection, tenant, scene.job_id)
    assert job_row(farm, tenant, scene.job_id).status == status


def test_each_transition_appends_its_event(scene: Scene) -> None:
    running(scene)
    fail(scene)
    running(scene)
    expire(scene)
    running(scene)
    release(scene)
    running(scene)
    scene.hand.fail(_lease(scene), retryable=False)
    retry(scene)
    running(scene)
    complete(scene)
    with transaction(scene.farm.store) as connection:
        kinds = [row.kind for row in events.events_of(connection, scene.job_id)]
    assert kinds == [
        "job.queued",
        "frames.claimed",
        "job.running",
        "frames.failed",
        "frames.claimed",
        "frames.failed",
        "frames.claimed",
        "frames.released",
        "frames.claimed",
        "frames.failed",
        "job.failed",
        "frames.retried",
        "job.running",
        "frames.claimed",
        "frames.succeeded",
        "job.succeeded",
    ]


@pytest.mark.parametrize(
    ("succeeded", "dead"), [(s, d) for s in range(4) for d in range(4) if s + d <= 3]
)
def test_postgres_settles_a_job_as_the_pure_function_says(
    farm: Farm, tenant: uuid.UUID, succeeded: int, dead: int
) -> None:
    job_id = submit(farm, tenant, images_per_prompt=3, bucket=4)
    worker = register_worker(farm)
    lease = worker.must_claim()
    fences = [fence(frame) for frame in lease.frames]
    worker.complete(lease, fences[:succeeded])
    worker.fail(lease, retryable=False, fences=fences[succeeded : succeeded + dead])
    expected = settled(3, succeeded, dead, 0) or JobStatus.RUNNING
    assert job_row(farm, tenant, job_id).status == expected
