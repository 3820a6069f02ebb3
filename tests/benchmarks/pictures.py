"""Rows a, a2 and a3: pictures per second of real loops, and the busy share of a device."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from farm.local import commands
from farm.process import cores
from tests.benchmarks.figures import Row, in_turn
from tests.benchmarks.rivals.loop import PROMPT, Loop
from tests.benchmarks.stand import ROOT, BenchFarm, BenchServers
from tests.gpu.models import SIZES, save

FRAMES = 512
BATCHES = (4, 8, 16, 32)
"""Batch sizes that the bare loop tries, to find its fastest."""
LEAST = 0.95
REAL_BATCH, REAL_FRAMES, REAL_SIDE = 2, 4, 256
STEPS = 20
STEP_SECONDS = 0.015
SIDE = 1024
BUCKET = 4
DEVICE_BATCHES = 100
MIN_BUSY = 0.97
TURNS = 3
BOOKS = "SELECT sum(denoise_seconds), sum(work_seconds) FROM workers"


def rows(stand: BenchServers, short: bool) -> list[Row]:
    """Measure on the demo's pipeline, on a simulated device, and with weights of a real size."""
    return [demo(stand, short), device(stand, short), real_size(stand, short)]


def demo(stand: BenchServers, short: bool) -> Row:
    """Measure the demo's pipeline on the CPU, with every core."""
    frames, turns, threads = (8, 1, 1) if short else (FRAMES, TURNS, cores())
    batches = (8,) if short else BATCHES
    best = batches[0] if short else best_batch(stand, frames // 4, threads)
    row = Row(
        "a",
        "Pictures of the demo's pipeline",
        f"{frames} pictures of 64x64, 25 steps, {threads} torch threads each. The best loop has "
        f"batches of {best}, which was the fastest of {', '.join(map(str, batches))}, and writes "
        "no files. The plain loop renders one by one, encodes with Pillow's default and uploads "
        "each picture before the next. The farm's job has the bucket of the best loop. Its time "
        "is from submitting until the last picture is durable.",
    )
    settings = {"FARM_TORCH_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    with stand.site() as site, site.worker("demo", **settings):
        of_farm = partial(farm_rate, site, "demo")
        of_farm(Loop(best, best))
        ways = {
            "farm": partial(of_farm, Loop(best, frames)),
            "best loop": partial(bare, stand, Loop(best, frames, threads)),
            "plain loop": partial(bare, stand, Loop(1, frames // 4, threads, serial=True)),
        }
        row.series = in_turn(ways, turns, "pictures/s")
    row.add_ratio("farm", "best loop", least=None if short else LEAST)
    row.add_ratio("farm", "plain loop")
    return row


def best_batch(stand: BenchServers, frames: int, threads: int) -> int:
    """Find the fastest batch size of a bare loop."""
    rates = {batch: bare(stand, Loop(batch, frames, threads)) for batch in BATCHES}
    return max(rates, key=lambda batch: rates[batch])


def bare(stand: BenchServers, loop: Loop) -> float:
    """Measure a bare loop's pictures per second, in whole batches."""
    frames = -(-loop.frames // loop.batch) * loop.batch
    env = {
        **commands.environment(stand.folder, stand.servers.env),
        "PYTHONPATH": str(ROOT),
        **({"OMP_NUM_THREADS": str(loop.threads)} if loop.threads else {}),
    }
    told = json.dumps(asdict(replace(loop, frames=frames)))
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.rivals.loop", told],
        env=env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    return frames / float(done.stdout.splitlines()[-1])


def farm_rate(site: BenchFarm, pipeline: str, loop: Loop) -> float:
    """Measure the farm's pictures per second. It renders the same pictures as a loop."""
    started = time.time()
    job_id = site.submit(
        pipeline=pipeline,
        prompts=[PROMPT],
        images_per_prompt=loop.frames,
        seed=0,
        width=loop.side,
        height=loop.side,
        steps=loop.steps,
        guidance_scale=loop.guidance,
        bucket=loop.batch,
        priority="bulk",
    )
    return loop.frames / site.seconds(started, job_id, loop.frames)


def real_size(stand: BenchServers, short: bool) -> Row:
    """Measure a model of the size of Stable Diffusion 1.5 on the CPU, with every core."""
    size, turns, threads = SIZES["tiny" if short else "sd15"], 1 if short else TURNS, cores()
    loop = Loop(
        batch=REAL_BATCH,
        frames=REAL_BATCH if short else REAL_FRAMES,
        threads=threads,
        model=str(save(size, stand.folder.path / size.name)),
        side=64 if short else REAL_SIDE,
        steps=2,
        guidance=7.5,
    )
    row = Row(
        "a3",
        "Pictures of a model of a real size on the CPU",
        f"{size.name} with random weights. {loop.frames} pictures of {loop.side}x{loop.side} in "
        f"{loop.steps} steps, batches of {loop.batch}, {threads} torch threads each. The loop "
        "writes no files. The farm's time is from submitting until the last picture is durable.",
    )
    lane = f"a3-{size.name}"
    add_lane(stand.folder.path / "pipelines.toml", lane, loop)
    settings = {"FARM_TORCH_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    with stand.site() as site, site.worker(lane, **settings):
        farm_rate(site, lane, replace(loop, frames=loop.batch))
        ways = {
            "farm": partial(farm_rate, site, lane, loop),
            "loop": partial(bare, stand, loop),
        }
        row.series = in_turn(ways, turns, "pictures/s")
    row.add_ratio("farm", "loop", least=None if short else LEAST)
    return row


def add_lane(catalog: Path, name: str, loop: Loop) -> None:
    """Add a pipeline to the catalog that renders a loop's pictures in its batches."""
    with catalog.open("a") as file:
        file.write(
            f"\n[pipelines.{name}]\nsource = {json.dumps(loop.model)}\n"
            f'device = "{loop.device}"\ndtype = "{loop.dtype}"\n'
            f'compile = "{"default" if loop.compiled else ""}"\n'
            f'bucket = {{ "default" = {loop.batch} }}\n'
        )


def device(stand: BenchServers, short: bool) -> Row:
    """Measure a simulated device. Its steps wait and use no CPU."""
    batches, turns = (4, 1) if short else (DEVICE_BATCHES, TURNS)
    row = Row(
        "a2",
        "A simulated device",
        f"{batches} batches of {BUCKET} pictures of {SIDE}x{SIDE}, like photographs; a batch is "
        f'{STEPS} steps that wait {STEP_SECONDS * 1000:.0f} ms each. For "alone", the steps wait '
        "in a plain loop. The farm encodes and stores every picture. Its time is from submitting "
        "until the last one is durable.",
    )
    with stand.site() as site, site.worker("photo"):
        device_seconds(site, 1)
        before = site.rows(BOOKS)[0]
        ways = {
            "alone": partial(alone, batches),
            "farm": partial(device_seconds, site, batches),
        }
        row.series = in_turn(ways, turns, "s")
        after = site.rows(BOOKS)[0]
    row.add_ratio("alone", "farm", what="busy (alone ÷ farm)", least=None if short else MIN_BUSY)
    share = (after[0] - before[0]) / (after[1] - before[1])
    row.notes.append(
        f"By the worker's own account the device was busy for {share:.1%} of the time."
    )
    return row


def alone(batches: int) -> float:
    """Measure the seconds of the steps in a plain loop."""
    started = time.monotonic()
    for _ in range(batches * STEPS):
        time.sleep(STEP_SECONDS)
    return time.monotonic() - started


def device_seconds(site: BenchFarm, batches: int) -> float:
    """Measure the seconds from submitting the batches to the last one's commit."""
    started, frames = time.time(), batches * BUCKET
    job_id = site.submit(
        pipeline="photo",
        prompts=["a photograph"],
        images_per_prompt=frames,
        width=SIDE,
        height=SIDE,
        steps=STEPS,
        step_seconds=STEP_SECONDS,
        priority="bulk",
        bucket=BUCKET,
    )
    return site.seconds(started, job_id, frames)
