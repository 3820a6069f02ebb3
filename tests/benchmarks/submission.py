"""Row c: submitting one-image jobs over HTTP, and jobs of a million frames."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from socket import create_connection
from urllib.parse import urlsplit

import psycopg

from farm.local.ports import HOST, free_port
from tests.benchmarks.figures import Row, Series, in_turn, percentile
from tests.benchmarks.stand import ROOT, BenchFarm, BenchServers
from tests.support.waiting import wait_until

CLIENTS = 32
SECONDS = 10.0
TURNS = 3
MAX_P99_MS = 250.0
MIN_RATE = 300.0
PROMPTS = 100_000
IMAGES = 10
MIN_BULK = 2.0
KNOWN = "SELECT count(*) FROM jobs WHERE id = ANY(%s)"
KEY = "the-only-key"
CREATE = """
CREATE TABLE plain (job int, ordinal int, seed bigint, prompt text, PRIMARY KEY (job, ordinal))
"""


@dataclass
class Front:
    """An API that takes jobs, and the measurements of its clients."""

    url: str
    key: str
    database: psycopg.Connection[tuple[int]]
    p50: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)
    """99th percentiles in ms, by turn."""
    refused: int = 0
    lost: int = 0

    def rate(self, seconds: float) -> float:
        """Let the clients submit for this time. Return accepted jobs per second."""
        at = urlsplit(self.url)
        words = [str(at.hostname), str(at.port), self.key, str(CLIENTS), str(seconds)]
        done = subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.clients", *words],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            check=True,
        )
        told = json.loads(done.stdout)
        times = [taken * 1000 for taken, _ in told["answers"]]
        accepted = [uuid.UUID(job_id) for _, job_id in told["answers"] if job_id]
        self.refused += len(times) - len(accepted)
        there = self.database.execute(KNOWN, (accepted,)).fetchone()
        self.lost += len(accepted) - (there[0] if there else 0)
        self.p50.append(percentile(times, 50))
        self.p99.append(percentile(times, 99))
        return len(accepted) / float(told["seconds"])


def rows(stand: BenchServers, short: bool) -> list[Row]:
    """Measure both."""
    with stand.site() as site:
        return [over_http(stand, site, short), in_bulk(site, short)]


def over_http(stand: BenchServers, site: BenchFarm, short: bool) -> Row:
    """Measure one-image jobs of many clients at once."""
    seconds, turns = (1.0, 1) if short else (SECONDS, TURNS)
    row = Row(
        "c",
        "Submitting one-image jobs over HTTP",
        f"{CLIENTS} clients, each with its own connection, submit for {seconds:.0f} s in a turn, "
        "from another process of the same machine. The plain service is FastAPI that checks a key "
        "and commits one row. Like the farm's API, it is one uvicorn process.",
    )
    with site.api() as (url, key), plain_api(stand) as plain:
        fronts = {"farm": Front(url, key, site.connection), "plain service": plain}
        for front in fronts.values():
            front.rate(0.5)
            front.p50.clear()
            front.p99.clear()
        ways = {name: partial(front.rate, seconds) for name, front in fronts.items()}
        row.series = in_turn(ways, turns, "jobs/s")
    for name, front in fronts.items():
        row.series += [
            Series(f"p50, {name}", front.p50, "ms"),
            Series(f"p99, {name}", front.p99, "ms"),
        ]
        if front.refused or front.lost:
            row.problems.append(f"{name}: {front.refused} refused, {front.lost} lost")
    row.add_ratio("farm", "plain service")
    rate, p99 = row.named("farm").median, row.named("p99, farm").median
    if not short:
        well = rate >= MIN_RATE and p99 <= MAX_P99_MS
        line = (
            f"{rate:.0f} jobs/s and a p99 of {p99:.0f} ms; the goal on two cores is at least "
            f"{MIN_RATE:.0f} and at most {MAX_P99_MS:.0f} ms."
        )
        (row.notes if well else row.problems).append(line)
    return row


@contextmanager
def plain_api(stand: BenchServers) -> Iterator[Front]:
    """Run the plain service on its own database."""
    from tests.benchmarks.rivals import plain_api as service

    port, database_url = free_port(), stand.database("plain")
    argv = [sys.executable, "-m", "uvicorn", "tests.benchmarks.rivals.plain_api:app"]
    argv += ["--host", HOST, "--port", str(port), "--no-access-log", "--log-level", "warning"]
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(service.CREATE)
        connection.execute("INSERT INTO keys VALUES (%s)", (KEY,))
        with stand.python("plain", argv, {"BENCH_DATABASE_URL": database_url}):
            front = Front(f"http://{HOST}:{port}", KEY, connection)
            wait_until(lambda: _serves(port), 60.0, "the plain service was up")
            yield front


def _serves(port: int) -> bool:
    with suppress(OSError), create_connection((HOST, port), timeout=1):
        return True
    return False


def in_bulk(site: BenchFarm, short: bool) -> Row:
    """Measure one job of a million frames, and copying one row per frame into a table."""
    prompts, turns = (1_000, 1) if short else (PROMPTS, TURNS)
    row = Row(
        "c2",
        "Submitting a million frames",
        f"One job of {prompts:,} prompts with {IMAGES} images each, checked and stored. Compared "
        "with one row per frame (job, ordinal, seed, prompt), by COPY into a table with a primary "
        "key.",
    )
    site.connection.execute(CREATE)
    turn = iter(range(turns))
    ways = {
        "farm": lambda: bulk_rate(site, prompts),
        "COPY": lambda: copy_rate(site, next(turn), prompts),
    }
    row.series = in_turn(ways, turns, "frames/s")
    row.add_ratio("farm", "COPY", least=None if short else MIN_BULK)
    return row


def bulk_rate(site: BenchFarm, prompts: int) -> float:
    texts = [f"a red star, number {number}" for number in range(prompts)]
    started = time.monotonic()
    job_id = site.submit(pipeline="null", prompts=texts, images_per_prompt=IMAGES, steps=1)
    seconds = time.monotonic() - started
    assert site.rows("SELECT total FROM jobs WHERE id = %s", job_id)[0][0] == prompts * IMAGES
    return prompts * IMAGES / seconds


def copy_rate(site: BenchFarm, job: int, prompts: int) -> float:
    started = time.monotonic()
    with site.connection.cursor() as cursor, cursor.copy("COPY plain FROM STDIN") as copy:
        for ordinal in range(prompts * IMAGES):
            number = ordinal // IMAGES
            copy.write_row((job, ordinal, ordinal, f"a red star, number {number}"))
    return prompts * IMAGES / (time.monotonic() - started)
