"""An interactive batch runs between two steps of another batch, and does not change it."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Sequence
from datetime import datetime

import pytest
from redis import Redis

from farm.context import Farm
from farm.domain.spec import FrameSpec
from farm.services import steering
from farm.store.claim import Lease
from tests.support.noise_family import Noise
from tests.support.store import attempts_of, frame_rows, job_row, sql, submit
from workers.render.assembly import Assembly
from workers.render.batch import RenderedBatch
from workers.render.claims import Claims
from workers.render.lease_watch import LeaseWatch
from workers.render.loop import RenderLoop

Steps = list[tuple[str, int]]


class Story:
    """Records the denoised steps. Submits an interactive job at a step of the first batch."""

    def __init__(self, farm: Farm, tenant: uuid.UUID, assembly: Assembly, at: int = 2) -> None:
        self.farm, self.tenant, self.assembly, self.at = farm, tenant, assembly, at
        self.steps: Steps = []
        self.urgent: list[uuid.UUID] = []
        self.come = 1
        """Number of interactive jobs to submit."""
        self.patience = 30.0
        """Maximum seconds that a step of bulk waits until one of them is claimed."""
        self.also: Callable[[str, int], None] = lambda _prompt, _step: None

    def __call__(self, frames: Sequence[FrameSpec], step: int) -> None:
        prompt = frames[0].prompt
        self.steps.append((prompt, step))
        if (prompt, step) == ("bulk", self.at) and not self.urgent:
            for _ in range(self.come):
                self.urgent.append(self.submit("interactive"))
        if prompt == "bulk" and step and self.steps.count(("urgent", 0)) < len(self.urgent):
            # The step lasts long enough to receive the bell and to claim.
            wait_for(lambda: self.assembly.interactive._lease is not None, self.patience)
        self.also(prompt, step)

    def submit(self, priority: str, images: int = 1) -> uuid.UUID:
        return submit(
            self.farm,
            self.tenant,
            pipeline="noise",
            prompts=["urgent" if priority == "interactive" else priority],
            priority=priority,
            images_per_prompt=images,
            seed=7,
            max_attempts=1,
        )


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait until a condition holds, at most this long."""
    pause = threading.Event()
    for _ in range(round(seconds / 0.01)):
        if condition():
            return True
        pause.wait(0.01)
    return False


@pytest.fixture
def story(
    farm: Farm, tenant: uuid.UUID, noise: Noise, assembly: Assembly, monkeypatch: pytest.MonkeyPatch
) -> Story:
    # A job at the end of a batch may be claimed ahead: these steps take no time.
    monkeypatch.setattr(assembly.claims, "claim_ahead", lambda *_: None)
    noise.disturb = told = Story(farm, tenant, assembly)
    return told


def test_it_waits_for_one_step(story: Story, farm: Farm, loop: RenderLoop) -> None:
    bulk = story.submit("bulk", images=8)
    loop.run()
    first = [prompt for prompt, _ in story.steps].index("urgent")
    assert story.steps[first - 1] == ("bulk", 2)
    assert story.steps[first : first + 10] == [("urgent", step) for step in range(10)]
    assert story.steps[first + 10 :][:7] == [("bulk", step) for step in range(3, 10)]
    for job_id in [bulk, *story.urgent]:
        assert job_row(farm, story.tenant, job_id).status == "succeeded"
    assert sql(farm, "SELECT count(*) FROM leases")[0][0] == 0
    assert sql(farm, "SELECT succeeded, batches FROM workers") == [(9, 3)]


def test_the_bytes_are_those_of_running_alone(story: Story, farm: Farm, loop: RenderLoop) -> None:
    def bytes_of(job_id: uuid.UUID) -> list[bytes]:
        return [row.sha256 for _, row in sorted(frame_rows(farm, job_id).items())]

    bulk = story.submit("bulk", images=4)
    loop.run()
    alone = [story.submit("bulk", images=4), story.submit("interactive")]
    loop.run()
    assert [bytes_of(job_id) for job_id in (bulk, *story.urgent)] == [
        bytes_of(job_id) for job_id in alone
    ]


def test_several_come_one_after_another_with_a_step_between(
    story: Story, farm: Farm, loop: RenderLoop
) -> None:
    story.come = 3
    story.submit("bulk", images=4)
    loop.run()
    told = [prompt for prompt, _ in story.steps]
    starts = [place for place, step in enumerate(story.steps) if step == ("urgent", 0)]
    assert len(starts) == 3
    assert all(told[start - 1] == "bulk" for start in starts)
    assert told[-1] == "bulk"  # all three were rendered within the one batch


def test_it_is_heard_between_two_batches(
    story: Story, farm: Farm, loop: RenderLoop, assembly: Assembly, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next batch may already be claimed. Then the loop does not check before its end."""
    monkeypatch.setattr(farm.settings, "progress_seconds", 60.0)
    claims, begin = assembly.claims, loop._begin
    begun: list[uuid.UUID] = []

    def claim_second(*_: float) -> None:
        if len(begun) == 1:  # during the second batch it could claim the urgent one
            Claims.claim_ahead(claims, 0.0, 0.0)

    monkeypatch.setattr(claims, "claim_ahead", claim_second)

    def come(lease: Lease) -> tuple[RenderedBatch, LeaseWatch]:
        begun.append(lease.id)
        if len(begun) == 2:
            story.urgent.append(story.submit("interactive"))
            wait_for(assembly.interactive._told.is_set, 2.0)
        return begin(lease)

    monkeypatch.setattr(loop, "_begin", come)
    story.at = 99
    story.submit("bulk", images=8)
    loop.run()
    second = len(story.steps) - 1 - story.steps[::-1].index(("bulk", 0))
    assert ("urgent", 0) in story.steps[second : second + 3]


def test_its_failure_is_its_own(story: Story, farm: Farm, loop: RenderLoop) -> None:
    bulk = story.submit("bulk", images=4)

    def break_it(prompt: str, step: int) -> None:
        if (prompt, step) == ("urgent", 4):
            raise RuntimeError("It broke.")

    story.also = break_it
    loop.run()
    assert job_row(farm, story.tenant, story.urgent[0]).status == "failed"
    assert job_row(farm, story.tenant, bulk).status == "succeeded"
    assert {row.attempt for row in frame_rows(farm, bulk).values()} == {1}


def test_its_cancel_is_its_own(story: Story, farm: Farm, loop: RenderLoop) -> None:
    bulk = story.submit("bulk", images=4)

    def cancel_it(prompt: str, step: int) -> None:
        if prompt == "urgent":
            if step == 1:
                steering.cancel(farm, story.tenant, story.urgent[0])
            threading.Event().wait(0.1 if step > 1 else 0)

    story.also = cancel_it
    loop.run()
    assert ("urgent", 9) not in story.steps
    assert job_row(farm, story.tenant, story.urgent[0]).status == "cancelled"
    assert job_row(farm, story.tenant, bulk).status == "succeeded"


def test_where_there_is_no_memory_it_waits_for_the_batch(
    story: Story, farm: Farm, loop: RenderLoop, assembly: Assembly
) -> None:
    story.come, story.patience = 2, 0.1
    bulk = story.submit("bulk", images=4)
    held: list[bool] = []

    def no_room(prompt: str, step: int) -> None:
        if prompt == "bulk" and ("urgent", 0) in story.steps:
            held.append(assembly.interactive._lease is not None)
        if prompt == "urgent" and story.steps[-1] != ("bulk", 9) and ("bulk", 9) not in story.steps:
            raise MemoryError

    story.also = no_room
    loop.run()
    assert not loop.out_of_memory
    assert held
    assert not any(held)  # another worker may claim it now
    told = [prompt for prompt, _ in story.steps]
    assert told.count("urgent") == 1 + 2 * 10  # one try, then both after the batch
    assert job_row(farm, story.tenant, bulk).status == "succeeded"
    for job_id in story.urgent:
        assert job_row(farm, story.tenant, job_id).status == "succeeded"
        assert {reason for _, reason in attempts_of(farm, job_id)} <= {"released"}


def test_normal_work_waits_for_the_batch(story: Story, farm: Farm, loop: RenderLoop) -> None:
    """Nothing can run in between while it is rendered, so it must not delay interactive work."""
    story.submit("bulk", images=4)
    normal: list[uuid.UUID] = []

    def come(prompt: str, step: int) -> None:
        if (prompt, step) == ("bulk", 1) and not normal:
            normal.append(story.submit("normal"))

    story.at, story.also = 99, come
    loop.run()
    told = [prompt for prompt, _ in story.steps]
    assert told == ["bulk"] * 10 + ["normal"] * 10


def test_it_can_be_turned_off(
    farm: Farm, tenant: uuid.UUID, noise: Noise, loop: RenderLoop, assembly: Assembly
) -> None:
    loop.may_interrupt = False
    noise.disturb = story = Story(farm, tenant, assembly)
    story.patience = 0.1
    story.submit("bulk", images=4)
    loop.run()
    told = [prompt for prompt, _ in story.steps]
    assert told == ["bulk"] * 10 + ["urgent"] * 10


def test_a_lost_bell_costs_no_more_than_a_touch(story: Story, farm: Farm, loop: RenderLoop) -> None:
    # A step is reported once, maybe before the job came. Then this step waits in vain, and would
    # make the pace so slow that the job may not interrupt.
    story.patience, farm.settings.interactive_seconds = 2.0, 10_000.0
    story.submit("bulk", images=4)

    def lose(prompt: str, step: int) -> None:
        if (prompt, step) == ("bulk", 1):
            with Redis.from_url(farm.settings.redis_url.get_secret_value()) as client:
                client.config_set("maxmemory", "1")
        if (prompt, step) == ("bulk", 8):
            with Redis.from_url(farm.settings.redis_url.get_secret_value()) as client:
                client.config_set("maxmemory", "0")

    story.also = lose
    loop.run()
    assert story.steps.index(("urgent", 0)) < story.steps.index(("bulk", 9))


def test_the_interrupted_batch_is_seen_to_be_looked_after(
    story: Story, farm: Farm, loop: RenderLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise its worker would count as hung after a slow interactive batch."""
    monkeypatch.setattr(farm.settings, "progress_seconds", 0.02)
    bulk = story.submit("bulk", images=4)
    seen: list[datetime] = []

    def look(prompt: str, step: int) -> None:
        if prompt == "urgent":
            query = "SELECT stepped_at FROM leases WHERE :id = ANY(job_ids)"
            before = seen[-1] if seen else sql(farm, query, id=bulk)[0][0]
            wait_for(lambda: sql(farm, query, id=bulk)[0][0] > before, 2.0 if step > 1 else 0.1)
            seen.append(sql(farm, query, id=bulk)[0][0])

    story.also = look
    loop.run()
    assert len(seen) == 10
    assert sorted(set(seen[1:])) == seen[1:]
