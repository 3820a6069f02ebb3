"""The render loop: a batch from its claim to its commit."""

from __future__ import annotations

import hashlib
import io
import time
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from farm.context import Farm
from farm.domain.image_formats import Format
from farm.domain.spec import FrameSpec, Priority
from farm.errors import InvalidRequest
from farm.imaging.encoding import pixels_as_stored, read
from farm.services import steering
from farm.storage import artifact_key
from farm.store import workers
from farm.store.engine import transaction
from farm.store.histograms import WIDTH
from tests.integration.noise_jobs import (
    LAST_STEP,
    at_step,
    lane_sums,
    leases_left,
    submit_noise,
    take,
)
from tests.support.noise_family import Noise
from tests.support.store import frame_rows, job_row, sql
from tests.support.waiting import wait_until
from workers.render.loop import RenderLoop


def test_a_batch_is_rendered_stored_and_completed(
    farm: Farm, tenant: uuid.UUID, noise: Noise, loop: RenderLoop
) -> None:
    job_id = submit_noise(farm, tenant, images_per_prompt=6, seed=1)
    loop.run()
    assert job_row(farm, tenant, job_id).status == "succeeded"
    assert [len(batch) for batch in noise.batches] == [4, 4]  # the short one is padded
    for ordinal, row in frame_rows(farm, job_id).items():
        content = farm.artifacts.get(artifact_key(tenant, job_id, ordinal, row.sha256))
        assert (hashlib.sha256(content).digest(), len(content)) == (row.sha256, row.bytes)
        image, provenance, _ = read(content)
        assert (np.asarray(image) == pixels_of(seed=1 + ordinal)).all()
        assert provenance.frame.seed == 1 + ordinal
        assert provenance.frame.bucket == 4
        assert row.slot == ordinal % 4
    counted = lane_sums(farm)
    assert (counted["succeeded"], counted["batches"]) == (6, 2)
    assert counted["denoise_seconds"] > 0 < counted["encode_seconds"]
    assert sum(counted["denoise_buckets"]) == 2
    assert sum(counted["wait_buckets"]) == 1  # one job began
    assert sum(counted["wait_buckets"][WIDTH * Priority.NORMAL :]) == 1
    assert leases_left(farm) == 0


def pixels_of(seed: int) -> NDArray[np.uint8]:
    """Return the pixels that the family `noise` generates from a seed."""
    return np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)


def test_the_busy_share_agrees_with_a_stopwatch(
    farm: Farm, tenant: uuid.UUID, noise: Noise, loop: RenderLoop
) -> None:
    denoised: list[float] = []

    def disturb(_frames: Sequence[FrameSpec], step: int) -> None:
        if step == 0:
            denoised.append(-time.monotonic())
        take(0.01)
        if step == LAST_STEP:
            denoised[-1] += time.monotonic()

    noise.disturb = disturb
    submit_noise(farm, tenant, images_per_prompt=12)
    started = time.monotonic()
    loop.run()
    whole = time.monotonic() - started
    with transaction(farm.store) as connection:
        [worker] = workers.list_workers(connection)
    assert len(denoised) == 3
    assert worker.busy is not None
    assert sum(denoised) / whole <= worker.busy <= 1
    assert lane_sums(farm)["work_seconds"] <= whole


def test_progress_is_reported_while_a_batch_denoises(
    farm: Farm, tenant: uuid.UUID, noise: Noise, loop: RenderLoop
) -> None:
    submit_noise(farm, tenant)
    seen: list[tuple[int, int]] = []

    def reported() -> bool:
        rows = sql(farm, "SELECT step, steps FROM leases")
        seen.extend((row.step, row.steps) for row in rows)
        return any(row.step == 5 for row in rows)

    noise.disturb = at_step(5, lambda: wait_until(reported, 10.0, "the fifth step was reported"))
    loop.run()
    assert (5, 10) in seen


@pytest.mark.parametrize(
    ("fields", "bells"),
    [
        ({"images_per_prompt": 4}, 0),
        ({"images_per_prompt": 8}, 1),
        ({"images_per_prompt": 3, "grid": {"width": [8, 16]}}, 1),
        ({"images_per_prompt": 80}, 2),
    ],
    ids=["one batch", "two full ones", "two that are not full", "never more than two bells"],
)
def test_a_claim_that_leaves_something_wakes_another_worker(
    farm: Farm, tenant: uuid.UUID, loop: RenderLoop, fields: dict[str, Any], bells: int
) -> None:
    submit_noise(farm, tenant, **fields)
    connection = farm.bells._redis
    connection.flushdb()
    loop.run()
    assert connection.llen("render.noise") == bells


def test_a_batch_that_failed_wakes_workers_for_its_frames(
    farm: Farm, tenant: uuid.UUID, noise: Noise, loop: RenderLoop
) -> None:
    """The frames are rendered one by one, so all idle workers get one."""
    submit_noise(farm, tenant, images_per_prompt=4)
    failed: list[bool] = []

    def fail_once() -> None:
        if not failed:
            failed.append(True)
            farm.bells._redis.flushdb()
            raise RuntimeError

    noise.disturb = at_step(0, fail_once)
    loop.run()
    assert farm.bells._redis.llen("render.noise") == 2


# Cancelled jobs


def test_a_cancelled_batch_stops_between_two_steps(
    farm: Farm, tenant: uuid.UUID, noise: Noise, loop: RenderLoop
) -> None:
    job_id = submit_noise(farm, tenant, images_per_prompt=4)
    steps: list[int] = []

    def disturb(_frames: Sequence[FrameSpec], step: int) -> None:
        steps.append(step)
        if step == 2:
            steering.cancel(farm, tenant, job_id)
        if step > 2:
            take(0.1)

    noise.disturb = disturb
    loop.run()
    assert 3 <= len(steps) < 10
    assert job_row(farm, tenant, job_id).status == "cancelled"
    assert {row.state for row in frame_rows(farm, job_id).values()} == {"cancelled"}
    assert leases_left(farm) == 0


def test_a_batch_goes_on_while_one_frame_of_it_is_wanted(
    farm: Farm, tenant: uuid.UUID, noise: Noise, loop: RenderLoop
) -> None:
    first = submit_noise(farm, tenant, images_per_prompt=2, bucket=4)
    second = submit_noise(farm, tenant, images_per_prompt=2, bucket=4)

    def disturb(_frames: Sequence[FrameSpec], step: int) -> None:
        if step == 2:
            steering.cancel(farm, tenant, first)
        take(0.03)

    noise.disturb = disturb
    loop.run()
    assert len(noise.batches) == 1
    assert job_row(farm, tenant, first).status == "cancelled"
    assert job_row(farm, tenant, second).status == "succeeded"
    assert lane_sums(farm)["dropped"] == 2


# Formats


@pytest.mark.parametrize(("form", "extension"), [("jpeg", "jpg"), ("webp", "webp")])
def test_pictures_are_stored_in_the_jobs_format(
    farm: Farm, tenant: uuid.UUID, loop: RenderLoop, form: Format, extension: str
) -> None:
    job_id = submit_noise(farm, tenant, seed=1, format=form)
    loop.run()
    row = frame_rows(farm, job_id)[0]
    key = artifact_key(tenant, job_id, 0, row.sha256, form)
    assert key.endswith(f".{extension}")
    content = farm.artifacts.get(key)
    assert (hashlib.sha256(content).digest(), len(content)) == (row.sha256, row.bytes)
    image, provenance, found = read(content)
    assert (found, provenance.frame.format, provenance.frame.seed) == (form, form, 1)
    drawn = Image.fromarray(pixels_of(seed=1))
    assert image.tobytes() == pixels_as_stored(drawn, form).tobytes()


def test_jobs_of_different_formats_share_a_batch(
    farm: Farm, tenant: uuid.UUID, noise: Noise, loop: RenderLoop
) -> None:
    job_ids = [
        submit_noise(farm, tenant, bucket=4, images_per_prompt=2, format=form)
        for form in ("png", "webp")
    ]
    loop.run()
    assert len(noise.batches) == 1
    for job_id in job_ids:
        assert job_row(farm, tenant, job_id).status == "succeeded"


def picture_without_provenance() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [b"", b"not a picture", picture_without_provenance()],
    ids=["empty", "no picture", "no provenance"],
)
def test_an_unreadable_picture_is_refused(content: bytes) -> None:
    with pytest.raises(InvalidRequest):
        read(content)
