"""Rows c and l: submitting one-image jobs over HTTP, and jobs of a million frames."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from socket import create_connection
from typing import Any
from urllib.parse import urlsplit

import psycopg

from farm.local.ports import HOST, free_port
from tests.benchmarks.figures import Row, Series, in_turn, percentile
from tests.benchmarks.stand import ROOT, BenchFarm, BenchServers
from tests.support.waiting import wait_until

CLIENTS = 32
SECONDS = 10.0
TURNS = 3
MIN_OF_PLAIN, MAX_P99 = 0.6, 3.0
"""Goals, as ratios to the plain service: the rate, and the 99th percentile of an answer's time."""
BATCH, BATCH_CLIENTS = 100, 2
MIN_BATCH = 5.0
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

    def rate(self, seconds: float, batch: int = 1) -> float:
        """Let the clients submit for this time. Return accepted jobs per second."""
        clients = CLIENTS if batch == 1 else BATCH_CLIENTS
        told = submitted(self.url, self.key, clients=clients, seconds=seconds, batch=batch)
        times = [taken * 1000 for taken, _ in told["answers"]]
        accepted = [uuid.UUID(job_id) for _, job_id in told["answers"] if job_id]
        self.refused += len(times) - len(accepted)
        there = self.database.execute(KNOWN, (accepted,)).fetchone()
        self.lost += len(accepted) - (there[0] if there else 0)
        self.p50.append(percentile(times, 50))
        self.p99.append(percentile(times, 99))
        return len(accepted) / float(told["seconds"])


def submitted(url: str, key: str, **load: Any) -> dict[str, Any]:
    """Let clients submit from another process; see clients.Load. Return what they print."""
    at = urlsplit(url)
    words = json.dumps({"host": at.hostname, "port": at.port, "key": key, **load})
    argv = [sys.executable, "-m", "tests.benchmarks.clients", words]
    done = subprocess.run(argv, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def rows(stand: BenchServers, short: bool) -> list[Row]:
    """Measure single jobs, batches of jobs, and one large job."""
    with stand.site() as site:
        return [over_http(stand, site, short), in_batches(site, short), in_bulk(site, short)]


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
    goals = (None, None) if short else (MIN_OF_PLAIN, MAX_P99)
    row.add_ratio("farm", "plain service", least=goals[0])
    row.add_ratio("p99, farm", "p99, plain service", most=goals[1])
    return row


def in_batches(site: BenchFarm, short: bool) -> Row:
    """Measure one-image jobs in batches, and single ones."""
    seconds, turns = (1.0, 1) if short else (SECONDS, TURNS)
    row = Row(
        "l",
        "Submitting one-image jobs in batches",
        f"{BATCH_CLIENTS} clients call POST /v1/jobs/batch with {BATCH} jobs each time, for "
        f"{seconds:.0f} s in a turn. Compared with {CLIENTS} clients that send one job a call.",
    )
    with site.api() as (url, key):
        front = Front(url, key, site.connection)
        front.rate(0.5)
        ways = {
            "batches": partial(front.rate, seconds, BATCH),
            "single jobs": partial(front.rate, seconds),
        }
        row.series = in_turn(ways, turns, "jobs/s")
    if front.refused or front.lost:
        row.problems.append(f"{front.refused} refused, {front.lost} lost")
    row.add_ratio("batches", "single jobs", least=None if short else MIN_BATCH)
    return row


@contextmanager
def plain_api(stand: BenchServers, env: Mapping[str, str] | None = None) -> Iterator[Front]:
    """Run the plain service on its own database, or with the variables `env`."""
    from tests.benchmarks.rivals import plain_api as service

    port = free_port()
    given = env or {"BENCH_DATABASE_URL": stand.database("plain")}
    argv = [sys.executable, "-m", "uvicorn", "tests.benchmarks.rivals.plain_api:app"]
    argv += ["--host", HOST, "--port", str(port), "--no-access-log", "--log-level", "warning"]
    with psycopg.connect(given["BENCH_DATABASE_URL"], autocommit=True) as connection:
        connection.execute(service.CREATE)
        connection.execute("INSERT INTO keys VALUES (%s)", (KEY,))
        with stand.python("plain", argv, given):
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
