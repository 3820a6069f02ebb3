"""Exported datasets open in public readers, complete and with valid descriptions."""

from __future__ import annotations

import hashlib
import json
import tarfile
import threading
from pathlib import Path

import httpx
import pyarrow.parquet as pq
import pytest
from PIL import Image

from farm.context import Farm
from tests.integration.exports.scenes import (
    LINES,
    download,
    json_lines,
    render_all,
    submit,
    write_shards,
    written_export,
)
from tests.support.api_server import Api
from tests.support.cli_runner import Outcome
from tests.support.cli_runner import farm as command
from tests.support.waiting import wait_until
from workers.exporter import Exporter

pytestmark = pytest.mark.usefixtures("own_cache")

# WebDataset


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # its files
def test_webdataset_opens_in_public_readers(farm: Farm, ann: httpx.Client, tmp_path: Path) -> None:
    job_id = submit(ann)
    render_all(farm, dead=6)
    found = written_export(farm, ann, job_id, to="webdataset")
    assert (found["status"], found["shards"], found["shards_done"]) == ("succeeded", 3, 3)
    assert (found["images"], found["missing"]) == (9, 1)
    folder = download(ann, found, tmp_path / "set")
    tars = sorted(folder.glob("data/*.tar"))
    assert [path.name for path in tars] == ["00000.tar", "00001.tar", "00002.tar"]
    check_in_webdataset(tars)
    check_in_datasets(tars, tmp_path)
    check_dead_frame_is_listed(folder)


def check_in_webdataset(tars: list[Path]) -> None:
    import webdataset

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


def check_in_datasets(tars: list[Path], cache: Path) -> None:
    from datasets import load_dataset

    data = load_dataset(
        "webdataset", data_files={"train": [*map(str, tars)]}, split="train", cache_dir=cache
    )
    assert len(data) == 9
    assert isinstance(data[0]["png"], Image.Image)
    assert data[0]["json"]["prompt"] == LINES[0]["prompt"]


def check_dead_frame_is_listed(folder: Path) -> None:
    import pandas

    table = pandas.concat(
        pandas.read_parquet(path) for path in sorted(folder.glob("data/*.parquet"))
    )
    assert list(table["key"]) == [line["key"] for line in LINES]
    assert list(table["status"]) == ["success"] * 6 + ["dead"] + ["success"] * 3
    assert table["error_message"].iloc[6] == "It broke."
    missing = json_lines(folder / "missing.jsonl")
    assert [(row["key"], row["error_message"]) for row in missing] == [("k6", "It broke.")]


def test_several_jobs_go_into_one_dataset(farm: Farm, ann: httpx.Client, tmp_path: Path) -> None:
    job_ids = [submit(ann, labels={"set": "both"}, seed=seed) for seed in (1, 2)]
    render_all(farm)
    by_label = ann.post("/v1/exports", json={"to": "webdataset", "labels": {"set": "both"}}).json()
    assert by_label["jobs"] == job_ids
    folder = download(ann, write_shards(farm, ann, by_label), tmp_path)
    with tarfile.open(folder / "data/00001.tar") as tar:
        assert tar.getnames()[0] == "000000010.png"


# Parquet


def test_parquet_has_an_image_column(farm: Farm, ann: httpx.Client, tmp_path: Path) -> None:
    import pandas
    from datasets import load_dataset

    job_id = submit(ann, images_per_prompt=2)
    render_all(farm)
    found = written_export(farm, ann, job_id, to="parquet", shard_frames=8)
    folder = download(ann, found, tmp_path / "set")
    files = sorted(map(str, folder.glob("data/*.parquet")))
    assert len(files) == 3
    data = load_dataset("parquet", data_files={"train": files}, split="train", cache_dir=tmp_path)
    assert type(data.features["image"]).__name__ == "Image"
    assert len(data) == 20
    assert isinstance(data[0]["image"], Image.Image)
    table = pq.read_table(files[0])
    assert table.column("image")[0].as_py()["path"] == "000000000.png"
    assert list(pandas.read_parquet(files[0])["ordinal"]) == [*range(8)]


# Image folder


def test_the_command_downloads_an_image_folder_and_repairs_a_broken_file(
    farm: Farm,
    api: Api,
    ann: httpx.Client,
    job: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from datasets import load_dataset

    monkeypatch.setenv("FARM_API_URL", api.url)
    monkeypatch.setenv("FARM_API_KEY", api.key())
    dest = tmp_path / "set"
    words = ["export", job, "--to", "imagefolder", "--dest", str(dest), "--shard-frames", "4"]
    done = command_while_shards_are_written(farm, ann, [*words, "--json"])
    assert done.code == 0, done.err
    assert done.json["images"] == 10

    data = load_dataset("imagefolder", data_dir=str(dest / "data"), split="train")
    assert len(data) == 10
    assert sorted(data["prompt"]) == sorted(line["prompt"] for line in LINES)

    victim = next(dest.glob("data/00001/*.png"))
    whole = victim.read_bytes()
    victim.write_bytes(b"broken")
    assert command(*words).code == 0
    assert victim.read_bytes() == whole


def command_while_shards_are_written(farm: Farm, ann: httpx.Client, words: list[str]) -> Outcome:
    outcomes: list[Outcome] = []
    thread = threading.Thread(target=lambda: outcomes.append(command(*words)))
    thread.start()
    wait_until(lambda: ann.get("/v1/exports").json()["data"] != [], 30, "the export was asked for")
    Exporter(farm, "exporter").answer()
    thread.join()
    [outcome] = outcomes
    return outcome


# Description files of a dataset


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # from its reader, like the next one
@pytest.mark.filterwarnings("ignore:ConjunctiveGraph is deprecated:DeprecationWarning")
def test_manifest_readme_and_croissant_describe_every_format(
    farm: Farm, ann: httpx.Client, job: str, tmp_path: Path
) -> None:
    import mlcroissant
    from datasets import load_dataset

    for form in ("webdataset", "parquet", "imagefolder"):
        found = written_export(farm, ann, job, to=form)
        check_description(download(ann, found, tmp_path / form))
    records = mlcroissant.Dataset(tmp_path / "parquet/croissant.json").records("pictures")
    assert [record["pictures/prompt"].decode() for record in records] == [
        line["prompt"] for line in LINES
    ]
    assert len(load_dataset(str(tmp_path / "parquet"), split="train")) == 10


def check_description(folder: Path) -> None:
    import mlcroissant

    dataset = mlcroissant.Dataset(folder / "croissant.json")
    assert dataset.metadata.ctx.issues.errors == set()
    manifest = json.loads((folder / "manifest.json").read_bytes())
    assert [shard["number"] for shard in manifest["shards"]] == [0, 1, 2]
    for file in [file for shard in manifest["shards"] for file in shard["files"]]:
        content = (folder / file["name"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == file["sha256"]
    assert "10 pictures in 3 shards" in (folder / "README.md").read_text()
