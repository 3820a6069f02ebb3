"""Row o: what fifty open dashboards cost the calls of the same API process."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from farm.store import keys
from farm.store.engine import transaction
from tests.benchmarks.clients import BODY
from tests.benchmarks.figures import Ratio, Row, Series, percentile
from tests.benchmarks.stand import ROOT, TENANT, BenchFarm, BenchServers
from tests.support.large_farm import copy_job, fail_attempts, let_a_million_frames_end, vacuum

TABS, OPENING_SECONDS = 50, 6.0
TENANTS, PEOPLE = 5, 5
"""Tenants whose users look at their own jobs; operators who look at all."""
CLIENTS, CALLS_A_SECOND = 4, 40.0
SECONDS, TURNS = 30.0, 3
MOST_SLOWER, MOST_PAGE_MS, MOST_PAGE_KB = 1.2, 150.0, 100.0
JOBS, ATTEMPTS = 100_000, 20_000


def rows(stand: BenchServers, short: bool) -> list[Row]:
    """Measure calls of the API, in turn without and with open dashboards."""
    seconds, turns, jobs = (3.0, 1, 1000) if short else (SECONDS, TURNS, JOBS)
    row = Row(
        "o",
        "Fifty open dashboards",
        f"A farm with {jobs:,} jobs, one of a million frames, and {ATTEMPTS:,} failed attempts, on"
        f" one API process by `farm api`. {CLIENTS} clients make {CALLS_A_SECOND:g} calls a second"
        f" for {seconds:g} s: submit a job, get it, list the newest. In turn without and with"
        f" {TABS} tabs of {PEOPLE} operators and {TENANTS} tenants, updated as their pages say:"
        " overview, jobs, lane, failures, and pages of the large job, which runs.",
    )
    calls: dict[str, list[float]] = {"without": [], "with": []}
    page_ms, page_kb, statuses = [], [], Counter[int]()
    with stand.site() as site, site.api() as (url, key):
        pages = [*fill(site, jobs)]
        measured(url, key, min(seconds, 5.0))  # the first calls import modules
        for _ in range(turns):
            calls["without"].append(percentile(measured(url, key, seconds), 99))
            with open_tabs(url, pages) as closed:
                calls["with"].append(percentile(measured(url, key, seconds), 99))
                answers = closed()
            page_ms.append(percentile([1000 * each[3] for each in answers], 95))
            page_kb.append(max(each[2] for each in answers) / 1000)
            statuses.update(each[1] for each in answers)
    row.series += [
        *(Series(f"p99 of calls {name} dashboards", found, "ms") for name, found in calls.items()),
        Series("p95 of pages", page_ms, "ms"),
        Series("largest page", page_kb, "kB"),
    ]
    ratios = [after / before for before, after in zip(*calls.values(), strict=True)]
    goals: tuple[float | None, ...] = (None,) * 3 if short else (MOST_SLOWER, 1.0, 1.0)
    row.ratios += [
        Ratio("calls with ÷ without", ratios, most=goals[0]),
        Ratio("pages ÷ 150 ms", [each / MOST_PAGE_MS for each in page_ms], most=goals[1]),
        Ratio("page ÷ 100 kB", [each / MOST_PAGE_KB for each in page_kb], most=goals[2]),
    ]
    row.notes.append(
        f"{statuses.total():,} updates of tabs: {statuses[304]:,} without news (304), "
        f"{statuses[200]:,} with."
    )
    if len({each[0] for each in answers}) < len({path for _, path in pages}):
        row.problems.append("Some pages were never updated.")
    if wrong := statuses.keys() - {200, 304}:
        row.problems.append(f"Pages answered {sorted(wrong)}.")
    return [row]


def fill(site: BenchFarm, jobs: int) -> Iterator[tuple[str, str]]:
    """Give the farm its history. Yield the key and the address of each tab."""
    small = site.submit(pipeline="device", prompts=["a red star " * 20], step_seconds=0.0)
    copy_job(site.farm, jobs)
    large = site.submit(pipeline="device", prompts=["a moon"], images_per_prompt=1_000_000)
    let_a_million_frames_end(site.farm, large)
    fail_attempts(site.farm, ATTEMPTS)
    vacuum(site.farm)
    owners = [TENANT, *(f"tenant {number}" for number in range(1, TENANTS))]
    with transaction(site.farm.store) as connection:
        seers = [keys.create_key(connection, "ops", "operator")[1] for _ in range(PEOPLE)]
        users = [keys.create_key(connection, name, "client")[1] for name in owners]
    of_operators = ("/", "/jobs", "/lanes/device", "/failures", f"/jobs/{large}")
    of_tenants = ("/jobs", "/jobs?status=succeeded")
    of_owner = (*of_tenants, f"/jobs/{large}", f"/jobs/{small}", f"/jobs/{large}/frames")
    for number in range(TABS // 2):
        yield seers[number % PEOPLE], of_operators[number // PEOPLE % len(of_operators)]
        paths = of_tenants if number % TENANTS else of_owner
        yield users[number % TENANTS], paths[number // TENANTS % len(paths)]


@contextmanager
def open_tabs(
    url: str, pages: list[tuple[str, str]]
) -> Iterator[Callable[[], list[tuple[str, int, int, float]]]]:
    """Open the tabs in another process. Yield a function that closes them."""
    at = urlsplit(url)
    words = {"host": at.hostname, "port": at.port, "pages": pages}
    argv = [sys.executable, "-m", "tests.benchmarks.tabs", json.dumps(words)]
    with subprocess.Popen(
        argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        time.sleep(OPENING_SECONDS)  # all tabs are open

        def closed() -> list[tuple[str, int, int, float]]:
            told, _ = process.communicate()
            return [tuple(each) for each in json.loads(told)]

        yield closed


def measured(url: str, key: str, seconds: float) -> list[float]:
    """Make calls at a steady pace. Return the milliseconds of each."""
    found: list[float] = []
    threads = [
        threading.Thread(target=call, args=(url, key, seconds, number, found))
        for number in range(CLIENTS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def call(url: str, key: str, seconds: float, number: int, found: list[float]) -> None:
    """Submit a job, get it, and list the newest, in turn."""
    at = urlsplit(url)
    connection = http.client.HTTPConnection(str(at.hostname), at.port or 80, timeout=60)
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    body = json.dumps({**BODY, "pipeline": "device", "step_seconds": 0.0})
    pause = CLIENTS / CALLS_A_SECOND
    job, began = str(uuid.UUID(int=0)), time.monotonic()
    due = began + pause * number / CLIENTS
    turn = 0
    while due < began + seconds:
        time.sleep(max(0.0, due - time.monotonic()))
        asked = [("POST", "/v1/jobs", body), ("GET", f"/v1/jobs/{job}", None)]
        way, path, content = [*asked, ("GET", "/v1/jobs?limit=15", None)][turn % 3]
        started = time.monotonic()
        connection.request(way, path, content, headers)
        answer = connection.getresponse()
        told: Any = json.loads(answer.read())
        found.append(1000 * (time.monotonic() - started))
        assert answer.status < http.HTTPStatus.BAD_REQUEST, told
        job = told["id"] if way == "POST" else job
        turn, due = turn + 1, max(due + pause, time.monotonic())
    connection.close()
