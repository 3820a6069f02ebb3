"""Filters: a rejected picture is rendered again with another seed.

So a job yields the requested number of pictures.
"""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from PIL import Image

from farm.context import Farm
from farm.domain.spec import FrameSpec, derived_seed
from farm.errors import CatalogError
from farm.imaging.encoding import read
from farm.imaging.filters import NEAR, Verdict, blank, load_filters, near_duplicate
from farm.pipelines.catalog import Pipeline
from farm.pipelines.resolve import ResolvedPipeline
from farm.services import steering
from farm.services.exports import service as use_cases
from farm.storage import artifact_key
from farm.store import perceptual_hashes
from farm.store.engine import transaction
from tests.benchmarks.encoding import photo_like
from tests.support.noise_family import Noise, NoiseParams
from tests.support.render_loops import assembly_of
from tests.support.store import attempts_of, frame_rows, job_row, register_worker, sql, submit
from workers.exporter import Exporter
from workers.render.loop import RenderLoop

HERE = "tests.integration.test_filters"
Make = Callable[..., RenderLoop]


def every_third(_image: Image.Image, spec: FrameSpec) -> Verdict:
    return Verdict(spec.seed % 3 != 0, spec.seed % 3, "its seed is a multiple of three")


def everything(_image: Image.Image, _spec: FrameSpec) -> Verdict:
    return Verdict(False, 0.25)


@pytest.fixture
def line_with(farm: Farm) -> Iterator[Make]:
    """Return a function that builds the render loop of a pipeline with filters."""
    with ExitStack() as stack:

        def make(*filters: str, family: Noise | None = None) -> RenderLoop:
            family = family or Noise()
            pipeline = Pipeline(source="nowhere", bucket={"default": 4}, filters=list(filters))
            farm.catalog.pipelines["noise"] = pipeline
            resolved = ResolvedPipeline("noise", pipeline, family, NoiseParams, NoiseParams)
            farm._offers["noise"] = resolved
            loop = assembly_of(farm, "noise").loop
            stack.callback(loop.close)
            return loop

        yield make


def specs_stored(farm: Farm, tenant: uuid.UUID, job_id: uuid.UUID) -> dict[int, FrameSpec]:
    """Read the spec in each picture's file."""
    found = {}
    for ordinal, row in frame_rows(farm, job_id).items():
        content = farm.artifacts.get(artifact_key(tenant, job_id, ordinal, row.sha256))
        found[ordinal] = read(content)[1].frame
    return found


def test_a_job_keeps_as_many_as_it_asked_for(
    farm: Farm, tenant: uuid.UUID, line_with: Make
) -> None:
    line = line_with(f"{HERE}:every_third")
    job_id = submit(farm, tenant, pipeline="noise", images_per_prompt=300, seed=0, bucket=4)
    line.run()
    job = job_row(farm, tenant, job_id)
    assert (job.status, job.succeeded) == ("succeeded", 300)
    rows, stored = frame_rows(farm, job_id), specs_stored(farm, tenant, job_id)
    for ordinal, spec in stored.items():
        rerolls = rows[ordinal].rerolls
        assert spec.seed % 3 != 0
        assert spec.seed == (derived_seed(ordinal, rerolls, 63) if rerolls else ordinal)
        assert (rerolls > 0) == (ordinal % 3 == 0)
        reasons = [reason for _, reason in attempts_of(farm, job_id, ordinal)]
        assert reasons == ["rejected"] * rerolls
    assert len({spec.seed for spec in stored.values()}) == 300
    messages = {row.message for row in sql(farm, "SELECT DISTINCT message FROM attempts")}
    assert messages == {f"Filter {HERE}:every_third, score 0: its seed is a multiple of three."}


def test_the_manifest_tells_what_was_rejected(
    farm: Farm, tenant: uuid.UUID, line_with: Make
) -> None:
    line = line_with(f"{HERE}:every_third")
    job_id = submit(farm, tenant, pipeline="noise", images_per_prompt=12, seed=0)
    line.run()
    export = use_cases.create(
        farm, tenant, kind="webdataset", job_ids=[job_id], labels={}, shard_frames=5
    )
    Exporter(farm, "exporter").answer()
    manifest = json.loads(farm.artifacts.get(f"{export.prefix}manifest.json"))
    rejected = [int(row.n) for row in sql(farm, "SELECT count(*) AS n FROM attempts")]
    assert [manifest["rejected"]] == rejected
    assert sum(shard["rejected"] for shard in manifest["shards"]) == manifest["rejected"] >= 4
    assert manifest["images"] == 12


def test_a_frame_that_is_always_rejected_is_dead_in_the_end(
    farm: Farm, tenant: uuid.UUID, line_with: Make
) -> None:
    line = line_with(f"{HERE}:everything")
    job_id = submit(farm, tenant, pipeline="noise", max_rerolls=2, max_attempts=1)
    line.run()
    job = job_row(farm, tenant, job_id)
    assert (job.status, job.dead) == ("failed", 1)
    assert attempts_of(farm, job_id) == [(attempt, "rejected") for attempt in (1, 2, 3)]
    assert "everything, score 0.25" in frame_rows(farm, job_id)[0].error
    steering.retry(farm, tenant, job_id)
    line.run()
    seeds = [row.rerolls for row in frame_rows(farm, job_id).values()]
    assert seeds == [5]  # three more seeds, none repeated
    assert len(attempts_of(farm, job_id)) == 6


def test_no_two_pictures_of_a_job_look_alike(
    farm: Farm, tenant: uuid.UUID, line_with: Make
) -> None:
    class Alike(Noise):
        """A family with only five pictures, for all seeds."""

        def denoise(self, loaded: Any, batch: Any) -> list[Image.Image | None]:
            super().denoise(loaded, batch)
            return [
                Image.fromarray(
                    np.random.default_rng(frame.seed % 5).integers(0, 255, (64, 64, 3), np.uint8)
                )
                for frame in batch.frames
            ]

    line = line_with("near_duplicate", family=Alike())
    job_id = submit(farm, tenant, pipeline="noise", images_per_prompt=5, seed=0, max_rerolls=200)
    other = submit(farm, tenant, pipeline="noise", images_per_prompt=2, seed=0)
    more = submit(farm, tenant, pipeline="noise", images_per_prompt=6, seed=0, max_rerolls=5)
    line.run()
    kept = specs_stored(farm, tenant, job_id)
    assert len({spec.seed % 5 for spec in kept.values()}) == 5
    assert job_row(farm, tenant, other).status == "succeeded"  # not compared: another job's
    job = job_row(farm, tenant, more)
    assert (job.status, job.succeeded, job.dead) == ("partial", 5, 1)
    assert "it looks like frame" in sql(farm, "SELECT message FROM attempts LIMIT 1")[0].message


def test_prints_are_near_within_six_bits(farm: Farm, tenant: uuid.UUID) -> None:
    job_id = submit(farm, tenant)
    with transaction(farm.store) as connection:
        assert perceptual_hashes.keep_print(connection, job_id, 0, 2**64 - 1, NEAR) is None
        assert perceptual_hashes.keep_print(connection, job_id, 1, 2**64 - 64, NEAR) == (0, 6)
        assert perceptual_hashes.keep_print(connection, job_id, 1, 2**64 - 128, NEAR) is None
        assert perceptual_hashes.keep_print(connection, job_id, 1, 2**64 - 1, NEAR) == (0, 0)
        assert perceptual_hashes.keep_print(connection, job_id, 0, 2**64 - 1, NEAR) is None


def test_the_nearest_is_found_wherever_its_bits_differ(farm: Farm, tenant: uuid.UUID) -> None:
    """Compared with a linear search over all hashes of a job."""
    job_id, other = submit(farm, tenant), submit(farm, tenant)
    drawn, kept = random.Random(3), dict[int, int]()
    with transaction(farm.store) as connection:
        perceptual_hashes.keep_print(connection, other, 0, 0, NEAR)
        for ordinal in range(300):
            near = drawn.choice([*kept.values(), drawn.getrandbits(64)])
            flips = drawn.sample(range(64), drawn.randint(0, NEAR + 3))
            hashed = sum((1 << place for place in flips), 0) ^ near
            away = {number: (hashed ^ one).bit_count() for number, one in kept.items()}
            nearest = min(away, key=lambda number: (away[number], number), default=None)
            found = perceptual_hashes.keep_print(connection, job_id, ordinal, hashed, NEAR)
            if nearest is not None and away[nearest] <= NEAR:
                assert found == (nearest, away[nearest])
            else:
                assert found is None
                kept[ordinal] = hashed
    assert len(kept) > 20


def test_a_frame_that_dies_leaves_no_print(farm: Farm, tenant: uuid.UUID) -> None:
    job_id = submit(farm, tenant, images_per_prompt=2, max_attempts=2, bucket=2)
    worker = register_worker(farm)
    lease = worker.must_claim()
    with transaction(farm.store) as connection:
        for frame in lease.frames:
            perceptual_hashes.keep_print(connection, job_id, frame.ordinal, frame.ordinal << 32, 0)
    worker.fail(lease, fences=[lease.frames[0].fence], retryable=False)
    worker.fail(lease, fences=[lease.frames[1].fence])
    assert sql(farm, "SELECT ordinal FROM perceptual_hashes") == [(1,)]


def test_the_built_in_filters_judge_real_pictures() -> None:
    spec = FrameSpec(pipeline="p", prompt="", seed=0, bucket=1, params={})
    flat = Image.new("RGB", (64, 64), "navy")
    photo, other = photo_like(256, 1), photo_like(256, 2)
    assert not blank(flat, spec).keep
    assert blank(photo, spec).keep
    prints_of = [
        near_duplicate(each, spec).perceptual_hash
        for each in (photo, photo.resize((200, 200)), other)
    ]
    first, smaller, another = [each for each in prints_of if each is not None]
    assert (first ^ smaller).bit_count() <= NEAR
    assert (first ^ another).bit_count() > NEAR


@pytest.mark.parametrize("name", ["nothing", "farm.nothing:blank", "farm.imaging.filters:nothing"])
def test_an_unknown_filter_is_refused(name: str) -> None:
    with pytest.raises(CatalogError, match="filters: "):
        load_filters([name])


def test_a_filter_s_name_is_checked_in_the_catalog() -> None:
    with pytest.raises(ValueError, match="write its name"):
        Pipeline(source="x", filters=["not a name"])
