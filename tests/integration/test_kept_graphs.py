"""Compiled graphs are reused by the next start. Damaged ones are compiled again."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from farm.pipelines.catalog import Pipeline
from farm.pipelines.disk_cache import configure
from farm.pipelines.runtime import compile_cache
from farm.pipelines.runtime.compile_cache import graphs_kept
from tests.benchmarks.warmstart import measure

ENTRY = Pipeline(source="x")
LIBRARY = "ab/kernel.so"


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Path]]:
    """Yield a function that simulates the next process start. It returns torch's cache folder."""
    monkeypatch.delenv(compile_cache.VARIABLE, raising=False)
    monkeypatch.setattr(compile_cache, "_chosen", None)
    monkeypatch.setattr(compile_cache, "_locks", [])
    configure(tmp_path / "cache")

    def started() -> Path:
        end()
        with graphs_kept("x", ENTRY):
            return Path(os.environ[compile_cache.VARIABLE])

    def end() -> None:
        while compile_cache._locks:
            os.close(compile_cache._locks.pop())

    yield started
    end()
    configure(None)
    os.environ.pop(compile_cache.VARIABLE, None)


@pytest.fixture
def folder(start: Callable[[], Path]) -> Path:
    """Return the cache folder after a first start, with a library in it."""
    folder = start()
    with graphs_kept("x", ENTRY):
        (folder / LIBRARY).parent.mkdir()
        (folder / LIBRARY).write_bytes(b"code" * 100)
        (folder / "empty.lock").touch()
    return folder


def test_a_whole_folder_is_used_again(start: Callable[[], Path], folder: Path) -> None:
    assert start() == folder
    assert (folder / LIBRARY).read_bytes() == b"code" * 100


def cut_off(folder: Path) -> None:
    (folder / LIBRARY).write_bytes(b"code")  # as after a full disk


def change_a_byte(folder: Path) -> None:
    (folder / LIBRARY).write_bytes(b"code" * 99 + b"mode")


def remove_a_file(folder: Path) -> None:
    (folder / LIBRARY).unlink()


def add_a_file(folder: Path) -> None:
    (folder / "from-elsewhere.py").write_text("raise SystemExit(3)")


def break_the_list(folder: Path) -> None:
    folder.with_name(f"{folder.name}.json").write_text("{")


def lose_the_list(folder: Path) -> None:
    folder.with_name(f"{folder.name}.json").unlink()


@pytest.mark.parametrize(
    "damage",
    [cut_off, change_a_byte, remove_a_file, add_a_file, break_the_list, lose_the_list],
    ids=lambda damage: damage.__name__,
)
def test_a_damaged_folder_is_emptied_before_torch_looks(
    start: Callable[[], Path], folder: Path, damage: Callable[[Path], None]
) -> None:
    damage(folder)
    assert start() == folder
    assert list(folder.iterdir()) == []


def test_a_folder_in_which_a_process_works_is_left_alone(
    start: Callable[[], Path], folder: Path
) -> None:
    add_a_file(folder)
    with graphs_kept("x", ENTRY):  # the previous start still holds its lock
        assert (folder / LIBRARY).exists()


def test_another_entry_has_another_folder(start: Callable[[], Path], folder: Path) -> None:
    with graphs_kept("x", Pipeline(source="x", dtype="bfloat16")):
        assert Path(os.environ[compile_cache.VARIABLE]) != folder


COMPILE = """
import sys
from pathlib import Path
from types import SimpleNamespace
import torch
from torch._dynamo.utils import counters
from farm.pipelines.catalog import Pipeline
from farm.pipelines.runtime.compiling import compile_pipe
from farm.pipelines.runtime.compile_cache import graphs_kept
from farm.pipelines.disk_cache import configure

class Toy(torch.nn.Module):
    def forward(self, x):
        return (torch.sin(x) * torch.exp(x)).cumsum(0) + x.relu()

configure(Path(sys.argv[1]))
torch.set_num_threads(1)
pipe = SimpleNamespace(transformer=Toy())
with graphs_kept("x", Pipeline(source="x")), torch.no_grad():
    compile_pipe(pipe, "default")
    y = pipe.transformer.forward(torch.linspace(-3, 3, 4096))
cache = counters["aot_autograd"]
print(cache["autograd_cache_hit"], cache["autograd_cache_miss"], y.numpy().tobytes().hex())
"""


def compiled(cache: Path) -> tuple[int, int, str]:
    """Compile in a separate process. Return the graphs found and compiled, and their result."""
    inherited = {name: value for name, value in os.environ.items() if "INDUCTOR" not in name}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(cache)],
        env=inherited | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found, made, content = done.stdout.split()
    return int(found), int(made), content


def test_a_second_process_finds_what_inductor_compiled(tmp_path: Path) -> None:
    found, made, cold = compiled(tmp_path / "cache")
    assert (found, made) == (0, 1)
    found, made, warm = compiled(tmp_path / "cache")
    assert (found, made) == (1, 0)
    assert warm == cold


@pytest.mark.slow
@pytest.mark.timeout(1200)  # a compiler needs a minute or two of one core
def test_a_second_start_takes_a_fifth_of_the_first_and_gives_the_same_picture() -> None:
    [row] = measure()
    assert row.cold.found == 0 < row.cold.compiled
    assert (row.warm.found, row.warm.compiled) == (row.cold.compiled, 0)
    assert row.is_same_picture
    assert row.share <= 0.2, row
