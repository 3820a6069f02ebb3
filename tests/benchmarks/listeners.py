"""Row n: thousands of streams and waiting calls on one API process, while events are committed."""

from __future__ import annotations

import json
import random
import socket
import struct
import subprocess
import sys
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from farm.errors import Conflict
from farm.services import steering
from tests.benchmarks.figures import Ratio, Row, Series, percentile
from tests.benchmarks.stand import ROOT, BenchFarm, BenchServers
from tests.benchmarks.submission import submitted

JOBS, STREAMS, WAITING = 400, 2_000, 500
EVENTS_A_SECOND = 100
CLIENTS = 2
"""Clients that submit one after the other."""
SECONDS = 20.0
TURNS = 3
MOST_LATE, MOST_MIB, MOST_STATEMENTS, MOST_SLOWER = 500.0, 300.0, 20.0, 1.5
"""Goals: lateness in ms, memory, statements a second, and the times of submissions as a ratio."""
UNITS = {
    "lateness": "ms",
    "statements": "a second",
    "memory": "MiB",
    "submissions without listeners": "ms",
    "submissions with listeners": "ms",
}
COMMITTED = """
SELECT id, job_id, extract(epoch FROM at)::float8 FROM events
WHERE job_id = ANY(%s) AND id > %s ORDER BY id
"""


def rows(stand: BenchServers, short: bool) -> list[Row]:
    """Measure one API process, first without and then with listeners."""
    share = 20 if short else 1
    seconds = 2.0 if short else SECONDS
    streams, waiting = STREAMS // share, WAITING // share
    row = Row(
        "n",
        "Streams and waiting calls",
        f"{streams:,} streams of {JOBS // share} jobs and {waiting} calls that wait for one of them"
        " on one API process, by `farm api`. "
        f"{EVENTS_A_SECOND} events of these jobs are committed a second, for {seconds:g} s, while a"
        f" null worker renders a bulk job and {CLIENTS} clients submit jobs. Lateness is from an"
        " event's time in Postgres until the client has read it, 95th percentile. Of submissions"
        " the 99th percentile of the answers' times is shown. Statements are counted between the"
        " API and Postgres while no call begins or ends.",
    )
    found: dict[str, list[float]] = defaultdict(list)
    with (
        stand.site(wait_seconds=600) as site,
        statements_of(site) as (direct, count),
        site.api() as (url, key),
    ):
        watched = [
            site.submit(pipeline="device", prompts=["a star"], step_seconds=0.0)
            for _ in range(JOBS // share)
        ]
        with site.worker("null", FARM_DATABASE_URL=direct):
            site.submit(
                pipeline="null",
                prompts=[f"noise {number}" for number in range(1000)],
                images_per_prompt=1000,
                priority="bulk",
                width=32,
                height=32,
                steps=1,
                step_seconds=0.0,
            )
            at = urlsplit(url)
            own = {"host": at.hostname, "port": at.port, "key": key}
            load = {**own, "jobs": list(map(str, watched)), "streams": streams, "waiting": waiting}
            for _ in range(1 if short else TURNS):
                with events(site, watched):
                    found["submissions without listeners"].append(p99(url, key, seconds))
                with listening(load) as ended:
                    first = site.rows("SELECT max(id) FROM events")[0][0]
                    with events(site, watched):
                        found["submissions with listeners"].append(p99(url, key, seconds))
                        before = count()
                        time.sleep(seconds)
                        found["statements"].append((count() - before) / seconds)
                    found["memory"].append(api_mib(int(at.port or 0)))
                    time.sleep(2.0)  # the last events are on their way
                    told = ended()
                committed = site.rows(COMMITTED, watched, first)
                late = judge(row, committed, told, watched, streams)
                found["lateness"].append(percentile(late, 95))
    for name, unit in UNITS.items():
        row.series.append(Series(name, found[name], unit))
    for name, most in (
        ("lateness", MOST_LATE),
        ("statements", MOST_STATEMENTS),
        ("memory", MOST_MIB),
    ):
        ratios = [value / most for value in found[name]]
        row.ratios.append(
            Ratio(f"{name} ÷ {most:g} {UNITS[name]}", ratios, most=None if short else 1.0)
        )
    row.add_ratio(
        "submissions with listeners",
        "submissions without listeners",
        most=None if short else MOST_SLOWER,
    )
    return [row]


def p99(url: str, key: str, seconds: float) -> float:
    """Let clients submit. Return the 99th percentile of their answers' times in ms."""
    told = submitted(url, key, clients=CLIENTS, seconds=seconds)
    return percentile([taken * 1000 for taken, _ in told["answers"]], 99)


def judge(
    row: Row,
    committed: Sequence[tuple[int, uuid.UUID, float]],
    told: dict[str, Any],
    watched: Sequence[uuid.UUID],
    streams: int,
) -> list[float]:
    """Compare what each stream got with the events of its job. Return how late each was, in ms."""
    row.problems += told["failed"]
    times = {event: at for event, _, at in committed}
    of_job: dict[uuid.UUID, list[int]] = defaultdict(list)
    for event, job_id, _ in committed:
        of_job[job_id].append(event)
    got: dict[int, list[int]] = defaultdict(list)
    late = []
    for stream, event, now in told["heard"]:
        got[stream].append(event)
        if event in times:
            late.append((now - times[event]) * 1000)
    wrong = [
        stream
        for stream in range(streams)
        if [each for each in got[stream] if each in times] != of_job[watched[stream % len(watched)]]
    ]
    if wrong:
        row.problems.append(f"{len(wrong)} streams missed events, or got some twice.")
    row.notes.append(
        f"{len(committed):,} events were committed, and the streams got {len(late):,}: each stream "
        "each event of its job, once and in order."
        if not wrong
        else f"{len(committed):,} events were committed."
    )
    return late


@contextmanager
def events(site: BenchFarm, watched: Sequence[uuid.UUID]) -> Iterator[None]:
    """Pause and resume jobs during the block, EVENTS_A_SECOND times a second."""
    ended = threading.Event()

    def commit() -> None:
        chance = random.Random(1)
        paused: set[uuid.UUID] = set()
        began, done = time.monotonic(), 0
        while not ended.is_set():
            job_id = chance.choice(watched)
            try:
                if job_id in paused:
                    paused.discard(job_id)
                    steering.resume(site.farm, site.tenant, job_id)
                else:
                    paused.add(job_id)
                    steering.pause(site.farm, site.tenant, job_id)
            except Conflict:
                continue
            done += 1
            ended.wait(max(0.0, began + done / EVENTS_A_SECOND - time.monotonic()))

    thread = threading.Thread(target=commit)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def listening(load: dict[str, Any]) -> Iterator[Callable[[], dict[str, Any]]]:
    """Run the clients in a process. Yield a function that ends them and returns what they got."""
    argv = [sys.executable, "-m", "tests.benchmarks.listening", json.dumps(load)]
    with subprocess.Popen(
        argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "ready\n"
        pipe, answer = process.stdin, process.stdout

        def ended() -> dict[str, Any]:
            pipe.close()
            told: dict[str, Any] = json.loads(answer.read())
            return told

        try:
            yield ended
        finally:
            process.kill()


def api_mib(port: int) -> float:
    """Return the resident memory of the API process on this port. MiB."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            if f"\0--port\0{port}\0" in (process / "cmdline").read_text():
                [line] = [
                    line
                    for line in (process / "status").read_text().splitlines()
                    if line.startswith("VmRSS:")
                ]
                return int(line.split()[1]) / 1024
    raise AssertionError(f"no API process has port {port}")


@contextmanager
def statements_of(site: BenchFarm) -> Iterator[tuple[str, Callable[[], int]]]:
    """Put a proxy before Postgres, for the site's API.

    Yield Postgres's own address, and a function that counts the statements so far.
    """
    direct = site.env["FARM_DATABASE_URL"]
    address = urlsplit(site.env["FARM_DATABASE_URL"])
    target = (str(address.hostname), int(address.port or 5432))
    listener = socket.create_server(("127.0.0.1", 0))
    counted = [0]

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            server = socket.create_connection(target)
            for one, other, watch in ((client, server, True), (server, client, False)):
                threading.Thread(target=pump, args=(one, other, watch), daemon=True).start()

    def pump(one: socket.socket, other: socket.socket, watch: bool) -> None:
        waiting = b""
        while block := _received(one):
            with suppress(OSError):
                other.sendall(block)
            if not watch:
                continue
            waiting += block
            while len(waiting) >= 5:
                typed = waiting[0] != 0  # the first messages of a connection have no type
                [size] = struct.unpack_from(">I", waiting, int(typed))
                if len(waiting) < size + typed:
                    break
                counted[0] += waiting[:1] in (b"Q", b"E")  # Query, Execute
                waiting = waiting[size + typed :]
        for each in (one, other):
            each.close()

    threading.Thread(target=accept, daemon=True).start()
    host = address.netloc.rpartition("@")[0]
    place = f"127.0.0.1:{listener.getsockname()[1]}"
    site.env["FARM_DATABASE_URL"] = urlunsplit(
        address._replace(netloc=f"{host}@{place}" if host else place)
    )
    try:
        yield direct, lambda: counted[0]
    finally:
        listener.close()


def _received(one: socket.socket) -> bytes:
    try:
        return one.recv(2**16)
    except OSError:
        return b""
