"""The render loop works ahead: the next batch is claimed early, and encoding waits for it."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Sequence

import pytest
from PIL import Image

from farm.context import Farm
from farm.domain.spec import FrameSpec
from farm.store.claim import Lease
from tests.integration.noise_jobs import submit_noise, take
from tests.support.noise_family import Noise
from tests.support.store import job_row
from tests.support.waiting import wait_until
from workers.render.assembly import Assembly
from workers.render.batch import RenderedBatch
from workers.render.finishing import ENCODERS
from workers.render.lease_watch import LeaseWatch
from workers.render.loop import RenderLoop


class Encodings:
    """Record of a loop's encoded pictures, and of the number encoded at the same time."""

    def __init__(self, assembly: Assembly, monkeypatch: pytest.MonkeyPatch) -> None:
        self._encode, self._lock = assembly.encoder.encode, threading.Lock()
        self.seeds: list[int] = []
        self.now = self.most = 0
        monkeypatch.setattr(assembly.encoder, "encode", self)

    def __call__(self, image: Image.Image, frame: FrameSpec) -> bytes:
        with self._lock:
            self.seeds.append(frame.seed)
            self.now += 1
            self.most = max(self.most, self.now)
        take(0.02)
        content = self._encode(image, frame)
        with self._lock:
            self.now -= 1
        return content


@pytest.fixture
def encodings(assembly: Assembly, monkeypatch: pytest.MonkeyPatch) -> Encodings:
    return Encodings(assembly, monkeypatch)


def test_the_next_batch_is_claimed_before_the_last_step(
    farm: Farm, tenant: uuid.UUID, noise: Noise, loop: RenderLoop, assembly: Assembly
) -> None:
    """A claim after the last step is late. A step may take longer than a claim."""
    begun: list[int] = []

    def disturb(_frames: Sequence[FrameSpec], step: int) -> None:
        assembly.claims._seconds = 0.0  # ignore the duration of the first one
        if len(noise.batches) > 1:
            return
        take(0.1)
        if assembly.claims._ahead is not None:
            begun.append(step)

    noise.disturb = disturb
    submit_noise(farm, tenant, images_per_prompt=8)
    loop.run()
    assert 9 in begun


def test_encoding_starts_once_the_device_has_its_next_batch(
    farm: Farm,
    tenant: uuid.UUID,
    noise: Noise,
    loop: RenderLoop,
    assembly: Assembly,
    encodings: Encodings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ahead, begin = assembly.claims.claim_ahead, loop._begin
    monkeypatch.setattr(assembly.claims, "claim_ahead", lambda *_: ahead(0.0, 0.0))
    encoded_before: list[list[int]] = []

    def begin_watched(lease: Lease) -> tuple[RenderedBatch, LeaseWatch]:
        take(0.2 if encoded_before else 0.0)
        encoded_before.append(encodings.seeds[:])
        return begin(lease)

    def disturb(frames: Sequence[FrameSpec], step: int) -> None:
        if step == 5:  # now the next batch is claimed, and the previous one encoded
            wait_until(lambda: assembly.claims.is_ahead or frames[0].seed == 4, 10, "it was ahead")
            wait_until(lambda: len(encodings.seeds) >= frames[0].seed, 10, "it was encoded")

    monkeypatch.setattr(loop, "_begin", begin_watched)
    noise.disturb = disturb
    submit_noise(farm, tenant, images_per_prompt=8, seed=0)
    loop.run()
    assert encoded_before == [[], []]
    assert sorted(encodings.seeds) == [*range(8)]
    assert encodings.most <= ENCODERS  # a core is left to the device's thread


def test_encoding_starts_at_once_when_no_batch_is_claimed_ahead(
    farm: Farm,
    tenant: uuid.UUID,
    noise: Noise,
    loop: RenderLoop,
    assembly: Assembly,
    encodings: Encodings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    claim = assembly.claims.next
    monkeypatch.setattr(assembly.claims, "claim_ahead", lambda *_: None)

    def claim_late() -> Lease | None:
        done = 4 * len(noise.batches)
        wait_until(lambda: len(encodings.seeds) == done, 10, "the batch before was encoded")
        return claim()

    monkeypatch.setattr(assembly.claims, "next", claim_late)
    job_id = submit_noise(farm, tenant, images_per_prompt=8, seed=0)
    loop.run()
    assert job_row(farm, tenant, job_id).status == "succeeded"


@pytest.mark.parametrize(
    ("priority", "status"),
    [("interactive", "succeeded"), ("bulk", "failed")],
    ids=["interactive does not wait", "bulk waits"],
)
def test_an_interactive_picture_does_not_queue_behind_the_encoding_of_others(
    farm: Farm,
    tenant: uuid.UUID,
    loop: RenderLoop,
    assembly: Assembly,
    monkeypatch: pytest.MonkeyPatch,
    priority: str,
    status: str,
) -> None:
    monkeypatch.setattr(assembly.finisher, "_encoding", None)  # waiting for an encoder fails
    job_id = submit_noise(farm, tenant, priority=priority, max_attempts=1)
    loop.run()
    assert job_row(farm, tenant, job_id).status == status


def test_a_frame_requeued_while_the_lane_looked_empty_is_rendered(
    farm: Farm,
    tenant: uuid.UUID,
    loop: RenderLoop,
    assembly: Assembly,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its batch ends after a claim that found nothing, and before the loop looks for work."""
    encode, following = assembly.encoder.encode, assembly.claims.next
    tries: list[int] = []

    def fails_once(image: Image.Image, frame: FrameSpec) -> bytes:
        tries.append(frame.seed)
        if len(tries) == 1:
            raise RuntimeError("It fails.")
        return encode(image, frame)

    def claim_and_wait() -> Lease | None:
        lease = following()
        if lease is None:
            wait_until(lambda: not assembly.finisher.busy, 30, "the batch has ended")
        return lease

    monkeypatch.setattr(assembly.encoder, "encode", fails_once)
    monkeypatch.setattr(assembly.claims, "next", claim_and_wait)
    job_id = submit_noise(farm, tenant)
    loop.run()
    assert job_row(farm, tenant, job_id).status == "succeeded"
    assert len(tries) == 2
