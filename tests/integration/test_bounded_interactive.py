"""Interactive work of one tenant, and what it leaves to others, on a simulated device.

A step takes bucket x pixels on the device's own clock. The render loop reads this clock too.
"""

from __future__ import annotations

import math
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
from PIL import Image

from farm.context import Farm
from farm.domain.spec import FrameSpec
from farm.pipelines.catalog import Pipeline
from farm.pipelines.family import Batch, LoadedPipeline
from farm.pipelines.params import Params
from farm.pipelines.resolve import ResolvedPipeline
from farm.services import steering
from tests.support.noise_family import Noise, NoiseParams
from tests.support.render_loops import assembly_of
from tests.support.store import job_row, new_tenant, submit
from tests.support.waiting import wait_until
from workers.render.assembly import Assembly

BUCKET = 64
SECONDS = 1.0 / (BUCKET * 8 * 8)
"""Time of one step of one pixel: a step of the largest batch takes a second."""


class SteppedParams(NoiseParams):
    """Parameters: a size, and a number of steps."""

    steps: int = 20


class Device(Noise):
    """A device whose clock moves only while it denoises."""

    name = "device"
    params: type[Params] = SteppedParams

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.used: Counter[str] = Counter()
        """Time by first word of the prompt, which is the name of the tenant."""
        self.before: Counter[str] = Counter()
        """The same, when the last batch of the flood began."""
        self.began: dict[str, float] = {}
        """Begin of the first step of each prompt."""
        self.at_step: Callable[[], object] = lambda: None

    def denoise(self, loaded: LoadedPipeline, batch: Batch) -> list[Image.Image | None]:
        first: FrameSpec = batch.frames[0]
        params = first.params
        if first.prompt == "flood":
            self.before = self.used.copy()
        for frame in batch.frames:
            self.began.setdefault(frame.prompt, self.now)
        for step in range(params["steps"]):
            took = SECONDS * first.bucket * math.prod([params["width"], params["height"]])
            self.now += took
            self.used[first.prompt.split()[0]] += took
            self.at_step()
            batch.on_step(step + 1, params["steps"])
        return [Image.new("RGB", (8, 8)) for _ in batch.frames]

    def owed(self, prompt: str) -> float:
        """Return what is missing to a tenth of the time until the last batch of the flood began."""
        return 0.1 * sum(self.before.values()) - self.before[prompt]


@pytest.fixture
def device(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> Device:
    family = Device()
    pipeline = Pipeline(source="nowhere", bucket={"default": BUCKET})
    farm.catalog.pipelines["device"] = pipeline
    farm._offers["device"] = ResolvedPipeline(
        "device", pipeline, family, SteppedParams, SteppedParams
    )
    monkeypatch.setattr("workers.render.loop.time", SimpleNamespace(monotonic=lambda: family.now))
    return family


@pytest.fixture
def assembly(farm: Farm, device: Device) -> Iterator[Assembly]:
    made = assembly_of(farm, "device")
    device.now = 0.0
    device.used.clear()
    yield made
    made.loop.close()


class Tenants:
    """Tenants that submit at times of the device's clock, until they are stopped."""

    def __init__(self, farm: Farm, device: Device, assembly: Assembly) -> None:
        self.farm, self.device, self.assembly = farm, device, assembly
        self.ids: dict[str, uuid.UUID] = {}
        self.jobs: list[tuple[str, uuid.UUID]] = []
        self.asked: dict[str, float] = {}
        """Time at which each prompt of the product was submitted."""
        self.every = math.inf
        """Time between two frames of the product."""
        self.until = 1000.0
        self.short_work_waits = False
        """True if there is always an interactive batch that may interrupt."""
        device.at_step = self.at_step

    def submit(self, name: str, **fields: object) -> None:
        tenant = self.ids.setdefault(name, new_tenant(self.farm, name))
        fields = {"prompts": [name], "seed": 1, **fields}
        self.jobs.append((name, submit(self.farm, tenant, pipeline="device", **fields)))

    def at_step(self) -> None:
        if self.device.now >= self.until:
            self.until = math.inf
            self.every = math.inf
            for name, job_id in self.jobs:
                if job_row(self.farm, self.ids[name], job_id).finished_at is None:
                    steering.cancel(self.farm, self.ids[name], job_id)
            return
        if self.device.now >= self.every * (len(self.asked) + 1):
            prompt = f"product {len(self.asked)}"
            self.asked[prompt] = self.device.now
            self.submit("product", prompts=[prompt], priority="interactive", bucket=1)
        interactive = self.assembly.interactive
        waits = self.short_work_waits or set(self.asked) - set(self.device.began)
        if waits and interactive._listening.is_set():
            # The step lasts long enough to receive the bell and to claim.
            wait_until(lambda: interactive._lease is not None, 30.0, "it is claimed")

    def waits(self) -> list[float]:
        """Return how long each frame of the product waited."""
        return [self.device.began[prompt] - asked for prompt, asked in self.asked.items()]


@pytest.fixture
def tenants(farm: Farm, device: Device, assembly: Assembly) -> Tenants:
    return Tenants(farm, device, assembly)


def test_others_work_goes_on_while_one_tenant_sends_long_interactive_batches(
    tenants: Tenants, device: Device, assembly: Assembly
) -> None:
    """A batch of 64 frames with 300 steps takes 300 s."""
    tenants.submit("flood", priority="interactive", bucket=64, steps=300, images_per_prompt=10_000)
    tenants.submit("steady", bucket=4, images_per_prompt=10_000)
    tenants.every, tenants.until = 37.0, 1500.0
    assembly.loop.run()
    assert len(tenants.waits()) > 35
    assert max(tenants.waits()) <= 10.0
    # a batch that is not owed yet, and one that is on the device
    assert device.owed("steady") < 2 * 4 * 20 / BUCKET
    assert device.used["flood"] > 0.85 * device.now


def test_others_work_goes_on_while_one_tenant_sends_short_interactive_batches(
    tenants: Tenants, device: Device, assembly: Assembly
) -> None:
    """They interrupt, so the normal batch is on the device all the time."""
    tenants.submit("flood", priority="interactive", bucket=12, images_per_prompt=10_000)
    tenants.submit("steady", bucket=8, steps=100, images_per_prompt=10_000)
    tenants.every, tenants.until = 34.0, 900.0
    tenants.short_work_waits = True
    assembly.loop.run()
    assert len(tenants.waits()) > 22
    assert max(tenants.waits()) <= 10.0
    assert device.owed("steady") < 2 * 8 * 100 / BUCKET
    assert device.used["flood"] > 0.8 * device.now


def test_a_tenant_with_a_frame_in_a_long_batch_of_others_may_interrupt_it(
    tenants: Tenants, device: Device, assembly: Assembly
) -> None:
    shape = {"priority": "interactive", "bucket": 64, "steps": 300}
    tenants.submit("flood", **shape, images_per_prompt=63)
    tenants.submit("product", prompts=["product"], **shape)
    tenants.every, tenants.until = 40.0, 250.0
    assembly.loop.run()
    assert len(tenants.waits()) == 6
    assert max(tenants.waits()) <= 10.0
