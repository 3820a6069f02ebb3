"""Previews: pictures of what is being denoised, which change nothing that is rendered."""

from __future__ import annotations

import base64
import io
import threading
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import openai
import pytest
import redis
import torch
from PIL import Image

from api.streaming import feed
from farm.context import Farm, open_farm
from farm.pipelines.family import Latents, latents_shown_to
from farm.pipelines.runtime.slots import SlotTest
from farm.services import jobs
from farm.services.previews import KEPT_SECONDS, MAX_FRAMES, Preview, Previews
from farm.storage import artifact_key
from tests.support.api_server import Api, render, serving
from tests.support.parity_cases import LONG_WEIGHTED, save_catalog
from tests.support.render_loops import assembly_of
from tests.support.store import frame_rows, new_tenant, register_worker, sql
from tests.support.streams import Sent, streamed
from tests.support.waiting import wait_until
from workers.render.previews import batches
from workers.render.previews.colours import LatentColours, as_grid
from workers.render.previews.noise import LEVELS, Level, estimated_picture, levels_around

# diffusers' own samplers hand torch tensors to numpy.array.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

STEPS = 30
KINDS = ("sd", "sdxl", "refined", "kandinsky", "pixart", "flux")


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_catalog(tmp_path_factory.mktemp("previews"))


@pytest.fixture
def studio(farm: Farm, catalog: Path) -> Iterator[Farm]:
    """A farm with a tiny pipeline of each kind."""
    opened = open_farm(farm.settings.model_copy(update={"pipelines": catalog}))
    yield opened
    opened.close()


@pytest.fixture
def previews(farm: Farm) -> Iterator[Previews]:
    made = Previews(farm.settings)
    yield made
    made.close()


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch) -> list[tuple[uuid.UUID, Preview]]:
    """Every preview that a worker puts into Redis, as soon as a step allows one."""
    monkeypatch.setattr(batches, "PICTURE_SECONDS", 0.0)
    found: list[tuple[uuid.UUID, Preview]] = []
    put_all = Previews.put

    def noting(self: Previews, made: Any) -> None:
        found.extend((job_id, each) for job_id, some in made.items() for each in some)
        put_all(self, made)

    monkeypatch.setattr(Previews, "put", noting)
    return found


def submitted(farm: Farm, pipeline: str, **fields: Any) -> uuid.UUID:
    body = {
        "pipeline": pipeline,
        "prompts": ["a red star", "a blue ring"],
        "seed": 3,
        "steps": STEPS,
        "bucket": 4,
        "width": 64,
        "height": 128,
        **fields,
    }
    job_id: uuid.UUID = jobs.submit(farm, new_tenant(farm, "ann"), body).id
    return job_id


def digests(farm: Farm, job_id: uuid.UUID) -> list[bytes]:
    rows = frame_rows(farm, job_id)
    assert all(row.state == "succeeded" for row in rows.values())
    return [bytes(row.sha256) for row in rows.values()]


def opened(preview: Preview) -> Image.Image:
    image = Image.open(io.BytesIO(preview.jpeg))
    image.load()
    return image


# In a worker


@pytest.mark.parametrize("kind", KINDS)
def test_a_watched_job_has_previews_and_the_same_bytes(
    studio: Farm, previews: Previews, put: list[tuple[uuid.UUID, Preview]], kind: str
) -> None:
    made = assembly_of(studio, kind)
    more = {"prior_steps": 4} if kind == "kandinsky" else {}
    unwatched = submitted(studio, kind, **more)
    made.loop.run()
    assert put == [], "nobody watches"
    watched = submitted(studio, kind, **more)
    previews.watch([watched])
    made.loop.run()
    made.loop.close()
    assert digests(studio, watched) == digests(studio, unwatched)
    assert {job_id for job_id, _ in put} == {watched}
    assert {each.ordinal for _, each in put} == {0, 1}
    for _, each in put:
        assert 0.2 * each.steps <= each.step < each.steps
        assert opened(each).size == (64, 128)
    wait_until(lambda: not previews.watch([watched])[watched], 10, "they end with the batch")


def test_a_preview_is_like_the_picture(
    farm: Farm, previews: Previews, put: list[tuple[uuid.UUID, Preview]]
) -> None:
    """Previews of a trained model: of four pictures, each is nearest to its own."""
    made = assembly_of(farm, "demo")
    size: dict[str, Any] = {"width": 64, "height": 64, "steps": 25, "bucket": 4}
    prompts = [
        "a red star on a blue background",
        "a blue ring on a white background",
        "a green heart on a black background",
        "a yellow square on a red background",
    ]
    job_id = submitted(farm, "demo", **size, prompts=prompts, seed=3)
    previews.watch([job_id])
    made.loop.run()
    made.loop.close()
    pictures = {ordinal: stored(farm, job_id, ordinal) for ordinal in range(4)}
    assert {each.ordinal for _, each in put} == pictures.keys()
    assert min(each.step / each.steps for _, each in put) < 0.4, "also early ones"
    for _, preview in put:
        shown = np.asarray(opened(preview), dtype=float)
        away = {other: float(abs(shown - each).mean()) for other, each in pictures.items()}
        assert min(away, key=lambda other: away[other]) == preview.ordinal, away
        assert away[preview.ordinal] < 60, "of 255"


def stored(farm: Farm, job_id: uuid.UUID, ordinal: int) -> Any:
    """Return the pixels of a frame's picture."""
    row = frame_rows(farm, job_id)[ordinal]
    key = artifact_key(row_tenant(farm, job_id), job_id, ordinal, bytes(row.sha256), "png")
    picture = Image.open(io.BytesIO(farm.artifacts.get(key)))
    return np.asarray(picture.convert("RGB"), dtype=float)


def row_tenant(farm: Farm, job_id: uuid.UUID) -> uuid.UUID:
    found: uuid.UUID = sql(farm, "SELECT tenant_id FROM jobs WHERE id = :id", id=job_id)[0][0]
    return found


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("guarded", {}),
        ("sd", {"prompts": ["a red star", LONG_WEIGHTED], "prompt_syntax": "compel"}),
    ],
    ids=["with a safety checker", "in several calls"],
)
def test_some_batches_have_none(
    studio: Farm,
    previews: Previews,
    put: list[tuple[uuid.UUID, Preview]],
    kind: str,
    fields: dict[str, Any],
) -> None:
    """A checker may keep a picture back, and a call with a part of the batch has other places."""
    made = assembly_of(studio, kind)
    for _ in range(2):
        job_id = submitted(studio, kind, **fields)
        previews.watch([job_id])
        made.loop.run()
    made.loop.close()
    assert put == []


def test_a_pipeline_with_a_filter_has_none(studio: Farm) -> None:
    """A filter may reject the picture."""
    entry = studio.catalog.pipelines["sd"]
    studio.catalog.pipelines["sd"] = entry.model_copy(update={"filters": ["blank"]})
    made = assembly_of(studio, "sd")
    assert made.resolved.pipeline.filters
    assert made.loop._previewing.colours is None
    made.loop.close()
    studio.catalog.pipelines["sd"] = entry


def test_only_watched_jobs_and_few_frames_have_some(
    studio: Farm,
    previews: Previews,
    put: list[tuple[uuid.UUID, Preview]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two frames of each of two jobs share a batch, and the second job is watched."""
    made = assembly_of(studio, "sd")
    for frames, watched_jobs, seen in ((2, 2, 2), (4, 2, 4), (4, 1, 2)):
        monkeypatch.setattr(batches, "FRAMES", frames)
        put.clear()
        both = [submitted(studio, "sd") for _ in range(2)]
        previews.watch(both[:watched_jobs])
        made.loop.run()
        found = {(job_id, each.ordinal) for job_id, each in put}
        assert len(found) == seen
        assert {job_id for job_id, _ in found} <= {*both[:watched_jobs]}
    made.loop.close()


def test_previews_keep_their_pace(
    studio: Farm,
    previews: Previews,
    put: list[tuple[uuid.UUID, Preview]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batches, "PICTURE_SECONDS", 60.0)
    made = assembly_of(studio, "sd")
    job_id = submitted(studio, "sd", prompts=["a red star"])
    previews.watch([job_id])
    made.loop.run()
    made.loop.close()
    assert len(put) == 1


@pytest.mark.parametrize(("eta", "has_before"), [(0.0, True), (0.7, False)])
def test_a_sampler_with_noise_shows_the_latents_themselves(
    studio: Farm,
    previews: Previews,
    put: list[tuple[uuid.UUID, Preview]],
    monkeypatch: pytest.MonkeyPatch,
    eta: float,
    has_before: bool,
) -> None:
    copied = batches._copied
    seen: set[bool] = set()

    def noting(latents: Latents, before: Latents | None, frames: int) -> Any:
        seen.add(before is not None)
        return copied(latents, before, frames)

    monkeypatch.setattr(batches, "_copied", noting)
    made = assembly_of(studio, "sd")
    job_id = submitted(studio, "sd", sampler="ddim", eta=eta)
    previews.watch([job_id])
    made.loop.run()
    made.loop.close()
    assert seen == {has_before}
    assert put


@pytest.mark.parametrize("fault", ["the copy", "the thread"])
def test_an_error_of_a_preview_fails_no_frame(
    studio: Farm, previews: Previews, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no memory")

    made = assembly_of(studio, "sd")
    if fault == "the copy":
        monkeypatch.setattr(batches, "_copied", broken)
        monkeypatch.setattr(batches, "PICTURE_SECONDS", 0.0)
    else:
        monkeypatch.setattr(batches.Previewing, "do", broken)
    job_id = submitted(studio, "sd")
    previews.watch([job_id])
    made.loop.run()
    made.loop.close()
    assert digests(studio, job_id)


def test_the_slot_test_shows_nothing_to_the_batch_that_it_interrupts(studio: Farm) -> None:
    made = assembly_of(studio, "sd")
    submitted(studio, "sd")
    spec = register_worker(studio, pipeline="sd").claim("sd").frames[0].spec  # type: ignore[union-attr]
    shown: list[Latents] = []
    with latents_shown_to(shown.append):
        SlotTest("sd", made.resolved.family, made.resolved.params_type).threads(made.loaded, spec)
    assert shown == []
    made.loop.close()


def test_without_redis_all_is_rendered(
    studio: Farm, put: list[tuple[uuid.UUID, Preview]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def away(*_: Any, **__: Any) -> Any:
        asked.append(1)
        raise redis.ConnectionError("gone")

    monkeypatch.setattr(redis.Redis, "mget", away)
    made = assembly_of(studio, "sd")
    job_ids = [submitted(studio, "sd", seed=seed) for seed in range(4)]
    made.loop.run()
    made.loop.close()
    for job_id in job_ids:
        assert digests(studio, job_id)
    assert put == []
    assert len(asked) == 1, "it is left alone for a while"


# The colours of latents


def test_colours_are_fitted() -> None:
    """A decoder that is a linear map is found exactly."""
    random = np.random.default_rng(5)
    true_map = random.uniform(-40, 40, (4, 3))
    latents = random.normal(0, 0.5, (500, 4))
    colours = LatentColours(latents, latents @ true_map + 128)
    new = random.normal(0, 0.5, (8, 12, 4))
    shown = colours.picture(new, (12, 8))
    assert shown is not None
    expected = np.clip(new @ true_map + 128, 0, 255)
    assert abs(np.asarray(shown, dtype=float) - expected).max() <= 3
    assert colours.picture(np.zeros((8, 12, 5)), (12, 8)) is None, "other channels"
    assert colours.picture(np.full((8, 12, 4), np.nan), (12, 8)) is None


def test_packed_latents_have_the_same_picture() -> None:
    """As diffusers' Flux packs them, by its own function."""
    random = np.random.default_rng(6)
    latents = random.normal(0, 1, (300, 4))
    colours = LatentColours(latents, random.uniform(0, 255, (300, 3)))
    grid = torch.from_numpy(random.normal(0, 1, (1, 4, 8, 12)))
    packed = diffusers.FluxPipeline._pack_latents(grid, 1, 4, 8, 12)
    plain = colours.picture(as_grid(grid.numpy(), 96, 64)[0], (96, 64))
    other = colours.picture(as_grid(packed.numpy(), 96, 64)[0], (96, 64))
    assert plain is not None
    assert plain == other


@pytest.mark.parametrize("name", LEVELS)
def test_the_picture_is_estimated_from_two_steps(name: str) -> None:
    """A perfect model knows picture and noise, so both stay the same at every step."""
    # DDIM alone would clip the picture by default. Latents are never clipped.
    sampler = getattr(diffusers, name)(
        **({"clip_sample": False} if name == "DDIMScheduler" else {})
    )
    sampler.set_timesteps(8)
    seeded = torch.Generator().manual_seed(3)
    picture, noise = (torch.randn(2, 4, 5, 6, generator=seeded) for _ in range(2))
    flows = name.startswith("FlowMatch")
    start = Latents(picture, 1, 8, sampler, sampler.timesteps[0], index=1)
    first, _ = known(levels_around(start))
    latents = first.picture * picture + first.noise * noise
    estimated = 0
    for index, timestep in enumerate(sampler.timesteps):
        before = latents
        said = noise - picture if flows else noise
        if hasattr(sampler, "scale_model_input"):
            sampler.scale_model_input(before, timestep)  # some insist on it
        latents = sampler.step(said, timestep, before, return_dict=False)[0]
        step_index = getattr(sampler, "step_index", None)
        levels = levels_around(Latents(latents, index + 1, 8, sampler, timestep, step_index))
        found = estimated_picture(before.numpy(), latents.numpy(), levels)
        if levels is not None:
            estimated += 1
            np.testing.assert_allclose(found, picture.numpy(), atol=2e-2)
    assert estimated == 8


def known(levels: tuple[Level, Level] | None) -> tuple[Level, Level]:
    assert levels is not None
    return levels


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("EulerAncestralDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("PNDMScheduler", {}),
    ],
)
def test_other_samplers_show_the_latents_themselves(name: str, options: dict[str, str]) -> None:
    sampler = getattr(diffusers, name)(**options)
    sampler.set_timesteps(8)
    latents = Latents(torch.zeros(1), 3, 8, sampler, sampler.timesteps[2], 3)
    assert levels_around(latents) is None
    after = np.ones((1, 4, 2, 2))
    assert estimated_picture(after * 2, after, None) is after


def test_packed_latents_are_a_grid() -> None:
    grid = np.arange(2 * 6 * 4 * 5).reshape(2, 6, 4, 5)
    assert (as_grid(grid.transpose(0, 3, 1, 2), 64, 96) == grid).all()
    assert (as_grid(grid.reshape(2, 24, 5), 64, 96) == grid).all()
    assert as_grid(grid.reshape(2, 24, 5), 64, 64) is None
    assert as_grid(np.zeros((2, 768)), 64, 64) is None, "as an image embedding"


# In Redis


def a_preview(ordinal: int = 0, step: int = 5, colour: str = "red") -> Preview:
    content = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(content, "JPEG")
    return Preview(ordinal, step, 10, content.getvalue())


def test_a_job_has_few_previews_and_loses_them(farm: Farm, previews: Previews) -> None:
    job_id, other = uuid.uuid4(), uuid.uuid4()
    assert previews.watched([job_id, other]) == set()
    assert previews.watch([job_id]) == {job_id: []}
    assert previews.watched([job_id, other]) == {job_id}
    previews.put({job_id: [a_preview(ordinal) for ordinal in range(MAX_FRAMES + 4)]})
    assert {each.ordinal for each in previews.watch([job_id])[job_id]} == {*range(MAX_FRAMES)}
    previews.put({job_id: [a_preview(3, step=6), a_preview(99)]})
    assert {each.ordinal: each.step for each in previews.watch([job_id])[job_id]}[3] == 6
    previews.drop({job_id: range(10)})
    previews.put({job_id: [a_preview(99)]})
    assert 99 in {each.ordinal for each in previews.watch([job_id])[job_id]}
    client = redis.Redis.from_url(farm.settings.redis_url.get_secret_value())
    keys = list(client.scan_iter("farm.*"))
    assert len(keys) == 2
    assert all(0 < client.ttl(key) <= KEPT_SECONDS for key in keys)
    client.close()


# In streams


@pytest.fixture
def api(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    monkeypatch.setattr(feed, "PREVIEW_SECONDS", 0.05)
    with serving(farm) as running:
        yield running


def a_job(api: Api, tenant: str = "ann") -> tuple[Any, uuid.UUID]:
    client = api.client(tenant)
    return client, uuid.UUID(api.submit(client, images_per_prompt=2)["id"])


def until(found: Iterator[Sent], kind: str) -> Sent:
    return next(each for each in found if each.kind == kind)


def test_a_stream_sends_each_preview_once(api: Api, previews: Previews) -> None:
    ann, job_id = a_job(api)
    with streamed(ann, f"/v1/jobs/{job_id}/events", previews="true") as found:
        wait_until(lambda: previews.watched([job_id]), 10, "the worker can see that it is watched")
        sent = a_preview(1)
        previews.put({job_id: [sent]})
        event = until(found, "preview")
        assert event.id is not None, "the cursor of what came before"
        assert base64.b64decode(event.data.pop("b64")) == sent.jpeg
        assert event.data == {
            "job": str(job_id),
            "ordinal": 1,
            "step": 5,
            "steps": 10,
            "format": "jpeg",
        }
        previews.put({job_id: [a_preview(1, step=7), a_preview(0, step=7)]})
        steps = {
            (each.data["ordinal"], each.data["step"])
            for _, each in zip(range(2), found, strict=False)
        }
        assert steps == {(0, 7), (1, 7)}
        worker = register_worker(api.farm)
        while lease := worker.claim():
            render(worker, lease)
        assert [each.kind for each in found if each.kind == "preview"] == []


def test_a_listener_that_did_not_ask_gets_none(api: Api, previews: Previews) -> None:
    ann, job_id = a_job(api)
    path = f"/v1/jobs/{job_id}/events"
    other = api.client("ann")
    with streamed(ann, path, previews="true") as asking, streamed(other, path) as plain:
        wait_until(lambda: previews.watched([job_id]), 10, "the worker can see that it is watched")
        previews.put({job_id: [a_preview()]})
        until(asking, "preview")
        api.client("ann").post(f"{path.removesuffix('events')}cancel")
        assert "preview" not in {each.kind for each in plain}


def test_many_jobs_have_their_turns(
    api: Api, previews: Previews, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "MAX_PREVIEWED_JOBS", 1)
    jobs_of_ann = [a_job(api) for _ in range(3)]
    with ExitStack() as stack:
        streams = [
            stack.enter_context(streamed(client, f"/v1/jobs/{job_id}/events", previews="true"))
            for client, job_id in jobs_of_ann
        ]
        for _, job_id in jobs_of_ann:
            previews.put({job_id: [a_preview()]})
        assert [until(found, "preview").kind for found in streams] == ["preview"] * 3


def test_only_who_asks_gets_previews(api: Api, previews: Previews) -> None:
    """Also not of a job of another tenant, or of a job that nobody asks about."""
    ann, job_id = a_job(api)
    previews.put({job_id: [a_preview()]})
    with streamed(ann, f"/v1/jobs/{job_id}/events") as found:
        until(found, "state")
        assert previews.watched([job_id]) == set()
        api.client("ann").post(f"/v1/jobs/{job_id}/cancel")
        assert "preview" not in {each.kind for each in found}
    bob = api.client("bob")
    answer = bob.get(
        f"/v1/jobs/{job_id}/events",
        params={"previews": "true"},
        headers={"Accept": "text/event-stream"},
    )
    assert answer.status_code == 404


def test_events_do_not_wait_for_previews(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()

    def silent(*_: Any) -> Any:
        over.wait(30)  # a Redis that does not answer
        raise redis.TimeoutError("silent")

    monkeypatch.setattr(redis.client.Pipeline, "execute", silent)
    ann, job_id = a_job(api)
    try:
        with streamed(ann, f"/v1/jobs/{job_id}/events", previews="true") as found:
            until(found, "state")
            api.client("ann").post(f"/v1/jobs/{job_id}/cancel")
            until(found, "job.cancelled")
    finally:
        over.set()


def test_partial_images_of_openai_are_previews(api: Api, previews: Previews) -> None:
    """At most as many as asked for, spread over the steps."""
    key = api.key("ann")
    with openai.OpenAI(base_url=f"{api.url}/openai/v1", api_key=key, max_retries=0) as client:
        stream = client.images.generate(
            model="demo", prompt="a red star", stream=True, partial_images=2
        )
        job_id = uuid.UUID(api.client("ann").get("/v1/jobs").json()["data"][0]["id"])
        wait_until(lambda: previews.watched([job_id]), 10, "the worker can see that it is watched")
        found = iter(stream)
        sent = [a_preview(step=step) for step in (3, 5)]
        for number, preview in enumerate(sent):
            previews.put({job_id: [preview]})
            event = next(found)
            assert event.type == "image_generation.partial_image"
            assert (event.partial_image_index, event.size) == (number, "32x32")
            assert base64.b64decode(event.b64_json) == preview.jpeg
        previews.put({job_id: [a_preview(step=8)]})
        worker = register_worker(api.farm)
        render(worker, worker.must_claim())
        assert [event.type for event in found] == ["image_generation.completed"]
