"""Row p: a table whose lines differ in steps and size, compared with lines that agree.

Frames are null renders without a time for their steps. All pictures are discarded, and all sizes
have the same number of pixels. So what differs is the work of the farm.
"""

from __future__ import annotations

import itertools
import json
import random
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from farm.local import commands
from farm.process import cores
from tests.benchmarks.bulk import MAX_MEMORY, WORDS, Command, memory_of
from tests.benchmarks.figures import Row, Series, in_turn
from tests.benchmarks.stand import BenchServers, wait_closely

LINES = 300_000
SHORT = 4_000
SIZES = ((32, 32), (16, 64), (64, 16), (8, 128), (128, 8))
STEPS = range(1, 9)
SORTED, AGREED, ACCEPTED = 0.9, 0.8, 0.5
"""Least ratios of shuffled lines: to sorted ones, to lines that agree; accepted, to plain ones."""
MAX_API_MEMORY = 150.0
"""Memory that the API may take while it reads a table, in MB, besides what it has at first."""

CLOSE = "UPDATE jobs SET open = false WHERE id = %s"
DONE = "SELECT succeeded FROM jobs WHERE id = %s"
TOOK = "SELECT extract(epoch FROM finished_at - started_at) FROM jobs WHERE id = %s"
Line = dict[str, str | int]


def rows(stand: BenchServers, short: bool) -> list[Row]:
    """Submit the three tables in turn, and render each to its end."""
    count = SHORT if short else LINES
    row = Row(
        "p",
        "A table with 40 settings",
        f"{count:,} lines with distinct prompts, in 8 numbers of steps and 5 sizes of equal area. "
        "They are null renders, with a worker for every core; their pictures are discarded. The "
        "same lines are shuffled and sorted. Lines that agree all have 4 steps and the first size; "
        "plain lines leave both to the job, and are only submitted. Measured is the time from the "
        "first claim to the end; accepted is measured as in row g.",
    )
    tables = {"shuffled": _lines(count)}
    agreed: Line = {"steps": 4, "width": SIZES[0][0], "height": SIZES[0][1]}
    tables["agreeing"] = [line | agreed for line in tables["shuffled"]]
    tables["sorted"] = sorted(tables["shuffled"], key=lambda line: (line["steps"], line["width"]))
    tables["plain"] = [{"prompt": line["prompt"]} for line in tables["shuffled"]]
    accepted: dict[str, list[float]] = {name: [] for name in tables}
    numbers = itertools.count()
    with stand.site(discard_images=True) as site, site.api() as (url, key), memory_of(url) as api:
        env = commands.environment(
            stand.folder, {**site.env, "FARM_API_URL": url, "FARM_API_KEY": key}
        )
        command = Command(env)
        begun = api.most()

        def submitted(name: str) -> str:
            number = next(numbers)
            path = _written(stand.folder.path / f"{name}-{number}.jsonl", tables[name], number)
            started = time.monotonic()
            job_id = command.submit(path, f"{name}-{number}")
            accepted[name].append(count / (time.monotonic() - started))
            return job_id

        def rendered(name: str) -> float:
            if name == "shuffled":  # compared with it, in each turn
                site.connection.execute(CLOSE, (submitted("plain"),))
            job_id = submitted(name)
            site.connection.execute("VACUUM ANALYZE")
            with ExitStack() as workers:
                for _ in range(cores()):
                    workers.enter_context(site.worker_at_work("null"))
                wait_closely(lambda: site.rows(DONE, job_id) == [(count,)], "all are done")
            return count / float(site.rows(TOOK, job_id)[0][0])

        turns = 1 if short else 3
        names = [name for name in tables if name != "plain"]
        row.series = in_turn({name: partial(rendered, name) for name in names}, turns, "frames/s")
        row.series += [
            Series(f"accepted: {name}", found, "lines/s") for name, found in accepted.items()
        ]
        row.series.append(Series("the command's memory", command.memory, "MB"))
        row.series.append(Series("what the API's memory grew by", [api.most() - begun], "MB"))
    if not short:
        row.add_ratio("shuffled", "sorted", least=SORTED)
        row.add_ratio("shuffled", "agreeing", least=AGREED)
        row.add_ratio("accepted: shuffled", "accepted: plain", least=ACCEPTED)
        if max(command.memory) > MAX_MEMORY:
            row.problems.append(f"the command took {max(command.memory):.0f} MB")
        if api.last - begun > MAX_API_MEMORY:
            row.problems.append(f"the API took {api.last - begun:.0f} MB more")
    return [row]


def _lines(count: int) -> list[Line]:
    drawn = random.Random(7)
    settings = list(itertools.product(STEPS, SIZES))
    found: list[Line] = []
    for number in range(count):
        steps, (width, height) = drawn.choice(settings)
        prompt = f"{' '.join(drawn.choices(WORDS, k=12))}, number {number}"
        found.append({"prompt": prompt, "steps": steps, "width": width, "height": height})
    return found


def _written(path: Path, lines: list[Line], number: int) -> Path:
    """Write a table. Its first line differs each time: equal lines would be the same input."""
    first = {**lines[0], "prompt": f"the first of {number}"}
    with path.open("w") as file:
        file.writelines(json.dumps(line) + "\n" for line in [first, *lines[1:]])
    return path
