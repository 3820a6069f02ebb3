"""Every picture of the farm equals that of bare diffusers, in every pixel.

The farm's API takes jobs for tiny random checkpoints. The render loop of each pipeline renders them
into the storage. Bare diffusers renders the same pictures. All run in this process.
"""

from __future__ import annotations

import io
import json
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from farm.context import Farm, open_farm
from farm.imaging.encoding import read
from farm.local import Servers
from farm.pipelines.runtime.devices import torch_threads
from farm.rendering.replay import replay
from farm.services.control_images import load_image
from farm.store import keys
from farm.store.engine import transaction
from tests.conftest import settings_on
from tests.support.api_server import serving
from tests.support.databases import Databases
from tests.support.diffusers_reference import OF_JOB, DiffusersReference, Frame, Picture, frames_of
from tests.support.parity_cases import (
    CASES,
    CONTROL,
    IMAGES,
    VARIANTS,
    Case,
    case,
    knob_pairs,
    mixtures,
    save_catalog,
    tables,
)
from tests.support.render_loops import assembly_of
from workers.render.loop import RenderLoop

pytestmark = [
    # diffusers' own samplers hand torch tensors to numpy.array,
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
    # and its combined pipeline of Kandinsky calls the decoder in a deprecated way.
    pytest.mark.filterwarnings("ignore:`callback_steps`:FutureWarning"),
]

THREADS = 1


@dataclass
class ParityFarm:
    """The farm of this module, and bare diffusers."""

    farm: Farm
    client: httpx.Client
    bare: DiffusersReference
    lines: ExitStack
    images: dict[str, str] = field(default_factory=dict)
    """IDs of control images, by the names that cases use."""
    submitted: dict[str, str] = field(default_factory=dict)
    """IDs of jobs, by their request."""
    loaded: dict[str, RenderLoop] = field(default_factory=dict)

    def submit(self, pipeline: str, job: dict[str, Any]) -> str:
        return self.submit_any({"pipeline": pipeline, **job})

    @property
    def tenant_id(self) -> uuid.UUID:
        with transaction(self.farm.store) as connection:
            return keys.ensure_tenant(connection, "ann")

    def submit_any(self, job: dict[str, Any]) -> str:
        body = self.with_ids(job)
        answer = self.client.post("/v1/jobs", json=body)
        assert answer.status_code == 202, answer.text
        job_id: str = answer.json()["id"]
        return job_id

    def with_ids(self, job: dict[str, Any]) -> dict[str, Any]:
        """Replace the names of control images by their IDs."""

        def named(nets: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return [{**net, "image": self.images[net["image"]]} for net in nets]

        job = dict(job)
        if "control" in job:
            job["control"] = named(job["control"])
        grid = job.get("grid", {})
        if "control" in grid:
            job["grid"] = {**grid, "control": [named(nets) for nets in grid["control"]]}
        return job

    def render(self, pipeline: str) -> None:
        """Render all waiting frames of a pipeline. The first call loads it."""
        if pipeline not in self.loaded:
            self.loaded[pipeline] = assembly_of(self.farm, pipeline).loop
            self.lines.callback(self.loaded[pipeline].close)
        with torch_threads(THREADS):
            self.loaded[pipeline].run()

    def rendered(self, case: Case) -> str:
        """Return the ID of the case's job. The first call submits and renders it."""
        content = json.dumps([case.pipeline, case.job])
        if content not in self.submitted:
            self.submitted[content] = self.submit(case.pipeline, case.job)
            self.render(case.pipeline)
        return self.submitted[content]

    def job(self, job_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.client.get(f"/v1/jobs/{job_id}").raise_for_status().json()
        return found

    def rows(self, job_id: str) -> list[dict[str, Any]]:
        """Read a job's frames."""
        page = self.client.get(f"/v1/jobs/{job_id}/frames", params={"limit": 200}).json()
        assert page["next"] is None
        rows: list[dict[str, Any]] = page["data"]
        return rows

    def stored(self, row: dict[str, Any]) -> bytes:
        """Read a frame's file from the storage."""
        assert row["state"] == "succeeded", row
        answer = self.client.get(row["image_url"])
        assert answer.status_code == 307, answer.text
        return httpx.get(answer.headers["location"]).raise_for_status().content

    def pixels(self, job_id: str) -> list[Any]:
        """Read a rendered job's pictures."""
        return [pixels(self.stored(row)) for row in self.rows(job_id)]


@pytest.fixture(scope="module")
def studio(
    servers: Servers, databases: Databases, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ParityFarm]:
    folder = tmp_path_factory.mktemp("parity")
    catalog = save_catalog(folder)
    with databases.fresh() as name:
        settings = settings_on(servers, databases.url(name), folder)
        farm = open_farm(settings.model_copy(update={"pipelines": catalog}))
        with serving(farm) as api, ExitStack() as lines:
            studio = ParityFarm(
                farm, api.client(), DiffusersReference(folder, IMAGES, THREADS), lines
            )
            studio.images = {name: upload(studio.client, image) for name, image in IMAGES.items()}
            yield studio
        farm.close()


def upload(client: httpx.Client, image: Image.Image) -> str:
    content = io.BytesIO()
    image.save(content, format="PNG")
    answer = client.post(
        "/v1/images", content=content.getvalue(), headers={"Content-Type": "image/png"}
    )
    assert answer.status_code == 201, answer.text
    image_id: str = answer.json()["id"]
    return image_id


def pixels(picture: bytes | Picture) -> Any:
    opened = Image.open(io.BytesIO(picture)) if isinstance(picture, bytes) else picture
    assert opened is not None
    return np.asarray(opened.convert("RGB"))


def differing(ours: Sequence[Any], theirs: Sequence[Any]) -> dict[int, str]:
    """Report differing pictures by ordinal, with the number of pixels and the difference."""
    found = {}
    for ordinal, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if one.shape != other.shape:
            found[ordinal] = f"{one.shape} is not {other.shape}"
        elif (one != other).any():
            away = np.abs(one.astype(int) - other.astype(int))
            found[ordinal] = f"{(away.max(axis=2) > 0).mean():.1%} of pixels, up to {away.max()}"
    return found


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in VARIANTS)], ids=str
)
def test_pictures_are_those_of_bare_diffusers(studio: ParityFarm, case: Case) -> None:
    expected = [pixels(picture) for picture in studio.bare.pictures(case.pipeline, case.job)]
    ours = studio.pixels(studio.rendered(case))
    assert not differing(ours, expected)
    assert all(picture.std() > 1.0 for picture in ours), "flat pictures prove nothing"


def test_what_a_picture_says_of_threads_is_what_torch_had(studio: ParityFarm) -> None:
    """Otherwise the tests would compare two ways of splitting sums."""
    row = studio.rows(studio.rendered(CASES[0]))[0]
    assert read(studio.stored(row))[1].threads == studio.bare.threads == THREADS


@pytest.mark.parametrize("cases", knob_pairs(), ids=lambda pair: pair[1].name)
def test_every_knob_changes_the_picture(studio: ParityFarm, cases: tuple[Case, Case]) -> None:
    """Otherwise parity could hold only because an argument has no effect."""
    without, turned = (studio.pixels(studio.rendered(case))[0] for case in cases)
    assert without.shape == turned.shape
    assert (without != turned).any()


def _mixture_name(value: str | list[dict[str, Any]]) -> str:
    return value if isinstance(value, str) else str(value[0].get("prompt_syntax", "plain"))


@pytest.mark.parametrize(("pipeline", "jobs"), mixtures(), ids=_mixture_name)
def test_jobs_that_share_a_batch_come_out_as_if_alone(
    studio: ParityFarm, pipeline: str, jobs: list[dict[str, Any]]
) -> None:
    job_ids = [studio.submit(pipeline, job) for job in jobs]
    studio.render(pipeline)
    rows = [studio.rows(job_id)[0] for job_id in job_ids]
    # In separate batches each would have the first slot.
    assert sorted(row["slot"] for row in rows) == list(range(len(jobs)))
    assert len({row["worker"] for row in rows}) == 1
    ours = [pixels(studio.stored(row)) for row in rows]
    frames = [frames_of(job)[0] for job in jobs]
    expected = [pixels(studio.bare.alone(pipeline, frame, len(jobs))) for frame in frames]
    assert not differing(ours, expected)


OF_TABLES: dict[str, Any] = {"steps": 3, "width": 64, "height": 64, "seed": 5}


@pytest.mark.parametrize(("pipeline", "lines"), tables(), ids=_mixture_name)
def test_each_line_of_a_table_comes_out_as_if_alone(
    studio: ParityFarm, pipeline: str, lines: list[dict[str, Any]]
) -> None:
    """Every field varies from line to line, and the job has the values of empty cells."""
    fields = OF_TABLES | ({"control": CONTROL["nets"]} if pipeline == "nets" else {})
    sent = "".join(json.dumps(studio.with_ids(line)) + "\n" for line in lines)
    answer = studio.client.post("/v1/inputs", content=sent.encode())
    assert answer.status_code == 201, answer.text
    job_id = studio.submit_any({**fields, "pipeline": pipeline, "input": answer.json()["id"]})
    studio.render(pipeline)
    rows = studio.rows(job_id)
    files = [studio.stored(row) for row in rows]
    expected: list[Any] = []
    for line in lines:
        given = {**fields, **{name: value for name, value in line.items() if value is not None}}
        frame = Frame(
            given.pop("prompt"),
            given["seed"],
            {name: value for name, value in given.items() if name not in OF_JOB},
        )
        bucket = read(files[len(expected)])[1].frame.bucket
        expected.append(pixels(studio.bare.alone(pipeline, frame, bucket)))
    assert not differing([pixels(file) for file in files], expected)
    assert len({row["slot"] for row in rows}) > 1, "some share a batch"

    def image(image_id: str) -> Image.Image:
        return load_image(studio.farm.artifacts, studio.tenant_id, image_id)

    for file in files[:: len(files) // 4]:
        assert replay(file, studio.farm.catalog, find_image=image).identical


GUARDED = case("flags", "guarded", prompts=["a red star"], images_per_prompt=8)


@pytest.mark.parametrize("case", [GUARDED], ids=str)
def test_what_the_safety_checker_flags_is_dead_and_has_no_picture(
    studio: ParityFarm, case: Case
) -> None:
    expected = studio.bare.pictures("guarded", case.job)
    flagged = [ordinal for ordinal, picture in enumerate(expected) if picture is None]
    assert 2 <= len(flagged) <= 6, "tests/support/checkpoints.py: about half should be flagged"
    job = studio.job(studio.rendered(case))
    assert job["status"] == "partial"
    assert job["counts"]["dead"] == len(flagged)
    for row, picture in zip(studio.rows(job["id"]), expected, strict=True):
        if picture is not None:
            assert not row["flagged"]
            assert (pixels(studio.stored(row)) == pixels(picture)).all(), row["ordinal"]
            continue
        assert (row["state"], row["flagged"], row["image_url"]) == ("dead", True, None)
        assert [attempt["reason"] for attempt in row["attempts"]] == ["flagged"]
        answer = studio.client.get(f"/v1/jobs/{job['id']}/frames/{row['ordinal']}/image")
        assert answer.status_code == 404


UNGUARDED = Case("sd-without-checker", "sd", GUARDED.job)


@pytest.mark.parametrize("case", [UNGUARDED], ids=str)
def test_without_its_safety_checker_the_same_checkpoint_draws_everything(
    studio: ParityFarm, case: Case
) -> None:
    expected = [pixels(picture) for picture in studio.bare.pictures("sd", case.job)]
    assert not differing(studio.pixels(studio.rendered(case)), expected)


def test_diffusers_itself_cannot_negate_several_frames_of_kandinsky(studio: ParityFarm) -> None:
    """This is why such batches are compared with the prior's and the decoder's own calls."""
    job = case("", "kandinsky", 1, negative_prompt="blue").job
    one = frames_of(job)[0]
    combined = studio.bare.alone("kandinsky combined", one, 1)
    apart = studio.bare.alone("kandinsky apart", one, 1)
    assert (pixels(combined) == pixels(apart)).all()
    with pytest.raises(IndexError):
        studio.bare.alone("kandinsky combined", one, 2)
