"""For random jobs in an export, every reader finds the same rows in every form.

`FARM_TEST_EXPORTS=100 python -m pytest tests/integration/exports/test_rows.py` tests more exports.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given
from hypothesis import strategies as st

from farm.config import DEMO_CATALOG, Settings
from farm.context import Farm
from tests.integration.exports.scenes import stored_keys, write_shards
from tests.support.api_server import render
from tests.support.store import fence, register_worker, sql

pytestmark = [
    pytest.mark.usefixtures("own_cache"),
    # webdataset closes its files late.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

EXAMPLES = int(os.environ.get("FARM_TEST_EXPORTS", "4"))
Row = dict[str, Any]

# Random jobs

TEXTS = st.one_of(
    # Readers of JSON do not read some of these as text.
    st.sampled_from(["2024-01-01", "2024-01-01 12:00:00", "7", "1.5", "true", "null", "NaN", "{}"]),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=12),
).filter(lambda text: text.strip() == text)
LABELS = st.dictionaries(st.sampled_from(["set", "n"]), TEXTS, max_size=2)


PARAMETERS: dict[str, list[Any]] = {
    "height": [64, 72],
    "eta": [0, 0.5],
    "clip_skip": [1],
    "prompt_syntax": ["plain"],
}
"""Parameters of lines, with their values. The last three have no column without them."""


@st.composite
def job_inputs(draw: st.DrawFn) -> list[Row]:
    """Generate lines of an input. A missing field is null in its row, or the job's value."""
    keys = draw(st.lists(TEXTS, min_size=1, max_size=7, unique=True))
    keyed = draw(st.booleans())
    lines = []
    for key in keys:
        line: Row = {"prompt": draw(TEXTS)}
        if keyed:
            line["key"] = key
        if negative := draw(st.none() | TEXTS):
            line["negative_prompt"] = negative
        if labels := draw(LABELS):
            line["labels"] = labels
        if draw(st.booleans()):
            line["seed"] = draw(st.integers(0, 2**63 - 2))
        for name, values in PARAMETERS.items():
            if draw(st.integers(0, 3)) == 0:
                line[name] = draw(st.sampled_from(values))
        lines.append(line)
    return lines


@st.composite
def jobs_asked(draw: st.DrawFn) -> Row:
    """Generate a job with an input, and the ordinals that end dead."""
    grid: dict[str, list[Any]] = {}
    if draw(st.booleans()):
        grid["sampler"] = ["ddim", "euler"]
    if draw(st.booleans()):
        grid["guidance_scale"] = [2, 2.5]
    lines = draw(job_inputs())
    if not any("negative_prompt" in line for line in lines) and draw(st.booleans()):
        grid["negative_prompt"] = [None, draw(TEXTS)]
    body = {
        "pipeline": draw(st.sampled_from(["demo", "nameless"])),
        "format": draw(st.sampled_from(["png", "png", "webp", "jpeg"])),
        "steps": draw(st.integers(1, 3)),
        "negative_prompt": draw(st.none() | TEXTS),
        "images_per_prompt": draw(st.integers(1, 2)),
        "max_attempts": 1,
        "grid": grid,
    }
    if "sampler" in grid and body["pipeline"] == "nameless":
        grid["sampler"] = [None, "ddim"]
    if "negative_prompt" in grid:
        del body["negative_prompt"]
    return {"body": body, "lines": lines, "dead": draw(st.sets(st.integers(0, 9), max_size=9))}


@pytest.fixture
def settings(settings: Settings, tmp_path: Path) -> Settings:
    """Add the pipeline `nameless`: the demo's model, with a sampler unknown to the farm."""
    model = DEMO_CATALOG.parent / "model"
    shutil.copytree(model, tmp_path / "nameless")
    scheduler = tmp_path / "nameless/scheduler/scheduler_config.json"
    config = json.loads(scheduler.read_text())
    scheduler.write_text(json.dumps({**config, "_class_name": "LCMScheduler"}))
    demo = DEMO_CATALOG.read_text().replace('"model"', f'"{model}"')
    nameless = demo.replace(str(model), "nameless").replace("pipelines.demo", "pipelines.nameless")
    (tmp_path / "pipelines.toml").write_text(demo + nameless)
    return settings.model_copy(update={"pipelines": tmp_path / "pipelines.toml"})


# Rendering and expected rows


def submitted(farm: Farm, ann: httpx.Client, asked: Row) -> str:
    """Submit a job, and render it except for its dead frames. Return its ID."""
    content = b"".join(json.dumps(line).encode() + b"\n" for line in asked["lines"])
    source = ann.post("/v1/inputs", content=content).json()["id"]
    answer = ann.post("/v1/jobs", json={**asked["body"], "input": source})
    assert answer.status_code == 202, answer.text
    worker = register_worker(farm)
    while lease := worker.claim(asked["body"]["pipeline"]):
        dead = [fence(frame) for frame in lease.frames if frame.ordinal in asked["dead"]]
        if dead:
            worker.fail(lease, retryable=False, fences=dead)
        if alive := [f.ordinal for f in lease.frames if f.ordinal not in asked["dead"]]:
            render(worker, lease, *alive)
    return str(answer.json()["id"])


def more_columns(asked: list[Row]) -> list[str]:
    """Return the columns of parameters that differ between lines of a job, or are in some alone."""
    names = [name for name in PARAMETERS if name != "height"]
    found = set()
    for each in asked:
        given = [{name: line.get(name) for name in PARAMETERS} for line in each["lines"]]
        if any(line != given[0] for line in given):
            found |= {name for line in given for name in names if line[name] is not None}
    return sorted(found)


def rows_by_the_api(ann: httpx.Client, job_ids: list[str], more: list[str]) -> Iterator[Row]:
    """Yield the expected rows of the dataset, built from the API's frames."""
    base = 0
    for job_id in job_ids:
        job = ann.get(f"/v1/jobs/{job_id}").json()
        for frame in ann.get(f"/v1/jobs/{job_id}/frames?limit=200").json()["data"]:
            if frame["state"] == "succeeded":
                yield {
                    "key": frame["key"] or f"{base + frame['ordinal']:09d}",
                    "caption": frame["prompt"],
                    "status": "success",
                    "error_message": None,
                    "step": frame["steps"],
                    "cfg": frame["guidance_scale"],
                    "pipeline": job["pipeline"],
                    "job": job_id,
                    **{name: frame[name] for name in (*SAME_NAMES, *more)},
                }
        base += job["total"]


SAME_NAMES = (
    *("prompt", "negative_prompt", "seed", "sampler", "width", "height", "format"),
    *("sha256", "bytes", "ordinal", "attempt", "rerolls", "reused", "labels"),
)

# Readers: each returns rows, with the sha256 of the picture that it found for a row


def loaded(*words: str, column: str = "image", **options: Any) -> list[Row]:
    from datasets import Image, load_dataset

    data = load_dataset(*words, split="train", **options)
    if column not in data.column_names:
        [column] = set(data.column_names) & {"png", "jpg", "webp"}
    rows = []
    for row in data.cast_column(column, Image(decode=False)):
        picture = row.pop(column)
        content = picture["bytes"] or Path(picture["path"]).read_bytes()
        rows.append({**row.get("json", row), "picture": hashlib.sha256(content).hexdigest()})
    return rows


def webdataset_by_datasets(folder: Path) -> list[Row]:
    return loaded("webdataset", data_files=str(folder / "data/*.tar"))


def webdataset_by_its_card(folder: Path) -> list[Row]:
    return loaded(str(folder))


def webdataset_by_webdataset(folder: Path) -> list[Row]:
    import webdataset

    rows = []
    for path in sorted(folder.glob("data/*.tar")):
        for sample in webdataset.WebDataset(str(path), shardshuffle=False):
            row = json.loads(sample["json"])
            content = sample.get("png") or sample.get("jpg") or sample["webp"]
            assert sample["txt"].decode() == row["caption"]
            rows.append({**row, "picture": hashlib.sha256(content).hexdigest()})
    return rows


def table_beside_webdataset(folder: Path) -> list[Row]:
    rows = [
        row for path in folder.glob("data/*.parquet") for row in pq.read_table(path).to_pylist()
    ]
    return [{**row, "picture": row["sha256"]} for row in rows if row["status"] == "success"]


def parquet_by_datasets(folder: Path) -> list[Row]:
    return loaded("parquet", data_files=str(folder / "data/*.parquet"))


def parquet_by_its_card(folder: Path) -> list[Row]:
    return loaded(str(folder))


def imagefolder_by_datasets(folder: Path) -> list[Row]:
    return loaded("imagefolder", data_dir=str(folder / "data"))


READERS: dict[str, list[Callable[[Path], list[Row]]]] = {
    "webdataset": [
        webdataset_by_datasets,
        webdataset_by_its_card,
        webdataset_by_webdataset,
        table_beside_webdataset,
    ],
    "parquet": [parquet_by_datasets, parquet_by_its_card],
    "imagefolder": [imagefolder_by_datasets],
}
NULLABLE = ("error_message", "negative_prompt", "sampler")
HAVE_NULLS = [
    table_beside_webdataset,
    parquet_by_datasets,
    parquet_by_its_card,
    imagefolder_by_datasets,
]


def comparable(row: Row) -> Row:
    """Compare a row's spec with its fields, then remove the spec and parse the labels."""
    spec = json.loads(row.pop("spec"))
    assert (spec["prompt"], spec["seed"]) == (row["prompt"], row["seed"])
    for name in ("negative_prompt", "sampler"):
        assert (spec["params"].get(name) or "") == (row[name] or "")
    return {**row, "labels": json.loads(row["labels"])}


def by_place(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (row["job"], row["ordinal"]))


def told_by(read: Callable[[Path], list[Row]], rows: list[Row]) -> list[Row]:
    """Return the rows in a reader's form: JSON has an empty text instead of null."""
    empty = {} if read in HAVE_NULLS else {**dict.fromkeys(NULLABLE, ""), "clip_skip": 0}
    return [
        {**row, "picture": row["sha256"]}
        | {name: value for name, value in empty.items() if row.get(name, "") is None}
        for row in rows
    ]


def fetched(farm: Farm, found: Row, folder: Path) -> Path:
    """Fetch every file of an export from its storage."""
    [(bucket, prefix)] = sql(
        farm, "SELECT bucket, prefix FROM exports WHERE id = :id", id=found["id"]
    )
    for key in stored_keys(farm, prefix, bucket):
        path = folder / key.removeprefix(prefix)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(farm.artifacts.get(key, bucket))
    return folder


def plain(lines: list[Row], dead: Collection[int] = (), **body: Any) -> Row:
    """Return a job of these lines."""
    whole = {"pipeline": "demo", "steps": 2, "seed": 7, "max_attempts": 1, **body}
    return {"body": whole, "lines": lines, "dead": dead}


STARS: list[Row] = [{"prompt": f"a star, {number}"} for number in range(8)]
LATE = [*STARS, *({**line, "negative_prompt": "blue"} for line in STARS[:4])]
SETTINGS = [
    {**line, "steps": 1 + number % 2, **({} if number < 5 else {"clip_skip": 1, "eta": 0.5})}
    for number, line in enumerate(STARS)
]
DATES: list[Row] = [{**line, "key": f"2024-01-0{day + 1}"} for day, line in enumerate(STARS)]
ASKED: dict[str, list[Row]] = {
    "negative prompts in the last lines alone": [plain(LATE, negative_prompt=None)],
    "a grid that begins with null": [plain(STARS, grid={"negative_prompt": [None, "blue"]})],
    "a sampler without a name, then one with": [plain(STARS, pipeline="nameless"), plain(STARS)],
    "keys that look like dates": [plain(DATES), plain(STARS)],
    "no picture in the first shards": [plain(STARS, dead=range(7))],
    "parameters in the last lines": [plain(SETTINGS), plain(STARS[:2])],
    "two formats": [plain(STARS[:4]), plain(STARS[:5], format="webp")],
    "three formats": [plain(STARS[:2], format=name) for name in ("jpeg", "webp", "png")],
}


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_every_reader_loads(farm: Farm, ann: httpx.Client, asked: list[Row]) -> None:
    check(farm, ann, asked, shard_frames=4)


@given(asked=st.lists(jobs_asked(), min_size=1, max_size=3), shard_frames=st.integers(1, 6))
@hypothesis.settings(
    max_examples=EXAMPLES,
    derandomize="FARM_TEST_EXPORTS" not in os.environ,
    suppress_health_check=list(HealthCheck),
    database=None,
    phases=[Phase.generate, Phase.shrink],
)
@pytest.mark.full_size
@pytest.mark.timeout(120 + 20 * EXAMPLES)
def test_every_form_has_the_same_rows_in_every_reader(
    farm: Farm, ann: httpx.Client, asked: list[Row], shard_frames: int
) -> None:
    check(farm, ann, asked, shard_frames)


def check(farm: Farm, ann: httpx.Client, asked: list[Row], shard_frames: int) -> None:
    """Export jobs in every form, and compare each reader's rows with the API."""
    job_ids = [submitted(farm, ann, each) for each in asked]
    expected = [*rows_by_the_api(ann, job_ids, more_columns(asked))]
    if not expected:
        return  # there is nothing to load
    several = len({each["body"].get("format", "png") for each in asked}) > 1
    for form, readers in READERS.items():
        body = {"to": form, "jobs": job_ids, "shard_frames": shard_frames}
        answer = ann.post("/v1/exports", json=body)
        if form == "webdataset" and several:
            assert answer.status_code == 422
            assert answer.json()["error"]["param"] == "jobs"
            continue
        found = write_shards(farm, ann, answer.json())
        assert (found["status"], found["images"]) == ("succeeded", len(expected)), found
        with tempfile.TemporaryDirectory() as place:
            folder = fetched(farm, found, Path(place))
            for read in readers:
                rows = [comparable(row) for row in read(folder)]
                assert by_place(rows) == by_place(told_by(read, expected)), read.__name__
