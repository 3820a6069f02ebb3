"""Lines of an input with parameters: claimed in groups, shown in the order of the file."""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from sqlalchemy.exc import DBAPIError

from farm.context import Farm
from farm.services import jobs as jobs_use_cases
from farm.services.audit import audited
from farm.store import frames, keys, migrate, queries
from farm.store.claim import ClaimedFrame
from farm.store.engine import transaction
from farm.store.frames import FailedAttempt
from farm.store.job_pages import map_of
from farm.store.specs import frame_specs
from tests.integration.test_api_images import file, send
from tests.integration.test_api_inputs import jsonl, refused, submit, upload
from tests.support.api_server import Api, serving
from tests.support.checkpoint_sandbox import CheckpointSandbox
from tests.support.store import FakeWorker, frame_rows, let_leases_expire, register_worker, sql


@pytest.fixture
def api(farm: Farm) -> Iterator[Api]:
    with serving(farm) as running:
        yield running


@pytest.fixture
def ann(api: Api) -> httpx.Client:
    return api.client()


@pytest.fixture
def worker(farm: Farm) -> FakeWorker:
    return register_worker(farm)


def table(count: int, *, seed: int = 1) -> list[dict[str, Any]]:
    """Return lines with three widths and four numbers of steps, or none, shuffled."""
    chance = random.Random(seed)
    return [
        {"prompt": f"star {number}"}
        | ({"steps": chance.choice([10, 20, 30, 40])} if chance.random() < 0.9 else {})
        | ({"width": chance.choice([64, 128, 256])} if chance.random() < 0.8 else {})
        for number in range(count)
    ]


def claim_all(worker: FakeWorker) -> list[list[ClaimedFrame]]:
    batches = []
    while lease := worker.claim():
        batches.append([*lease.frames])
        worker.complete(lease)
    return batches


def sound(farm: Farm) -> None:
    """Check every invariant, the sums of the shares included. Pictures are not stored here."""
    report = audited(farm, sample=0)
    assert [finding for finding in report.findings if finding.invariant != "artifact"] == []


def test_each_frame_has_the_values_of_its_line_and_else_the_jobs(
    farm: Farm, ann: httpx.Client, worker: FakeWorker
) -> None:
    lines = table(60)
    fields = {"seed": 7, "steps": 25, "width": 96, "height": 192, "images_per_prompt": 2}
    job = submit(ann, upload(ann, lines)["id"], **fields)
    assert job.status_code == 202, job.text
    claimed = [frame for batch in claim_all(worker) for frame in batch]
    assert sorted(frame.ordinal for frame in claimed) == [*range(120)]
    for frame in claimed:
        line, params = lines[frame.ordinal // 2], frame.spec.params
        assert frame.spec.prompt == line["prompt"]
        assert params["steps"] == line.get("steps", 25)
        assert (params["width"], params["height"]) == (line.get("width", 96), 192)
    with transaction(farm.store) as connection:
        specs = frame_specs(connection, [(frame.job_id, frame.ordinal) for frame in claimed])
    assert [spec for _, spec in specs] == [frame.spec for frame in claimed]
    assert ann.get(f"/v1/jobs/{job.json()['id']}").json()["status"] == "succeeded"
    sound(farm)


def test_frames_of_equal_settings_share_batches_wherever_they_are(
    ann: httpx.Client, worker: FakeWorker
) -> None:
    lines = [{"prompt": f"star {n}", "steps": 20 + n % 3} for n in range(24)]
    lines += [{"prompt": "as the job says"}] * 4  # 20 steps, as some lines name
    submit(ann, upload(ann, lines)["id"], steps=20, bucket=4)
    batches = claim_all(worker)
    assert [len(batch) for batch in batches] == [4] * 7
    assert all(len({frame.spec.params["steps"] for frame in batch}) == 1 for batch in batches)
    assert [frame.ordinal for frame in batches[0]] == [0, 3, 6, 9]


def test_a_grid_repeats_the_lines_with_each_of_its_points(
    farm: Farm, ann: httpx.Client, worker: FakeWorker
) -> None:
    lines = table(7)
    found = upload(ann, lines)
    job = submit(ann, found["id"], height=64, width=64, grid={"guidance_scale": [3.0, 7.0]}).json()
    assert job["total"] == 14
    for frame in (frame for batch in claim_all(worker) for frame in batch):
        line = lines[frame.ordinal % 7]
        assert frame.spec.prompt == line["prompt"]
        assert frame.spec.params["guidance_scale"] == (3.0, 7.0)[frame.ordinal // 7]
        assert frame.spec.params["width"] == line.get("width", 64)
    sound(farm)


def test_lines_that_all_have_the_same_settings_are_a_job_without_groups(
    farm: Farm, ann: httpx.Client, worker: FakeWorker
) -> None:
    found = upload(ann, [{"prompt": f"star {n}", "steps": 30} for n in range(5)])
    job = submit(ann, found["id"], steps=10).json()
    assert sql(farm, "SELECT stretch FROM jobs WHERE id = :id", id=job["id"]) == [(None,)]
    assert {f.spec.params["steps"] for batch in claim_all(worker) for f in batch} == {30}
    assert job["spec"]["input"] == found["id"]


# Every transition


def test_frames_that_fail_are_requeued_with_their_own_settings(
    farm: Farm, ann: httpx.Client, worker: FakeWorker
) -> None:
    lines = table(40)
    submit(ann, upload(ann, lines)["id"], bucket=4, height=64)
    first = worker.must_claim()
    worker.fail(first)
    second = worker.must_claim()
    sound(farm)
    let_leases_expire(farm)
    sound(farm)
    worker.complete(second)  # too late
    for batch in claim_all(worker):
        shapes = {(f.spec.params["steps"], f.spec.params["width"]) for f in batch}
        assert len(shapes) == 1
        for frame in batch:
            assert frame.spec.params["steps"] == lines[frame.ordinal].get("steps", 25)
    sound(farm)
    assert {row.state for row in frame_rows(farm, first.frames[0].job_id).values()} == {"succeeded"}


def test_paused_resumed_and_cancelled(farm: Farm, ann: httpx.Client, worker: FakeWorker) -> None:
    job = submit(ann, upload(ann, table(50))["id"], bucket=4, height=64).json()
    path = f"/v1/jobs/{job['id']}"
    for _ in range(3):
        worker.complete(worker.must_claim())
    ann.post(f"{path}/pause").raise_for_status()
    assert worker.claim() is None
    sound(farm)
    ann.post(f"{path}/resume").raise_for_status()
    worker.complete(worker.must_claim())
    sound(farm)
    ann.post(f"{path}/cancel").raise_for_status()
    assert worker.claim() is None
    sound(farm)
    shown = ann.get(path).json()["counts"]
    assert shown["succeeded"] + shown["cancelled"] == 50


def test_a_bucket_that_does_not_fit_is_halved_for_all_groups_of_that_shape(
    farm: Farm, ann: httpx.Client, worker: FakeWorker
) -> None:
    lines = [{"prompt": f"star {n}", "steps": 20 + n % 2} for n in range(16)]
    submit(ann, upload(ann, lines)["id"], seed=1)
    lease = worker.must_claim()
    assert {frame.spec.bucket for frame in lease.frames} == {8}
    failures = [
        FailedAttempt(frame.fence, "out_of_memory", "No room.", smaller=True)
        for frame in lease.frames
    ]
    with transaction(farm.store) as connection:
        frames.fail(connection, lease.id, failures, 0.0)
    batches = claim_all(worker)
    buckets = {(f.spec.params["steps"], f.spec.bucket) for batch in batches for f in batch}
    assert buckets == {(20, 4), (21, 8)}
    sound(farm)


# Seen from outside, while groups are claimed


def test_frames_are_listed_in_the_order_of_the_file(
    farm: Farm, ann: httpx.Client, worker: FakeWorker
) -> None:
    lines = [{"prompt": f"star {n}", "steps": 20 + n % 3} for n in range(12)]
    job = submit(ann, upload(ann, lines)["id"], bucket=4).json()
    path = f"/v1/jobs/{job['id']}/frames"
    worker.complete(worker.must_claim())  # 0, 3, 6, 9
    worker.must_claim()  # 1, 4, 7, 10

    def of(state: str, **more: Any) -> list[int]:
        found = ann.get(path, params={"state": state, **more}).json()["data"]
        return [frame["ordinal"] for frame in found]

    assert [frame["ordinal"] for frame in ann.get(path).json()["data"]] == [*range(12)]
    assert (of("succeeded"), of("running")) == ([0, 3, 6, 9], [1, 4, 7, 10])
    assert of("waiting") == [2, 5, 8, 11]
    assert of("waiting", limit=2) == [2, 5]
    assert of("waiting", after=5) == [8, 11]
    ann.post(f"/v1/jobs/{job['id']}/cancel").raise_for_status()
    assert of("cancelled") == [1, 2, 4, 5, 7, 8, 10, 11]


def test_the_map_of_a_job_shows_each_frame(
    farm: Farm, ann: httpx.Client, worker: FakeWorker
) -> None:
    lines = [{"prompt": f"star {n}", "steps": 20 + n % 3} for n in range(12)]
    job = submit(ann, upload(ann, lines)["id"], bucket=4).json()
    worker.complete(worker.must_claim())
    worker.must_claim()
    with transaction(farm.store) as connection:
        tenant = keys.ensure_tenant(connection, "ann")
        row = queries.get_job(connection, tenant, uuid.UUID(job["id"]))
        cells = [cell.state for cell in map_of(connection, row)]
    assert cells == ["succeeded", "running", "waiting"] * 4


def test_what_an_unclaimed_frame_will_be_is_shown(ann: httpx.Client) -> None:
    lines = table(10)
    job = submit(ann, upload(ann, lines)["id"], height=64, seed=3).json()
    for ordinal, line in enumerate(lines):
        frame = ann.get(f"/v1/jobs/{job['id']}/frames/{ordinal}").json()
        assert frame["width"] == line.get("width", 64)
        assert frame["steps"] == line.get("steps", 25)


# Refused


@pytest.mark.parametrize(
    ("line", "fields", "why"),
    [
        (
            {"stepz": 20},
            {},
            "line 2: 'stepz' is not a parameter of pipeline demo. Its",
        ),
        ({"steps": 1001}, {}, "line 2: steps: Input should be less than or equal to 1000."),
        ({"steps": "many"}, {}, "line 2: steps: Input should be a valid integer."),
        ({"sampler": "none"}, {}, "line 2: sampler: "),
        ({"width": 250}, {}, "line 2: width: Input should be a multiple of 8."),
        ({"width": 512}, {"height": 512}, "line 2: width x height is 262144 pixels; the limit of"),
        ({"steps": 20}, {"grid": {"steps": [1, 2]}}, "line 2: steps is a field of the grid too."),
        ({"steps": 20}, {"grid": {"eta": [n / 1000 for n in range(600)]}}, "2 different settings"),
        ({"control": [{"image": "a" * 64}]}, {}, "line 2: 'control' is not a parameter"),
    ],
    ids=str,
)
def test_a_wrong_parameter_is_refused_with_its_first_line(
    api: Api, ann: httpx.Client, line: dict[str, Any], fields: dict[str, Any], why: str
) -> None:
    lines = [{"prompt": "a star"}, {"prompt": "b", **line}, {"prompt": "c", **line}]
    answer = submit(ann, upload(ann, lines)["id"], **fields)
    refused(answer, 422, "invalid_request", "input")
    assert f"input: {why}" in answer.json()["detail"]
    assert api.jobs_stored() == 0


def test_a_wrong_parameter_of_the_job_is_not_said_of_a_line(ann: httpx.Client) -> None:
    found = upload(ann, [{"prompt": "a"}, {"prompt": "b", "steps": 3}])
    refused(submit(ann, found["id"], eta=7), 422, "invalid_request", "eta")
    refused(submit(ann, found["id"], steps=5000), 422, "invalid_request", "steps")
    refused(submit(ann, found["id"], width=100), 422, "invalid_request", "width")


def test_the_spec_of_many_settings_is_stored_about_as_small_as_they_are(
    farm: Farm, ann: httpx.Client, worker: FakeWorker
) -> None:
    lines = [{"prompt": "a", "steps": 1 + n % 50, "eta": n % 4 / 4} for n in range(200)]
    job = submit(ann, upload(ann, lines)["id"], negative_prompt="blurred " * 100).json()
    [(size,)] = sql(farm, "SELECT length(spec::text) FROM jobs WHERE id = :id", id=job["id"])
    assert size < 100 * 60 + 5000
    for frame in (frame for batch in claim_all(worker) for frame in batch):
        line = lines[frame.ordinal]
        assert frame.spec.params["steps"] == line["steps"]
        assert frame.spec.params["eta"] == line["eta"]
        assert frame.spec.params["negative_prompt"] == "blurred " * 100


def test_prompts_are_read_in_the_syntax_of_their_own_line(ann: httpx.Client) -> None:
    wrong: dict[str, Any] = {"prompt": "a (star"}
    compel: dict[str, Any] = {"prompt_syntax": "compel"}
    assert submit(ann, upload(ann, [wrong, {"prompt": "a", **compel}])["id"]).status_code == 202
    answer = submit(ann, upload(ann, [{"prompt": "a"}, {**wrong, **compel}])["id"])
    refused(answer, 422, "invalid_request", "input")
    assert "input: line with index 1: " in answer.json()["detail"]


def test_the_syntax_of_lines_is_judged_once_for_each_setting(
    farm: Farm, ann: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[dict[str, Any]] = [
        {"prompt": "a", "prompt_syntax": "compel", "steps": 2},
        {"prompt": "a (star", "prompt_syntax": "compel"},
        {"prompt": "a (star"},
    ]
    found, looked = upload(ann, lines), list[dict[int, str]]()
    check = jobs_use_cases._syntax_flaws

    def watched(*args: Any) -> dict[int, str]:
        looked.append(check(*args))
        return looked[-1]

    monkeypatch.setattr(jobs_use_cases, "_syntax_flaws", watched)
    for _ in range(2):
        refused(submit(ann, found["id"]), 422, "invalid_request", "input")
        assert len(looked) == 1
    [(settings,)] = sql(farm, "SELECT settings FROM inputs WHERE id = :id", id=found["id"])
    verdicts = [flaw for _, _, flaw in settings]
    assert (verdicts[0], verdicts[2]) == ("", None)
    assert verdicts[1].startswith("input: line with index 1: ")
    upload(ann, lines)  # again, perhaps to a farm that reads the syntax better
    refused(submit(ann, found["id"]), 422, "invalid_request", "input")
    assert len(looked) == 2


def test_before_the_last_step_of_an_upgrade_parameters_are_refused(
    farm: Farm, ann: httpx.Client
) -> None:
    """Processes of an older version may run until then, and leave the parameters out."""
    lines: list[dict[str, Any]] = [{"prompt": "a"}, {"prompt": "b", "steps": 3}]
    before = upload(ann, lines)
    migrate.downgrade(farm.store, "0047")
    for answer in (submit(ann, before["id"]), ann.post("/v1/inputs", content=jsonl(lines[::-1]))):
        refused(answer, 503, "schema_refused", None)
        assert "accepted once the farm's upgrade is complete" in answer.json()["detail"]
    assert submit(ann, upload(ann, [{"prompt": "a"}])["id"]).status_code == 202
    migrate.upgrade(farm.store)
    assert submit(ann, before["id"]).status_code == 202
    with pytest.raises(DBAPIError, match="Jobs with groups are stored"):
        migrate.downgrade(farm.store, "0047")


def test_images_of_lines_must_be_the_tenants_own(
    api: Api, ann: httpx.Client, bench: CheckpointSandbox
) -> None:
    bench.take("stable_diffusion", "controlnet")
    net = bench.entry('source = "stable_diffusion"\ncontrolnets = ["controlnet"]')
    api.app.state.farm.catalog.pipelines["net"] = net
    bob = api.client("bob")
    image = send(bob, file()).json()["id"]
    lines: list[dict[str, Any]] = [
        {"prompt": "a", "control": [{"image": image}]},
        {"prompt": "b"},
    ]
    found = upload(ann, lines)
    fields = {"pipeline": "net", "width": 64, "height": 64}
    answer = submit(ann, found["id"], **fields)
    assert "input: line 2: control: Field required" in answer.json()["detail"]
    found = upload(ann, lines[:1])
    answer = submit(ann, found["id"], **fields)
    refused(answer, 422, "invalid_request", "input")
    assert f"input: line 1: control: image {image} was not found" in answer.json()["detail"]
    assert submit(bob, upload(bob, lines[:1])["id"], **fields).status_code == 202
    send(ann, file()).raise_for_status()
    assert submit(ann, found["id"], **fields).status_code == 202
