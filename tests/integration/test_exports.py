"""Exports: datasets that public readers open, and nothing of a job is silently missing."""

from __future__ import annotations

import hashlib
import json
import tarfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import mlcroissant
import pandas
import pyarrow.parquet as pq
import pytest
import webdataset
from datasets import load_dataset
from PIL import Image

from farm.artifacts import Artifacts, artifact_key
from farm.config import Settings
from farm.context import Farm
from farm.errors import Unavailable
from farm.exports import ShardWriter
from farm.store import exports as stored
from farm.store.engine import one_statement
from tests.commanding import Outcome
from tests.commanding import farm as command
from tests.farming import hire, sql
from tests.integration.test_api_refusals import check_problem
from tests.serving import Api, render, serving
from tests.waiting import wait_until
from workers.chores import Chores
from workers.janitor import Janitor
from workers.storage import StorageWork

LINES: list[dict[str, Any]] = [
    {"prompt": f"a star, number {number} ✨", "key": f"k{number}", "labels": {"n": str(number)}}
    for number in range(10)
]


@pytest.fixture
def settings(settings: Settings, tmp_path: Path) -> Settings:
    bucket = f"exports-{uuid.uuid4().hex}"
    return settings.model_copy(update={"s3_bucket": bucket, "export_buckets": f"to-{bucket}"})


@pytest.fixture
def api(farm: Farm) -> Iterator[Api]:
    for bucket in (farm.settings.s3_bucket, farm.settings.export_buckets):
        farm.artifacts._s3.create_bucket(Bucket=bucket)
    with serving(farm) as running:
        yield running


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def submit(client: httpx.Client, **fields: Any) -> str:
    content = b"".join(json.dumps(line).encode() + b"\n" for line in LINES)
    source = client.post("/v1/inputs", content=content).json()["id"]
    body = {"pipeline": "demo", "input": source, "steps": 2, "bucket": 4, **fields}
    response = client.post("/v1/jobs", json=body)
    assert response.status_code == 202, response.text
    return str(response.json()["id"])


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def rendered(farm: Farm, *, dead: int | None = None) -> None:
    """Render all that waits; one frame may end without a picture."""
    hand = hire(farm)
    while lease := hand.claim():
        lost = [frame for frame in lease.frames if frame.ordinal == dead]
        if lost:
            fences = [frame.fence for frame in lost]
            hand.fail(lease, retryable=False, fences=fences)
        render(hand, lease, *[frame.ordinal for frame in lease.frames if frame.ordinal != dead])


def export(client: httpx.Client, job_id: str, **fields: Any) -> dict[str, Any]:
    response = client.post(f"/v1/jobs/{job_id}/exports", json={"shard_frames": 4, **fields})
    assert response.status_code == 202, response.text
    found: dict[str, Any] = response.json()
    return found


def written(farm: Farm, client: httpx.Client, found: dict[str, Any]) -> dict[str, Any]:
    Chores(farm, "chores").answer()
    now: dict[str, Any] = client.get(f"/v1/exports/{found['id']}").json()
    return now


def fetched(client: httpx.Client, found: dict[str, Any], folder: Path) -> Path:
    """Download every file that the shards list, and check it."""
    for shard in client.get(f"/v1/exports/{found['id']}/shards?limit=200").json()["data"]:
        for file in shard["files"]:
            answer = client.get(file["url"])
            content = httpx.get(answer.headers["Location"]).content
            assert hashlib.sha256(content).hexdigest() == file["sha256"]
            assert len(content) == file["bytes"]
            path = folder / file["name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return folder


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # its reader's files
def test_webdataset_opens_in_public_readers(farm: Farm, api: Api, tmp_path: Path) -> None:
    ann = api.client()
    job_id = submit(ann)
    rendered(farm, dead=6)
    found = written(farm, ann, export(ann, job_id, to="webdataset"))
    assert (found["status"], found["shards"], found["shards_done"]) == ("succeeded", 3, 3)
    assert (found["pictures"], found["missing"]) == (9, 1)
    folder = fetched(ann, found, tmp_path / "set")
    tars = sorted(folder.glob("data/*.tar"))
    assert [path.name for path in tars] == ["00000.tar", "00001.tar", "00002.tar"]

    samples = [
        sample
        for path in tars
        for sample in webdataset.WebDataset(str(path), shardshuffle=False).decode("pil")
    ]
    assert [sample["__key__"] for sample in samples] == [
        f"{number:09d}" for number in range(10) if number != 6
    ]
    for sample in samples:
        line = LINES[int(sample["__key__"])]
        assert sample["txt"] == line["prompt"]
        assert sample["json"]["key"] == line["key"]
        assert json.loads(sample["json"]["labels"]) == line["labels"]
        assert sample["png"].size == (64, 64)

    data = load_dataset(
        "webdataset", data_files={"train": [*map(str, tars)]}, split="train", cache_dir=tmp_path
    )
    assert len(data) == 9
    assert isinstance(data[0]["png"], Image.Image)
    assert data[0]["json"]["prompt"] == LINES[0]["prompt"]

    table = pandas.concat(
        pandas.read_parquet(path) for path in sorted(folder.glob("data/*.parquet"))
    )
    assert list(table["key"]) == [line["key"] for line in LINES]
    assert list(table["status"]) == ["success"] * 6 + ["dead"] + ["success"] * 3
    assert table["error_message"].iloc[6] == "It broke."
    missing = json_lines(folder / "missing.jsonl")
    assert [(row["key"], row["error_message"]) for row in missing] == [("k6", "It broke.")]


def test_parquet_has_an_image_column(farm: Farm, api: Api, tmp_path: Path) -> None:
    ann = api.client()
    job_id = submit(ann, images_per_prompt=2)
    rendered(farm)
    found = written(farm, ann, export(ann, job_id, to="parquet", shard_frames=8))
    folder = fetched(ann, found, tmp_path / "set")
    files = sorted(map(str, folder.glob("data/*.parquet")))
    assert len(files) == 3
    data = load_dataset("parquet", data_files={"train": files}, split="train", cache_dir=tmp_path)
    assert type(data.features["image"]).__name__ == "Image"
    assert len(data) == 20
    assert isinstance(data[0]["image"], Image.Image)
    table = pq.read_table(files[0])
    assert table.column("image")[0].as_py()["path"] == "000000000.png"
    assert list(pandas.read_parquet(files[0])["ordinal"]) == [*range(8)]


def test_an_image_folder_has_its_metadata(
    farm: Farm, api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann = api.client()
    job_id = submit(ann)
    rendered(farm)
    monkeypatch.setenv("FARM_API_URL", api.url)
    monkeypatch.setenv("FARM_API_KEY", api.key())
    dest = tmp_path / "set"
    words = ["export", job_id, "--to", "imagefolder", "--dest", str(dest), "--shard-frames", "4"]
    outcomes: list[Outcome] = []
    thread = threading.Thread(target=lambda: outcomes.append(command(*words, "--json")))
    thread.start()
    wait_until(lambda: ann.get("/v1/exports").json()["data"] != [], 30, "it was asked for")
    Chores(farm, "chores").answer()
    thread.join()
    [done] = outcomes
    assert done.code == 0, done.err
    assert done.json["pictures"] == 10
    data = load_dataset("imagefolder", data_dir=str(dest / "data"), split="train")
    assert len(data) == 10
    assert sorted(data["prompt"]) == sorted(line["prompt"] for line in LINES)
    victim = next(dest.glob("data/00001/*.png"))
    whole = victim.read_bytes()
    victim.write_bytes(b"broken")
    assert command(*words).code == 0
    assert victim.read_bytes() == whole


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # its reader's own, as the next
@pytest.mark.filterwarnings("ignore:ConjunctiveGraph is deprecated:DeprecationWarning")
def test_the_cover_tells_all_and_is_valid(farm: Farm, api: Api, tmp_path: Path) -> None:
    ann = api.client()
    job_id = submit(ann)
    rendered(farm)
    for kind in ("webdataset", "parquet", "imagefolder"):
        found = written(farm, ann, export(ann, job_id, to=kind))
        folder = fetched(ann, found, tmp_path / kind)
        dataset = mlcroissant.Dataset(folder / "croissant.json")
        assert dataset.metadata.ctx.issues.errors == set()
        manifest = json.loads((folder / "manifest.json").read_bytes())
        assert [shard["number"] for shard in manifest["shards"]] == [0, 1, 2]
        for file in [file for shard in manifest["shards"] for file in shard["files"]]:
            assert (
                hashlib.sha256((folder / file["name"]).read_bytes()).hexdigest() == file["sha256"]
            )
        assert "10 pictures in 3 shards" in (folder / "README.md").read_text()
    records = mlcroissant.Dataset(tmp_path / "parquet/croissant.json").records("pictures")
    assert [record["pictures/prompt"].decode() for record in records] == [
        line["prompt"] for line in LINES
    ]
    assert len(load_dataset(str(tmp_path / "parquet"), split="train")) == 10


def test_whole_shards_come_while_the_job_renders(farm: Farm, api: Api) -> None:
    ann, hand = api.client(), hire(farm)
    job_id = submit(ann)
    lease = hand.must_claim()
    found = export(ann, job_id, to="webdataset")
    assert written(farm, ann, found)["shards_done"] == 0
    render(hand, lease)
    look_again = "UPDATE export_shards SET due_at = clock_timestamp() WHERE done_at IS NULL"
    sql(farm, look_again)
    assert written(farm, ann, found)["shards_done"] == 1
    hand.release(hand.must_claim())  # returned: not come to its end
    sql(farm, look_again)
    assert written(farm, ann, found)["shards_done"] == 1
    assert sql(farm, "SELECT sum(attempt) FROM export_shards") == [(1,)]  # nor was it tried
    rendered(farm)
    sql(farm, look_again)
    assert written(farm, ann, found)["shards_done"] == 3
    sql(farm, look_again)
    assert written(farm, ann, found)["status"] == "succeeded"


def test_what_is_retried_after_its_shard_stays_missing(
    farm: Farm, api: Api, tmp_path: Path
) -> None:
    ann = api.client()
    job_id = submit(ann)
    rendered(farm, dead=2)
    found = export(ann, job_id, to="parquet")
    with one_statement(farm.store) as connection:
        shard = stored.claim_shard(connection, "first", 60.0)
    assert shard is not None
    files, pictures, missing = ShardWriter(farm).write(shard)
    with one_statement(farm.store) as connection:
        assert stored.finish(connection, shard, files, rows=pictures, missing=missing)
    ann.post(f"/v1/jobs/{job_id}/retry")
    rendered(farm)
    found = written(farm, ann, found)
    assert (found["status"], found["pictures"], found["missing"]) == ("succeeded", 9, 1)
    folder = fetched(ann, found, tmp_path)
    assert [row["key"] for row in json_lines(folder / "missing.jsonl")] == ["k2"]


def test_a_cancelled_job_lists_what_it_never_rendered(farm: Farm, api: Api, tmp_path: Path) -> None:
    ann, hand = api.client(), hire(farm)
    job_id = submit(ann)
    render(hand, hand.must_claim())
    ann.post(f"/v1/jobs/{job_id}/cancel")
    found = written(farm, ann, export(ann, job_id, to="webdataset"))
    assert (found["pictures"], found["missing"]) == (4, 6)
    folder = fetched(ann, found, tmp_path)
    missing = json_lines(folder / "missing.jsonl")
    assert [row["key"] for row in missing] == [f"k{number}" for number in range(4, 10)]
    assert {row["status"] for row in missing} == {"cancelled"}


def test_a_shard_whose_writer_died_is_written_by_another_and_no_other_again(
    farm: Farm, api: Api
) -> None:
    ann = api.client()
    job_id = submit(ann)
    rendered(farm)
    found = export(ann, job_id, to="webdataset")
    with one_statement(farm.store) as connection:
        first = stored.claim_shard(connection, "dies", 60.0)
    assert first is not None
    assert written(farm, ann, found)["shards_done"] == 2
    look_again = "UPDATE export_shards SET due_at = clock_timestamp() WHERE done_at IS NULL"
    sql(farm, look_again)
    with one_statement(farm.store) as connection:
        second = stored.claim_shard(connection, "goes on", 60.0)
        assert second is not None
        assert (second.number, second.attempt) == (first.number, 2)
        # What was lost is not renewed, finished nor failed by whoever lost it.
        assert not stored.renew(connection, first, 0.0)
        assert not stored.finish(connection, first, [], rows=9, missing=0)
        for _ in range(stored.MOST_FAILURES):
            stored.fail(connection, first, "late", counts=True)
        stored.give_back(connection, second)
    assert ann.get(f"/v1/exports/{found['id']}").json()["status"] == "running"
    assert written(farm, ann, found)["status"] == "succeeded"
    attempts = sql(farm, "SELECT attempt FROM export_shards ORDER BY number")
    assert attempts == [(3,), (1,), (1,), (1,)]
    with one_statement(farm.store) as connection:
        assert not stored.finish(connection, first, [], rows=9, missing=0)
    assert written(farm, ann, found)["pictures"] == 10


def test_an_export_waits_for_the_storage_and_fails_where_a_picture_is_gone(
    farm: Farm, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann = api.client()
    job_id = submit(ann)
    rendered(farm)
    found = export(ann, job_id, to="webdataset")

    def away(*_: Any) -> None:
        raise Unavailable("The storage is away.")

    with monkeypatch.context() as patched:
        patched.setattr(Artifacts, "put_file", away)
        for _ in range(stored.MOST_FAILURES + 1):
            sql(farm, "UPDATE export_shards SET due_at = clock_timestamp()")
            assert written(farm, ann, found)["status"] == "running"
    tenant, sha256 = sql(
        farm,
        "SELECT j.tenant_id, f.sha256 FROM frames f JOIN jobs j ON j.id = f.job_id "
        "WHERE f.ordinal = 0",
    )[0]
    farm.artifacts.delete(artifact_key(tenant, uuid.UUID(job_id), 0, sha256))
    for _ in range(stored.MOST_FAILURES):
        sql(farm, "UPDATE export_shards SET due_at = clock_timestamp()")
        failed = written(farm, ann, found)
    assert failed["status"] == "failed"
    assert "The image storage holds no " in failed["error"]


def test_several_jobs_go_into_one_dataset(farm: Farm, api: Api, tmp_path: Path) -> None:
    ann = api.client()
    jobs = [submit(ann, labels={"set": "both"}, seed=seed) for seed in (1, 2)]
    rendered(farm)
    by_label = ann.post("/v1/exports", json={"to": "webdataset", "labels": {"set": "both"}}).json()
    assert by_label["jobs"] == jobs
    folder = fetched(ann, written(farm, ann, by_label), tmp_path)
    with tarfile.open(folder / "data/00001.tar") as tar:
        assert tar.getnames()[0] == "000000010.png"


def test_another_bucket_is_written_to_where_it_is_allowed(farm: Farm, api: Api) -> None:
    ann = api.client()
    job_id = submit(ann)
    rendered(farm)
    bucket = farm.settings.export_buckets
    found = written(farm, ann, export(ann, job_id, to="parquet", dest=f"s3://{bucket}/a/b"))
    listed = farm.artifacts._s3.list_objects_v2(Bucket=bucket, Prefix="a/b/")["Contents"]
    assert found["dest"] == f"s3://{bucket}/a/b/"
    assert len(listed) == 3 + 4
    for taken in ("a/b", "a", "a/b/c", ""):
        asked = {"to": "parquet", "dest": f"s3://{bucket}/{taken}"}
        check_problem(ann.post(f"/v1/jobs/{job_id}/exports", json=asked), 422)
    for dest in ("s3://elsewhere/a", f"s3://{farm.settings.s3_bucket}/a", "nonsense", "s3://"):
        asked = {"to": "parquet", "dest": dest}
        check_problem(ann.post(f"/v1/jobs/{job_id}/exports", json=asked), 422)


def test_a_writer_cut_off_from_postgres_gives_up_when_its_lease_is_over(
    farm: Farm, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another may write the shard by then, and its files must not be written over."""
    client = api.client()
    export(client, submit(client), to="webdataset")
    rendered(farm)
    farm.settings.lease_seconds = 0.4
    chores = Chores(farm, "cut off")
    shard = chores._claim()
    assert shard is not None

    def away(*_: object) -> bool:
        raise Unavailable("Postgres is away.")

    with chores._held(shard) as lost:
        assert not lost.wait(1.0)
        monkeypatch.setattr(stored, "renew", away)
        assert lost.wait(10.0)


def stored_keys(farm: Farm, prefix: str, bucket: str | None = None) -> list[str]:
    bucket = bucket or farm.settings.s3_bucket
    found = farm.artifacts._s3.list_objects_v2(Bucket=bucket, Prefix=prefix)
    return [each["Key"] for each in found.get("Contents", [])]


def test_a_deleted_export_goes_with_its_files(farm: Farm, api: Api) -> None:
    client, work = api.client(), StorageWork(farm, threading.Event())
    work.lead(True)
    job_id = submit(client)
    rendered(farm)
    own = written(farm, client, export(client, job_id, to="webdataset"))
    there = farm.settings.export_buckets
    other = written(farm, client, export(client, job_id, to="parquet", dest=f"s3://{there}/set"))
    assert stored_keys(farm, "exports/")
    refused = api.client("bob").delete(f"/v1/exports/{own['id']}")
    check_problem(refused, 404)
    for each in (own, other):
        assert client.delete(f"/v1/exports/{each['id']}").status_code == 204
        check_problem(client.get(f"/v1/exports/{each['id']}"), 404)
        check_problem(client.delete(f"/v1/exports/{each['id']}"), 404)
    assert client.get("/v1/exports").json()["data"] == []
    problem = check_problem(client.get(f"/v1/exports?after={own['id']}"), 422)
    assert problem["error"]["param"] == "after"
    work.step()
    assert stored_keys(farm, "exports/") == []
    assert stored_keys(farm, "set/", there), "what went elsewhere is not the farm's to delete"
    assert stored_keys(farm, ""), "the pictures stay"
    assert sql(farm, "SELECT count(*) FROM exports") == [(0,)]
    assert sql(farm, "SELECT count(*) FROM export_shards") == [(0,)]


@pytest.mark.parametrize("where", ["", "/exports", "/{tenant}/{job}"])
def test_deleting_an_export_takes_nothing_that_a_client_placed(
    farm: Farm, api: Api, where: str
) -> None:
    """Where the farm's own bucket is allowed, a place may be a prefix of every picture."""
    client, work = api.client(), StorageWork(farm, threading.Event())
    work.lead(True)
    job_id = submit(client)
    rendered(farm)
    farm.settings.export_buckets = farm.settings.s3_bucket
    [row] = sql(farm, "SELECT tenant_id FROM jobs")
    dest = f"s3://{farm.settings.s3_bucket}" + where.format(tenant=row.tenant_id, job=job_id)
    found = written(farm, client, export(client, job_id, to="parquet", dest=dest))
    before = stored_keys(farm, "")
    assert client.delete(f"/v1/exports/{found['id']}").status_code == 204
    work.step()
    assert sql(farm, "SELECT count(*) FROM exports") == [(0,)]
    assert stored_keys(farm, "") == before


def test_an_export_that_is_deleted_while_it_is_written(farm: Farm, api: Api) -> None:
    client, work = api.client(), StorageWork(farm, threading.Event())
    work.lead(True)
    job_id = submit(client)
    rendered(farm)
    found = export(client, job_id, to="webdataset")
    with one_statement(farm.store) as connection:
        shard = stored.claim_shard(connection, "w", 60.0)
        assert shard is not None
        assert stored.renew(connection, shard, 60.0)
        assert client.delete(f"/v1/exports/{found['id']}").status_code == 204
        assert not stored.renew(connection, shard, 60.0)
        assert stored.claim_shard(connection, "w", 60.0) is None
        assert not stored.any_due(connection)
    work.step()
    assert sql(farm, "SELECT count(*) FROM exports") == [(1,)], "its writer may still be at it"
    sql(farm, "UPDATE export_shards SET due_at = clock_timestamp()")
    work.step()
    assert sql(farm, "SELECT count(*) FROM exports") == [(0,)]


def test_what_was_kept_long_enough_goes(farm: Farm, api: Api) -> None:
    client = api.client()
    job_id = submit(client)
    rendered(farm)
    found = written(farm, client, export(client, job_id, to="webdataset"))
    farm.settings.retention_days = 10.0
    tables = ("jobs", "exports", "inputs")

    def left() -> list[int]:
        with farm.store.connect() as connection:
            Janitor(farm).sweep(connection)
        work.step()
        return [sql(farm, f"SELECT count(*) FROM {table}")[0][0] for table in tables]

    work = StorageWork(farm, threading.Event())
    work.lead(True)
    sql(farm, "UPDATE inputs SET created_at = created_at - interval '11 days'")
    assert left() == [1, 1, 1], "a job draws it"
    sql(farm, "UPDATE exports SET finished_at = finished_at - interval '11 days'")
    assert left() == [1, 0, 1]
    assert stored_keys(farm, "exports/") == []
    check_problem(client.get(f"/v1/exports/{found['id']}"), 404)
    sql(farm, "UPDATE jobs SET finished_at = finished_at - interval '11 days'")
    left()
    assert left() == [0, 0, 0]


def test_an_export_is_its_tenants_and_gives_only_its_own_files(farm: Farm, api: Api) -> None:
    ann, bob = api.client(), api.client("bob")
    job_id = submit(ann)
    rendered(farm)
    found = written(farm, ann, export(ann, job_id, to="webdataset"))
    at = f"/v1/exports/{found['id']}"
    for path in (at, f"{at}/shards", f"{at}/files/manifest.json"):
        check_problem(bob.get(path), 404)
    check_problem(bob.post(f"/v1/jobs/{job_id}/exports", json={"to": "parquet"}), 404)
    check_problem(bob.post("/v1/exports", json={"to": "parquet", "jobs": [job_id]}), 422)
    for name in ("nothing.json", "data/../../x", "data/00000/000000001.png", "%00"):
        check_problem(ann.get(f"{at}/files/{name}"), 404)
    assert ann.get(f"{at}/files/manifest.json").status_code == 307
    assert [each["id"] for each in ann.get("/v1/exports").json()["data"]] == [found["id"]]
    assert bob.get("/v1/exports").json() == {"data": [], "next": None}


@pytest.mark.parametrize(
    "wrong",
    [{}, {"to": "zip"}, {"to": "parquet", "shard_frames": 0}, {"to": "parquet", "more": 1}],
)
def test_a_wrong_export_is_refused(api: Api, wrong: dict[str, Any]) -> None:
    ann = api.client()
    job_id = submit(ann)
    check_problem(ann.post(f"/v1/jobs/{job_id}/exports", json=wrong), 422)
    both = {"to": "parquet", "jobs": [job_id], "labels": {"a": "b"}}
    nul = {"to": "parquet", "labels": {"a": "\x00"}}
    for asked in (both, {"to": "parquet"}, {"to": "parquet", "labels": {"no": "job"}}, nul):
        check_problem(ann.post("/v1/exports", json=asked), 422)
    assert sql(api.farm, "SELECT count(*) FROM exports") == [(0,)]
