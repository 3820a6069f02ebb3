"""A frame's bits do not depend on its slot: uneven splits are found."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from farm.config import DEMO_CATALOG
from farm.domain.spec import FrameSpec
from farm.errors import CatalogError, RenderError
from farm.pipelines.catalog import Pipeline, load_catalog
from farm.pipelines.family import Batch, LoadedPipeline, floats_seen
from farm.pipelines.resolve import ResolvedPipeline, resolve_pipeline
from farm.pipelines.runtime.devices import device_name, even_threads, torch_threads
from farm.pipelines.runtime.slots import SlotTest
from farm.rendering.warmup import slot_test
from tests.support.checkpoints import save

# diffusers' own samplers hand torch tensors to numpy.array.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

WHOLE = "FARM_TEST_ALL_SLOTS" in os.environ
BUCKETS = range(1, 9) if WHOLE else (3, 4)
THREADS = range(1, 13) if WHOLE else (6,)
SIZES = [(64, 64), (96, 64), (128, 128)] if WHOLE else [(64, 64), (96, 64)]
STEPS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("slots")
    for kind in ("stable_diffusion", "sdxl"):
        save(kind, made / kind)
    return made


@cache
def pinned(folder: Path, name: str) -> tuple[ResolvedPipeline, LoadedPipeline]:
    """Load a pipeline once."""
    if name == "demo":
        entry = load_catalog(DEMO_CATALOG).pipelines["demo"]
    else:
        entry = Pipeline(source=name, device="cpu")
        entry.place(folder)
    resolved = resolve_pipeline(name, entry)
    return resolved, resolved.family.load(entry)


@pytest.fixture
def threads_restored() -> Iterator[None]:
    with torch_threads(0):
        yield


def frame(
    resolved: ResolvedPipeline, size: tuple[int, int], bucket: int, seed: int = 5
) -> FrameSpec:
    params = resolved.params({"width": size[0], "height": size[1], "steps": STEPS})
    return FrameSpec(
        pipeline=resolved.name,
        prompt=f"a green ring {seed}",
        seed=seed,
        bucket=bucket,
        params=params.model_dump(),
    )


def floats(
    resolved: ResolvedPipeline, loaded: LoadedPipeline, frames: list[FrameSpec]
) -> torch.Tensor:
    """Render a batch. Return its pictures before rounding."""
    with floats_seen() as seen:
        resolved.family.denoise(loaded, Batch(frames))
    found: torch.Tensor = seen[-1]
    return found


@pytest.mark.full_size
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("bucket", BUCKETS)
@pytest.mark.parametrize("asked", THREADS)
@pytest.mark.parametrize("name", ["demo", "stable_diffusion", "sdxl"])
def test_every_slot_gives_the_bits_of_the_first(
    folder: Path, name: str, asked: int, bucket: int, size: tuple[int, int], threads_restored: None
) -> None:
    """Renders a frame in all slots, and each frame of a batch in its slot and in the next one."""
    resolved, loaded = pinned(folder, name)
    torch.set_num_threads(even_threads(asked))
    slots = SlotTest(name, resolved.family, resolved.params_type)
    frames = [frame(resolved, size, bucket, seed) for seed in range(bucket)]
    with torch_threads(slots.threads(loaded, frames[0])):
        alike = floats(resolved, loaded, frames[:1] * bucket)
        mixed = floats(resolved, loaded, frames)
        moved = floats(resolved, loaded, [frames[-1], *frames[:-1]])
    for slot in range(bucket):
        assert torch.equal(alike[slot], mixed[0]), slot
        assert torch.equal(mixed[slot], moved[(slot + 1) % bucket]), slot


def test_the_instruction_set_that_one_dnn_chose_is_told() -> None:
    """oneDNN chooses once per process. An environment variable can limit its choice."""
    ask = "from farm.pipelines.runtime.devices import device_name; print(device_name('cpu'))"
    less = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX"}
    told = subprocess.run(
        [sys.executable, "-c", ask], env=less, capture_output=True, text=True, check=True
    ).stdout
    here = device_name("cpu")
    assert told == f"{here.partition(',')[0]}, oneDNN Intel AVX\n"
    assert device_name("cpu") == here
    assert ", oneDNN " in here
    assert "Intel AVX\n" not in f"{here}\n", "this machine has more than AVX"


def test_threads_are_a_power_of_two() -> None:
    assert [even_threads(asked) for asked in range(1, 13)] == [1, 2, 2, 4, 4, 4, 4, 8, 8, 8, 8, 8]


def spoil(monkeypatch: pytest.MonkeyPatch, loaded: LoadedPipeline, needed: int) -> None:
    """Make the last slot's bits differ if torch has at least this many threads."""
    forward = loaded.pipe.unet.forward

    def uneven(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if torch.get_num_threads() >= needed:
            output[0][-1] += 1e-6
        return output

    monkeypatch.setattr(loaded.pipe.unet, "forward", uneven)


def test_a_kernel_that_needs_one_thread_gets_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, threads_restored: None
) -> None:
    resolved, loaded = pinned(folder, "demo")
    spoil(monkeypatch, loaded, needed=2)
    torch.set_num_threads(2)
    slots = SlotTest("demo", resolved.family, resolved.params_type)
    assert slots.threads(loaded, frame(resolved, (64, 64), 4)) == 1
    assert slots.threads(loaded, frame(resolved, (64, 64), 1)) == 2
    assert slots.threads_of(frame(resolved, (64, 64), 4), 2) == 1


def test_a_kernel_that_depends_on_the_slot_fails_the_load_and_the_shape(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved, loaded = pinned(folder, "demo")
    spoil(monkeypatch, loaded, needed=1)
    with pytest.raises(CatalogError, match="64x64 at bucket 8 to the same bytes"):
        slot_test(resolved, loaded)
    slots = SlotTest("demo", resolved.family, resolved.params_type)
    with pytest.raises(RenderError, match="Choose another bucket, such as 1"):
        slots.threads(loaded, frame(resolved, (96, 64), 3))


def test_a_load_outlives_memory_that_runs_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The farm then halves the bucket, and tests the new bucket at its first use."""
    resolved, loaded = pinned(folder, "demo")

    def none_left(*_: Any, **__: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(loaded.pipe.unet, "forward", none_left)
        slots = slot_test(resolved, loaded)
    assert slots.threads(loaded, frame(resolved, (64, 64), 2)) >= 1
