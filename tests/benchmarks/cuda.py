"""Rows h and i: rows a and d again on a CUDA device, with models of the real sizes.

Stable Diffusion 1.5 and SDXL with random weights, eager and compiled: speed depends on shapes, not
on learned values. Without such a device these rows are left out.
"""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from tests.benchmarks import latency
from tests.benchmarks.figures import Row, Series, in_turn
from tests.benchmarks.pictures import TURNS, add_lane, bare, farm_rate
from tests.benchmarks.rivals.loop import Loop
from tests.benchmarks.stand import BenchFarm, BenchServers
from tests.gpu.models import SIZES, Size, save

STEPS = 30
FRAMES = {"sd15": 256, "sdxl": 48}
BATCHES = {"sd15": (4, 8, 16), "sdxl": (1, 2, 4)}
"""Batch sizes that the bare loop tries, to find its fastest."""
LEAST = 0.97
COUNTER = [
    "nvidia-smi",
    "--query-gpu=utilization.gpu",
    "--format=csv,noheader,nounits",
    "--loop-ms=100",
]
"""Command that prints the device's busy share in per cent, ten times a second."""


@dataclass(frozen=True)
class Case:
    """One model, loaded in one way."""

    letter: str
    size: Size
    loop: Loop
    """The bare loop with the fastest batch size."""
    short: bool

    @property
    def name(self) -> str:
        return f"{self.size.name}-compiled" if self.loop.compiled else self.size.name

    @property
    def told(self) -> str:
        way = "compiled" if self.loop.compiled else "eager"
        side = self.size.side
        return f"{self.size.name}, random weights, {side}x{side}, {self.loop.dtype}, {way}."


def rows(letter: str, name: str, stand: BenchServers, short: bool) -> list[Row]:
    """Measure a model, eager and compiled. Return no rows without a CUDA device.

    A short run takes a tiny model, eager, on any device.
    """
    import torch

    there = torch.cuda.is_available()
    if not there and not short:
        return []
    size = SIZES["tiny" if short else name]
    loop = Loop(
        batch=max(size.buckets),
        frames=8 if short else FRAMES[name],
        model=str(save(size, stand.folder.path / size.name)),
        side=size.side,
        steps=2 if short else STEPS,
        guidance=7.5,
        device="cuda" if there else "cpu",
        dtype="float16" if there else "float32",
    )
    if not short:
        rates = {batch: bare(stand, replace(loop, batch=batch)) for batch in BATCHES[name]}
        loop = replace(loop, batch=max(rates, key=lambda batch: rates[batch]))
    ways = [False] if short else [False, True]
    cases = [Case(letter, size, replace(loop, compiled=compiled), short) for compiled in ways]
    for case in cases:
        add_lane(stand.folder.path / "pipelines.toml", case.name, case.loop)
    return [row for case in cases for row in (_pictures(stand, case), _latency(stand, case))]


def _pictures(stand: BenchServers, case: Case) -> Row:
    loop, busy = case.loop, list[float]()
    row = Row(
        case.letter,
        f"Pictures of {case.name} on a device",
        f"{case.told} {loop.frames} pictures in {loop.steps} steps. The best loop has batches of "
        f"{loop.batch} and writes no files. The plain loop renders one by one, encodes with "
        "Pillow's default and uploads each picture before the next. The farm's time is from "
        "submitting until the last picture is durable.",
    )
    plain = replace(loop, batch=1, frames=-(-loop.frames // 8), serial=True)
    with stand.site() as site, site.worker(case.name):
        farm_rate(site, case.name, replace(loop, frames=loop.batch))
        ways = {
            "farm": partial(_farm_rate, site, case, busy),
            "best loop": partial(bare, stand, loop),
            "plain loop": partial(bare, stand, plain),
        }
        row.series = in_turn(ways, 1 if case.short else TURNS, "pictures/s")
    if busy:
        row.series.append(Series("busy by the driver's counter, farm", busy, "%"))
    row.add_ratio("farm", "best loop", least=None if case.short else LEAST)
    row.add_ratio("farm", "plain loop")
    return row


def _farm_rate(site: BenchFarm, case: Case, busy: list[float]) -> float:
    if case.loop.device != "cuda":
        return farm_rate(site, case.name, case.loop)
    with _counting(busy):
        return farm_rate(site, case.name, case.loop)


@contextmanager
def _counting(busy: list[float]) -> Iterator[None]:
    """Add the device's busy share in the block, as counted by its driver."""
    with subprocess.Popen(COUNTER, stdout=subprocess.PIPE, text=True) as counter:
        try:
            yield
        finally:
            counter.terminate()
            told, _ = counter.communicate()
    busy.append(statistics.mean(float(line) for line in told.split()))


def _latency(stand: BenchServers, case: Case) -> Row:
    row = Row(f"{case.letter}2", f"Interactive pictures of {case.name}, on a device", case.told)
    fields = {"width": case.size.side, "height": case.size.side}
    turns, batches, pictures = (1, 4, 2) if case.short else (2, 20, 10)
    work = latency.Work(
        turns, batches, pictures, case.name, case.loop.batch, fields, step_seconds=None
    )
    latency.measure(stand, row, work, case.short)
    return row
