"""Calibration: the chosen bucket, the end of a sweep, and the catalog file afterwards."""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import farm.pipelines.families as farm_families
from farm.cli.terminal.exit_codes import ERROR, OK, USAGE
from farm.config import DEMO_CATALOG
from farm.domain.ladder import powers_up_to
from farm.errors import CatalogError
from farm.pipelines.catalog import Pipeline, Step, load_catalog
from farm.pipelines.catalog_edit import ladder_lines, write_buckets
from farm.pipelines.families import all_families
from farm.pipelines.families.null import write_checkpoint
from farm.pipelines.runtime.devices import torch_threads
from farm.rendering.calibration import Point, best_bucket, has_stopped_growing
from tests.support.cli_runner import Outcome, farm


def point(bucket: int, images_per_second: float, *noise: float) -> Point:
    seconds = bucket / images_per_second
    return Point(bucket, (seconds, *(seconds * share for share in noise)), 0)


RISING = [point(1, 1.0), point(2, 1.9), point(4, 3.4), point(8, 3.5), point(16, 3.45)]


@pytest.mark.parametrize(("share", "bucket"), [(1.0, 8), (0.97, 4), (0.9, 4), (0.5, 2), (0.1, 1)])
def test_the_smallest_bucket_that_is_fast_enough(share: float, bucket: int) -> None:
    assert best_bucket(RISING, share).bucket == bucket
    assert best_bucket(RISING[::-1], share).bucket == bucket


def test_one_disturbed_batch_decides_nothing() -> None:
    disturbed = [point(1, 1.0, 1.0, 9.0), point(2, 1.9, 1.0, 9.0)]
    assert [round(item.images_per_second, 6) for item in disturbed] == [1.0, 1.9]
    assert disturbed[0].spread == pytest.approx(8.0)
    assert best_bucket(disturbed, 0.97).bucket == 2


def test_two_buckets_without_growth_end_a_sweep() -> None:
    assert not any(has_stopped_growing(RISING[:count]) for count in range(5))
    flat = [*RISING[:3], point(8, 3.4), point(16, 3.46)]
    assert has_stopped_growing(flat)
    assert not has_stopped_growing(flat[:4])
    assert not has_stopped_growing([*RISING[:3], point(8, 3.0), point(16, 4.0)])


def test_the_buckets_that_are_tried() -> None:
    assert [powers_up_to(most) for most in (1, 2, 6, 16)] == [
        [1],
        [1, 2],
        [1, 2, 4, 6],
        [1, 2, 4, 8, 16],
    ]
    assert powers_up_to(64)[-2:] == [32, 64]


CATALOG = """\
# What we render.
[pipelines.other]        # not this one
source  =   "x"
bucket = { "default" = 1 }

[pipelines.tiny]
source     = "y"   # next to this file
{bucket}
defaults   = { "steps" = 2 }   # quick

# The end.
"""
CHANGED = 'bucket     = { "default" = 2, "64x64" = 8 }'


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('bucket     = { "default" = 4 }', CHANGED),
        ('bucket     = { "default" = 4, "8x8" = 1 }   # measured', f"{CHANGED}   # measured"),
        ("bucket     = {default=4} # measured", f"{CHANGED} # measured"),
    ],
)
def test_only_the_bucket_line_changes(tmp_path: Path, before: str, after: str) -> None:
    path = tmp_path / "pipelines.toml"
    path.write_text(CATALOG.replace("{bucket}", before))
    path.chmod(0o640)
    write_buckets(path, "tiny", {"default": 2, "64x64": 8})
    assert path.read_text() == CATALOG.replace("{bucket}", after)
    assert path.stat().st_mode & 0o777 == 0o640
    assert [file.name for file in tmp_path.iterdir()] == ["pipelines.toml"]


@pytest.mark.parametrize(
    "text",
    [
        CATALOG.replace("{bucket}\n", ""),
        '[pipelines.tiny]\nsource = "y"\n\n[pipelines.tiny.bucket]  # it was\ndefault = 4 # four\n'
        '"8x8" = 2\n\n[pipelines.other]\nsource = "z"\n',
        'pipelines.tiny.source = "y"\npipelines.tiny.bucket.default = 4\n',
        'pipelines = { tiny = { source = "y" } }\n',
        '[pipelines]\ntiny = { source = "y", bucket = { default = 3 } }  # short\n',
        '[pipelines.tiny]\r\nsource = "y"  # Windows\r\nbucket = { default = 3 }\r\n',
    ],
)
def test_however_it_is_written_the_rest_stays(tmp_path: Path, text: str) -> None:
    path = tmp_path / "pipelines.toml"
    path.write_bytes(text.encode())
    before = load_catalog(path).model_dump()
    ladder = [
        Step(size="64x64", bucket=frames, seconds=frames, memory_bytes=5) for frames in (1, 8)
    ]
    write_buckets(path, "tiny", {"default": 2, "64x64": 8}, ladder)
    after = load_catalog(path).model_dump()
    assert after["pipelines"]["tiny"].pop("bucket") == {"default": 2, "64x64": 8}
    assert after["pipelines"]["tiny"].pop("ladder") == [step.model_dump() for step in ladder]
    before["pipelines"]["tiny"].pop("bucket")
    before["pipelines"]["tiny"].pop("ladder")
    assert after == before
    changed = path.read_bytes().decode()
    for line in text.splitlines(keepends=True):
        assert (
            "bucket" in line
            or "8x8" in line
            or "default" in line
            or "{" in line
            or (line in changed)
        )
    for comment in re.findall(r"#.*", text):
        assert comment in changed


LADDER = [
    Step(size="64x64", bucket=1, seconds=0.5, memory_bytes=10),
    Step(size="64x64", bucket=2, seconds=1.0),
]
LADDER_LINES = """\
ladder = [
    { size = "64x64", bucket = 1, seconds = 0.5, memory_bytes = 10 },  # 2 images/s, 0.5 s per image
    { size = "64x64", bucket = 2, seconds = 1.0, memory_bytes = 0 },  # 2 images/s, 0.5 s per image
]
"""


def test_a_ladder_is_written_below_the_buckets(tmp_path: Path) -> None:
    path = tmp_path / "pipelines.toml"
    path.write_text(CATALOG.replace("{bucket}", "bucket     = {default=4} # measured"))
    for ladder in ([Step(size="default", bucket=1, seconds=9.0)], LADDER):
        write_buckets(path, "tiny", {"default": 1, "64x64": 2}, ladder)  # at last: LADDER
    buckets = 'bucket     = { "default" = 1, "64x64" = 2 } # measured\n'
    assert path.read_text() == CATALOG.replace("{bucket}\n", f"{buckets}{LADDER_LINES}")
    assert load_catalog(path).pipelines["tiny"].ladder == LADDER


def test_a_ladder_is_written_in_json_too(tmp_path: Path) -> None:
    path = tmp_path / "pipelines.json"
    path.write_text(json.dumps({"pipelines": {"tiny": {"source": "y"}}}))
    write_buckets(path, "tiny", {"default": 1, "64x64": 2}, LADDER)
    assert load_catalog(path).pipelines["tiny"].ladder == LADDER


def step(bucket: int, **values: Any) -> dict[str, Any]:
    return {"size": "64x64", "bucket": bucket, "seconds": 1.0, **values}


@pytest.mark.parametrize(
    ("ladder", "message"),
    [
        ([step(1, seconds=0)], "greater than 0"),
        ([step(1, second=1)], "second"),
    ],
)
def test_a_wrong_ladder_is_refused(ladder: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Pipeline.model_validate({"source": "y", "bucket": {"64x64": 2}, "ladder": ladder})


def test_a_link_to_the_catalog_stays_one(tmp_path: Path) -> None:
    real = tmp_path / "real.toml"
    real.write_text('[pipelines.tiny]\nsource = "y"\n')
    link = tmp_path / "pipelines.toml"
    link.symlink_to(real)
    write_buckets(link, "tiny", {"default": 2})
    assert link.is_symlink()
    assert load_catalog(real).pipelines["tiny"].bucket == {"default": 2}


def test_a_catalog_in_json_is_changed_too(tmp_path: Path) -> None:
    path = tmp_path / "pipelines.json"
    entries: dict[str, dict[str, object]] = {
        "tiny": {"source": "y", "bucket": {"8x8": 2}},
        "other": {"source": "ü/z"},
    }
    path.write_text(json.dumps({"pipelines": entries}))
    write_buckets(path, "tiny", {"default": 2, "64x64": 8})
    entries["tiny"]["bucket"] = {"default": 2, "64x64": 8}
    assert json.loads(path.read_text()) == {"pipelines": entries}
    assert "ü" in path.read_text()
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_the_programs_own_catalog_is_not_changed() -> None:
    before = DEMO_CATALOG.read_bytes()
    with pytest.raises(CatalogError, match="Copy it"):
        write_buckets(DEMO_CATALOG, "demo", {"default": 2})
    assert DEMO_CATALOG.read_bytes() == before


FAMILY = '''
"""The null family, on a device with room for four pictures of 64x64."""

from farm.pipelines.family import Batch, Checkpoint, padded
from farm.pipelines.families.null import Null


class Narrow(Null):
    name = "narrow"

    def fits(self, pipeline, checkpoint):
        return False

    def denoise(self, loaded, batch):
        params = batch.frames[0].params
        if params["width"] * params["height"] * len(padded(batch.frames)) > 4 * 64 * 64:
            raise MemoryError
        return super().denoise(loaded, batch)


family = Narrow()
'''
TABLE = 'bucket = { "default" = 1, "128x128" = 3, "256x256" = 7 }'


@pytest.fixture
def catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Write a catalog with one pipeline, which runs out of memory."""
    folder = tmp_path / "families"
    folder.mkdir()
    (folder / "narrow.py").write_text(FAMILY)
    monkeypatch.setattr(farm_families, "__path__", [*farm_families.__path__, str(folder)])
    all_families.cache_clear()
    write_checkpoint(tmp_path / "null")
    path = tmp_path / "pipelines.toml"
    path.write_text(
        f'# Ours.\n[pipelines.x]\nfamily = "narrow"\nsource = "null"\n{TABLE}\n# End.\n'
    )
    monkeypatch.setenv("FARM_PIPELINES", str(path))
    yield path
    all_families.cache_clear()
    sys.modules.pop("farm.pipelines.families.narrow", None)


def calibrate(*words: str) -> Outcome:
    return farm("calibrate", "x", "--batches", "5", "--steps", "1", *words)


def catalog_entry(path: Path) -> Pipeline:
    return load_catalog(path).pipelines["x"]


def test_memory_that_runs_out_ends_the_sweep_of_its_size(catalog: Path) -> None:
    done = calibrate("--write", "--json", "--share", "1")
    assert done.code == OK, done.err
    said = done.json
    assert [(item["names"], item["ended"]) for item in said["sizes"]] == [
        (["default"], "out_of_memory"),
        (["128x128"], "out_of_memory"),
        (["256x256"], "out_of_memory"),
    ]
    tried = [[at["bucket"] for at in item["points"]] for item in said["sizes"]]
    assert tried == [[1, 2, 4], [1], []]
    assert said["bucket"] == {"default": 4, "128x128": 1, "256x256": 7}
    # Steps wait equally long at every bucket, so the largest that fits is by far the fastest.
    text = catalog.read_text()
    table = 'bucket = { "default" = 4, "128x128" = 1, "256x256" = 7 }'
    ladder = catalog_entry(catalog).ladder
    assert [(step.size, step.bucket) for step in ladder] == [
        ("default", 1),
        ("default", 2),
        ("default", 4),
        ("128x128", 1),
    ]
    measured = [statistics.median(at["seconds"]) for item in said["sizes"] for at in item["points"]]
    assert [step.seconds for step in ladder] == pytest.approx(measured, rel=1e-3)
    text = text.replace(f"ladder = {ladder_lines(ladder)}\n", "")
    assert text.replace(table, TABLE) == (
        f'# Ours.\n[pipelines.x]\nfamily = "narrow"\nsource = "null"\n{TABLE}\n# End.\n'
    )


def test_it_tells_people_what_to_paste(catalog: Path) -> None:
    before = catalog.read_text()
    done = calibrate("--share", "1")
    assert done.code == OK, done.err
    lines = done.out.splitlines()
    at = lines.index("ladder = [")
    assert lines[at - 1].startswith('bucket = { "default" = 4,')
    assert lines[-1] == "]"
    assert len(lines[at + 1 : -1]) == 4  # buckets 1, 2 and 4 of the default size, 1 of 128x128
    assert "Memory ran out above bucket 4." in done.out
    assert "Out of memory: even one picture of this size does not fit" in done.out
    assert "recommended" in done.out
    assert catalog.read_text() == before


def test_where_no_picture_fits_that_is_an_error(catalog: Path) -> None:
    catalog.write_text(
        '[pipelines.x]\nfamily = "narrow"\nsource = "null"\n'
        "defaults = { width = 256, height = 256 }\n"
    )
    done = calibrate("--write")
    assert done.code == ERROR
    assert "even a single picture does not fit" in done.err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--size", "64"], ERROR, "size '64': write width and height"),
        (["--size", "0x64"], ERROR, "write width and height"),
        (["--size", "60x64"], ERROR, "width"),
        (["--size", "8192x8192"], ERROR, "at most 4194304 pixels"),
        (["--most", "257"], USAGE, "--most"),
        (["--share", "0"], USAGE, "--share"),
        (["--batches", "0"], USAGE, "--batches"),
    ],
)
def test_bad_input_is_named(catalog: Path, words: list[str], code: int, said: str) -> None:
    done = calibrate(*words)
    assert (done.code, "Traceback" in done.err) == (code, False)
    assert said in done.err


def test_an_unknown_pipeline_is_named(catalog: Path) -> None:
    done = farm("calibrate", "y")
    assert done.code == ERROR
    assert "There is no pipeline 'y' in the catalog. It has x." in done.err


def test_the_demo_is_swept() -> None:
    words = ("--most", "2", "--batches", "2", "--steps", "1", "--size", "32x32", "--json")
    with torch_threads(1):
        done = farm("calibrate", "demo", *words, env={"FARM_TORCH_THREADS": "1"})
    assert done.code == OK, done.err
    said = json.loads(done.out.splitlines()[-1])
    assert [item["names"] for item in said["sizes"]] == [["default", "64x64"], ["32x32"]]
    for item in said["sizes"]:
        assert [at["bucket"] for at in item["points"]] == [1, 2]
        assert item["ended"] == "most"
        for at in item["points"]:
            assert len(at["seconds"]) == 2
            assert at["images_per_second"] * at["seconds_per_image"] == pytest.approx(1)
            assert 2**27 < at["peak_bytes"] < 2**33  # the process has loaded torch
    assert set(said["bucket"]) == {"default", "64x64", "32x32"}
    assert not said["written"]
