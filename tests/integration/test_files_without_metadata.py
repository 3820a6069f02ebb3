"""Jobs whose image files hold no metadata: the provenance stays with the frame."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from PIL import Image

from farm.context import Farm
from farm.errors import InvalidRequest
from farm.imaging.encoding import read, read_provenance
from farm.rendering.replay import replay
from farm.store import keys, provenances, retention
from farm.store.engine import one_statement, transaction
from tests.integration.test_api_refusals import check_problem
from tests.support.api_server import Api, serving
from tests.support.render_loops import assembly_of
from tests.support.store import let_leases_expire, register_worker, sql
from workers.render.assembly import Assembly

STAR = "a red star on a blue background"
BODY: dict[str, Any] = {
    "pipeline": "demo",
    "prompts": [STAR],
    "seed": 4711,
    "steps": 3,
    "width": 32,
    "height": 32,
    "metadata": "none",
}
PLAIN = {**BODY, "metadata": "full"}
WORDS = (b"red star", b"4711", b"demo", b"farm", b"torch", b"Steps")
"""Words of the metadata that files have otherwise."""
TEXTS = {"farm", "parameters", "exif", "xmp", "XML:com.adobe.xmp"}


@pytest.fixture
def api(farm: Farm) -> Iterator[Api]:
    with serving(farm) as running:
        yield running


@pytest.fixture
def ann(api: Api) -> httpx.Client:
    return api.client("ann")


@pytest.fixture
def demo(farm: Farm) -> Iterator[Assembly]:
    made = assembly_of(farm, "demo")
    yield made
    made.loop.close()


def rendered(
    demo: Assembly, client: httpx.Client, body: dict[str, Any]
) -> list[tuple[dict[str, Any], bytes]]:
    """Render a job. Return its frames, each with its file."""
    answer = client.post("/v1/jobs", json=body)
    assert answer.status_code == 202, answer.text
    demo.loop.run()
    found = client.get(f"/v1/jobs/{answer.json()['id']}/frames").json()["data"]
    return [
        (frame, httpx.get(client.get(frame["image_url"]).headers["location"]).content)
        for frame in found
    ]


def pixels(content: bytes) -> bytes:
    return Image.open(io.BytesIO(content)).convert("RGB").tobytes()


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_the_file_holds_nothing_and_the_frame_all(
    farm: Farm, demo: Assembly, ann: httpx.Client, form: str
) -> None:
    [(bare, content)] = rendered(demo, ann, {**BODY, "format": form})
    [(full, other)] = rendered(demo, ann, {**PLAIN, "format": form})
    assert [word for word in WORDS if word in content] == []
    assert all(word in other for word in WORDS[:3])
    with Image.open(io.BytesIO(content)) as image:
        assert (
            image.info.keys() & {"farm", "parameters", "exif", "xmp", "XML:com.adobe.xmp"} == set()
        )
    assert pixels(content) == pixels(other), "nothing else differs"
    assert len(content) < len(other)
    assert full["provenance"] is None, "its file holds it"
    recorded = read_provenance(json.dumps(bare["provenance"]))
    expected = read(other)[1]
    assert recorded.frame.metadata == "none"
    assert (
        recorded.model_copy(
            update={"frame": recorded.frame.model_copy(update={"metadata": "full"})}
        )
        == expected
    )
    with pytest.raises(InvalidRequest, match="farm replay JOB ORDINAL"):
        read(content)
    done = replay(content, farm.catalog, provenance=recorded)
    assert done.identical, done.difference


def test_files_with_metadata_are_as_before(demo: Assembly, ann: httpx.Client) -> None:
    without_field = {name: value for name, value in BODY.items() if name != "metadata"}
    [(one, content)] = rendered(demo, ann, PLAIN)
    [(other, same)] = rendered(demo, ann, without_field)
    assert one["sha256"] == other["sha256"]
    assert content == same
    assert b'"metadata"' not in content, "the text of files has not changed"


def test_a_key_has_a_default(farm: Farm, api: Api, demo: Assembly) -> None:
    with transaction(farm.store) as connection:
        key = keys.create_key(connection, "ann", "client", metadata="none")[1]
    ann = api.bare(Authorization=f"Bearer {key}")
    unsaid = {name: value for name, value in BODY.items() if name != "metadata"}
    batch = ann.post("/v1/jobs/batch", json={"jobs": [unsaid, PLAIN]}).json()["data"]
    assert [each["job"]["spec"]["metadata"] for each in batch] == ["none", "full"]
    [(frame, content)] = rendered(demo, ann, unsaid)
    assert frame["provenance"] is not None
    assert b"red star" not in content
    call = {"model": "demo", "prompt": STAR, "size": "32x32", "steps": 2, "response_format": "url"}
    api.app.state.farm.settings.openai_seconds = 0.1
    assert ann.post("/openai/v1/images/generations", json=call).status_code == 504
    assert ann.get("/v1/jobs").json()["data"][0]["spec"]["metadata"] == "none"
    assert api.client("ann").post("/v1/jobs", json=unsaid).json()["spec"]["metadata"] == "full"


@pytest.mark.parametrize("value", ["some", 7, True, {}])
def test_another_value_is_refused(api: Api, ann: httpx.Client, value: Any) -> None:
    problem = check_problem(ann.post("/v1/jobs", json={**BODY, "metadata": value}), 422)
    assert problem["error"]["param"] == "metadata"
    assert api.jobs_stored() == 0


def test_reuse_never_mixes_the_two(demo: Assembly, ann: httpx.Client) -> None:
    [(first, _)] = rendered(demo, ann, {**PLAIN, "reuse": True})
    [(bare, content)] = rendered(demo, ann, {**BODY, "reuse": True})
    [(again, copied)] = rendered(demo, ann, {**BODY, "reuse": True})
    assert [each["reused"] for each in (first, bare, again)] == [False, False, True]
    assert copied == content
    assert b"red star" not in copied
    assert again["provenance"] == bare["provenance"], "a copy has it too"


def test_another_tenant_sees_nothing(api: Api, demo: Assembly, ann: httpx.Client) -> None:
    [(frame, _)] = rendered(demo, ann, BODY)
    path = frame["image_url"].removesuffix("/image")
    assert ann.get(path).json()["provenance"] is not None
    assert api.client("bob").get(path).status_code == 404


def test_the_attempt_that_succeeded_counts(farm: Farm, api: Api, ann: httpx.Client) -> None:
    """A worker that lost its lease may store the provenance of its attempt later."""
    api.submit(ann, **BODY)
    worker = register_worker(farm)
    first = worker.must_claim().frames[0]
    let_leases_expire(farm)
    lease = worker.must_claim()
    second = lease.frames[0]
    with one_statement(farm.store) as connection:
        provenances.keep(connection, {second.fence: '{"second": 2}'})
        provenances.keep(connection, {first.fence: '{"first": 1}'})
    worker.complete(lease)
    frame = ann.get(f"/v1/jobs/{second.job_id}/frames/0").json()
    assert (frame["attempt"], frame["provenance"]) == (2, {"second": 2})


def test_it_is_removed_with_the_job(farm: Farm, demo: Assembly, ann: httpx.Client) -> None:
    rendered(demo, ann, BODY)
    sql(farm, "UPDATE jobs SET finished_at = finished_at - interval '10 days'")
    with transaction(farm.store) as connection:
        assert retention.remove_due(connection, 1.0)
    with transaction(farm.store) as connection:
        retention.delete_rows(connection, 100)
    assert sql(farm, "SELECT count(*) FROM frame_provenances") == [(0,)]
