"""Failpoints are read from one line, are triggered by a prompt, and never act in production."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from farm.config import Settings
from farm.domain.spec import FrameSpec
from farm.failpoints import Failpoint, parse, reach
from farm.pipelines.catalog import Pipeline, load_catalog
from farm.pipelines.families.null import write_checkpoint
from farm.pipelines.family import Batch, StopBatch
from farm.pipelines.resolve import ResolvedPipeline, resolve_pipeline

TWO = "submit.committed=exit:EXIT; render.step=oom:BIG"


def test_they_are_read() -> None:
    assert parse(TWO) == [
        Failpoint("submit.committed", "exit", "EXIT"),
        Failpoint("render.step", "oom", "BIG"),
    ]
    assert parse("") == parse(" ; ") == []


@pytest.mark.parametrize(
    "text",
    ["render.step", "render.step=oom", "render.step=oom:", "nowhere=oom:x", "render.step=x:y"],
)
def test_what_is_unknown_or_incomplete_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="write point=action:text"):
        parse(text)
    with pytest.raises(ValidationError, match="write point=action:text"):
        Settings(environment="development", failpoints=text)


def test_production_has_none() -> None:
    with pytest.raises(ValidationError, match="set FARM_ENVIRONMENT=development"):
        Settings(failpoints=TWO)
    assert Settings(environment="development", failpoints=TWO).failpoints == TWO


def test_production_stores_its_pictures() -> None:
    with pytest.raises(ValidationError, match="FARM_DISCARD_IMAGES is refused in production"):
        Settings(discard_images=True)
    assert Settings(environment="development", discard_images=True).discard_images


def test_one_acts_at_its_point_and_for_its_text_alone() -> None:
    reach(TWO, "render.step", ["a small star", "EXIT"])
    reach(TWO, "submit.committed", ["a BIG star"])
    reach("", "render.step", ["a BIG star"])
    with pytest.raises(MemoryError):
        reach(TWO, "render.step", ["a small star", "a BIG star"])


@pytest.mark.parametrize(("action", "code"), [("exit", 1), ("segfault", -signal.SIGSEGV)])
def test_some_end_the_process(action: str, code: int) -> None:
    program = (
        "from farm.failpoints import reach\n"
        f"reach('render.step={action}:X', 'render.step', ['X'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == code


def test_a_hang_lasts() -> None:
    program = "from farm.failpoints import reach; reach('render.step=hang:X', 'render.step', 'X')"
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run([sys.executable, "-c", program], timeout=2, check=False)


@pytest.fixture
def entry(tmp_path: Path) -> Pipeline:
    write_checkpoint(tmp_path / "null")
    (tmp_path / "pipelines.toml").write_text('[pipelines.null]\nsource = "null"\n')
    return load_catalog(tmp_path / "pipelines.toml").pipelines["null"]


@pytest.fixture
def resolved(entry: Pipeline) -> ResolvedPipeline:
    return resolve_pipeline("null", entry)


def frame(
    resolved: ResolvedPipeline, seed: int, prompt: str = "noise", **params: object
) -> FrameSpec:
    whole = resolved.params({"step_seconds": 0.0, **params}).model_dump()
    return FrameSpec(pipeline="null", prompt=prompt, seed=seed, bucket=4, params=whole)


def test_the_family_null_gives_the_same_noise_for_a_seed(
    resolved: ResolvedPipeline, entry: Pipeline
) -> None:
    assert resolved.family.name == "null"
    loaded = resolved.family.load(entry)
    steps: list[tuple[int, int]] = []
    batch = Batch([frame(resolved, 1), frame(resolved, 2)], lambda *step: steps.append(step))
    first, second = resolved.family.denoise(loaded, batch)
    [again] = resolved.family.denoise(loaded, Batch([frame(resolved, 2)]))
    assert first is not None
    assert second is not None
    assert again is not None
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert (first.size, first.mode) == ((64, 64), "RGB")
    assert second.tobytes() == again.tobytes() != first.tobytes()


def test_the_family_null_stops_at_a_step(resolved: ResolvedPipeline, entry: Pipeline) -> None:
    def stop(done: int, _steps: int) -> None:
        if done == 2:
            raise StopBatch

    with pytest.raises(StopBatch):
        resolved.family.denoise(resolved.family.load(entry), Batch([frame(resolved, 1)], stop))
