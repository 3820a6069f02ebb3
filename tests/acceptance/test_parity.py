"""Every picture of the farm is the one that bare diffusers gives, in every pixel.

One farm of tiny random checkpoints, a worker for each kind of pipeline. Its jobs are submitted
when it starts, so that the workers render while the tests draw the same pictures themselves.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from farm.local import running_farm
from tests.acceptance.conftest import Live
from tests.acceptance.parity_cases import (
    CASES,
    CATALOG,
    CHECKPOINTS,
    IMAGES,
    OF_ALL,
    Case,
)
from tests.bare import Bare, Picture
from tests.checkpoints import save

pytestmark = [
    # diffusers' own samplers hand torch tensors to numpy.array,
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
    # and its combined pipeline of Kandinsky calls the decoder as it should no longer be called.
    pytest.mark.filterwarnings("ignore:`callback_steps`:FutureWarning"),
]

PATIENT = {"FARM_LEASE_SECONDS": "60", "FARM_HEARTBEAT_SECONDS": "5", "FARM_TOUCH_SECONDS": "0.1"}
"""All workers load at the same time: none shall count as lost meanwhile."""
SECONDS = 240.0


@dataclass
class Studio:
    """The farm of this module, beside bare diffusers."""

    live: Live
    storage: httpx.Client
    bare: Bare
    images: dict[str, str]
    """Control images' ids, by the names that cases use"""
    submitted: dict[str, str]
    """Jobs' ids, by the names of their cases"""

    def submit(self, pipeline: str, job: dict[str, Any]) -> str:
        body = {"pipeline": pipeline, **self._with_ids(job)}
        job_id: str = self.live.submit(**body)["id"]
        return job_id

    def _with_ids(self, job: dict[str, Any]) -> dict[str, Any]:
        def named(nets: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return [{**net, "image": self.images[net["image"]]} for net in nets]

        job = dict(job)
        if "control" in job:
            job["control"] = named(job["control"])
        grid = job.get("grid", {})
        if "control" in grid:
            job["grid"] = {**grid, "control": [named(nets) for nets in grid["control"]]}
        return job

    def job_of(self, case: Case) -> str:
        """The case's job, submitted when the farm started."""
        if case.name not in self.submitted:
            self.submitted[case.name] = self.submit(case.pipeline, case.job)
        return self.submitted[case.name]

    def rows(self, job_id: str) -> list[dict[str, Any]]:
        """Wait for a job's end; gives its frames."""
        self.live.ended(job_id, SECONDS)
        return self.live.frames(job_id)

    def stored(self, row: dict[str, Any]) -> bytes:
        """A frame's file, from the storage."""
        assert row["state"] == "succeeded", row
        answer = self.live.client.get(row["image_url"], follow_redirects=False)
        assert answer.status_code == 307, answer.text
        found = self.storage.get(answer.headers["location"])
        found.raise_for_status()
        return found.content

    def pixels(self, job_id: str) -> list[Any]:
        """A job's pictures, when it is over."""
        return [pixels(self.stored(row)) for row in self.rows(job_id)]


@pytest.fixture(scope="module")
def studio(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Studio]:
    if "PARITY_DEV" in os.environ:  # DEV
        folder = Path(os.environ["PARITY_DEV"])  # DEV
        info = json.loads((folder / "info.json").read_text())  # DEV
        with httpx.Client(  # DEV
            base_url=info["url"],
            headers={"Authorization": f"Bearer {info['key']}"},
            timeout=60,  # DEV
        ) as client:  # DEV
            found = Studio(Live(None, client), httpx.Client(), Bare(folder, IMAGES, 1), {}, {})  # DEV
            found.images = {name: upload(client, image) for name, image in IMAGES.items()}  # DEV
            _submit_all(found, request)  # DEV
            yield found  # DEV
        return  # DEV
    folder = tmp_path_factory.mktemp("parity")
    for kind in CHECKPOINTS:
        save(kind, folder / kind)
    catalog = folder / "pipelines.toml"
    catalog.write_text(CATALOG.replace("\nsource", f"\n{OF_ALL}source"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in PATIENT.items():
            patch.setenv(name, value)
        with running_farm(folder / "farm", pipelines=catalog) as farm:
            key = {"Authorization": f"Bearer {farm.api_key}"}
            with (
                httpx.Client(base_url=farm.url, headers=key, timeout=60) as client,
                httpx.Client() as storage,
            ):
                threads = int(farm.children["worker sd-1"].program.env["FARM_TORCH_THREADS"])
                bare = Bare(folder, IMAGES, threads)
                found = Studio(Live(farm, client), storage, bare, {}, {})
                found.images = {name: upload(client, image) for name, image in IMAGES.items()}
                _submit_all(found, request)
                yield found


def _submit_all(studio: Studio, request: pytest.FixtureRequest) -> None:
    for item in request.session.items:
        call = getattr(item, "callspec", None)
        if call is not None and isinstance(case := call.params.get("case"), Case):
            studio.job_of(case)


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
    """Where pictures differ: by ordinal, in how many pixels and how much."""
    found = {}
    for ordinal, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if one.shape != other.shape:
            found[ordinal] = f"{one.shape} is not {other.shape}"
        elif (one != other).any():
            away = np.abs(one.astype(int) - other.astype(int))
            found[ordinal] = f"{(away.max(axis=2) > 0).mean():.1%} of pixels, up to {away.max()}"
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pictures_are_those_of_bare_diffusers(studio: Studio, case: Case) -> None:
    expected = [pixels(picture) for picture in studio.bare.pictures(case.pipeline, case.job)]
    ours = studio.pixels(studio.job_of(case))
    assert not differing(ours, expected)
    assert all(picture.std() > 1.0 for picture in ours), "flat pictures prove nothing"
