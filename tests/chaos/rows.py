"""The faults: each row of the table is a function that injects one fault once."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import redis
from pydantic import SecretStr

from farm.bells import RENDER_TASK, lane, make_app
from farm.config import Settings
from tests.chaos import clock, release
from tests.chaos.load import NULL, Load
from tests.chaos.proxy import Fault, Freeze, Refuse, Reset, Slow, Stall, Swallow, Truncate
from tests.chaos.receivers import bad_receivers
from tests.chaos.scene import ChaosRun, Skipped
from tests.chaos.stack import LEASE_SECONDS, Process

Around = Callable[[ChaosRun], AbstractContextManager[None]]


@dataclass(frozen=True)
class Row:
    """A fault, and the function that injects it."""

    number: int
    fault: str
    inject: Callable[[ChaosRun], None]
    around: Around
    """Context around all injections, for example an extra worker or a check at the end."""
    steady: bool
    """True if jobs are submitted during the fault. If False, each injection submits one job to an
    idle lane, where only a bell can wake a worker."""
    most: int
    """Maximum number of injections, for a fault that takes long."""
    mixes: bool
    """True if row 20 may choose it at random."""


ROWS: dict[int, Row] = {}


def row(
    number: int,
    fault: str,
    *,
    around: Around = lambda _scene: nullcontext(),
    steady: bool = True,
    most: int = 1000,
    mixes: bool = True,
) -> Callable[[Callable[[ChaosRun], None]], Callable[[ChaosRun], None]]:
    """Add a function to the table."""

    def enter(inject: Callable[[ChaosRun], None]) -> Callable[[ChaosRun], None]:
        ROWS[number] = Row(number, fault, inject, around, steady, most, mixes)
        return inject

    return enter


@contextmanager
def late_results(scene: ChaosRun) -> Iterator[None]:
    """Check that at least one result was too late. Without one, the row tested nothing."""
    before = scene.truth.dropped()
    yield
    if scene.truth.dropped() == before:
        scene.problems.append("no worker came back with a late result")


def valkey(scene: ChaosRun) -> redis.Redis:
    return redis.Redis.from_url(scene.stack.servers.redis_url, socket_timeout=5)


@row(1, "A worker is killed in the middle of a batch")
def worker_killed(scene: ChaosRun) -> None:
    nulls = scene.stack.workers("null")
    scene.rendering([*nulls, *nulls, *scene.stack.workers("demo")]).restart()


@row(2, "Workers are killed with a bell in their sockets", steady=False)
def killed_with_a_bell(scene: ChaosRun) -> None:
    workers = scene.stack.workers("null")
    for worker in workers:
        worker.signal(signal.SIGSTOP)
    scene.load.null(scene.random.randint(4, 16))
    scene.pause(0.1, 0.5)
    for worker in workers:
        worker.restart()


@row(3, "A worker is stopped for longer than its lease, then goes on", around=late_results)
def zombie(scene: ChaosRun) -> None:
    worker = scene.storing(scene.stack.workers("null"))
    worker.signal(signal.SIGSTOP)
    try:
        scene.wait(lambda: worker.pid not in scene.truth.holders(), "its lease expired")
        scene.pause(0.3, 0.8)  # in that time another worker claims the frames
    finally:
        worker.signal(signal.SIGCONT)


@row(4, "Redis is wiped, again and again")
def redis_wiped(scene: ChaosRun) -> None:
    with valkey(scene) as client:
        client.flushall()
    scene.pause(0.3, 0.8)


@row(5, "Redis is killed, and a job submitted before it is back", steady=False)
def redis_killed(scene: ChaosRun) -> None:
    server = scene.stack.processes["valkey"]
    server.end()
    scene.load.null(scene.random.randint(4, 16))
    server.start()


@row(6, "Redis is full", steady=False)
def redis_full(scene: ChaosRun) -> None:
    with valkey(scene) as client:
        client.config_set("maxmemory", 1)
        try:
            scene.load.null(scene.random.randint(4, 16))
            scene.pause(0.1, 0.5)
        finally:
            client.config_set("maxmemory", 0)


@row(7, "Every connection to Redis is half-open", steady=False, most=20)
def redis_half_open(scene: ChaosRun) -> None:
    links = scene.stack.links("valkey")
    for link in links:
        link.begin(Freeze())
        link.heal()
    scene.load.null(scene.random.randint(4, 16))


@row(8, "Postgres crashes")
def postgres_crashes(scene: ChaosRun) -> None:
    scene.stack.processes["postgres"].restart(signal.SIGQUIT)
    scene.stack.processes["postgres"].ready()


@row(9, "The reply to a COMMIT is lost")
def commit_unanswered(scene: ChaosRun) -> None:
    kind = scene.random.choice(["worker", "worker", "api", "janitor"])
    owners = [name for name in scene.stack.processes if name.startswith(kind)]
    links = scene.stack.links("postgres", *owners)
    times, skip = scene.random.randint(1, 3), scene.random.randint(0, 3)
    scene.faulty(links, Swallow(b"COMMIT", times, skip), 0.4, 1.0)


@row(10, "The API dies between a job's commit and its bell", steady=False)
def api_exits(scene: ChaosRun) -> None:
    name = scene.random.choice(sorted(scene.stack.apis))
    api = scene.stack.processes[name]
    api.ready()
    api.leave_ended()
    prompts = ["EXIT"] * scene.random.randint(4, 16)
    scene.load.submit({**NULL, "prompts": prompts}, first=name)
    api.ended()
    api.start()


@row(11, "S3 answers 503, is slow, or hangs")
def storage_away(scene: ChaosRun) -> None:
    owners = [worker.name for worker in scene.stack.processes.values() if "worker" in worker.name]
    faults: list[Fault] = [Refuse(), Slow(0.1), Stall()]
    scene.faulty(scene.stack.links("seaweedfs", *owners), scene.random.choice(faults), 0.5, 2.0)


@row(12, "An upload is cut, or its reply is lost")
def upload_cut(scene: ChaosRun) -> None:
    owners = [worker.name for worker in scene.stack.workers("null")]
    faults: list[Fault] = [Truncate(scene.random.randint(50, 4000)), Swallow(b"PUT ", 3)]
    scene.faulty(scene.stack.links("seaweedfs", *owners), scene.random.choice(faults), 0.3, 0.8)


@row(13, "The same bell fifty times")
def many_bells(scene: ChaosRun) -> None:
    url = scene.stack.servers.redis_url
    app = make_app(Settings(redis_url=SecretStr(url), environment="development"))
    try:
        for _ in range(50):
            app.send_task(RENDER_TASK, queue=lane("null"), ignore_result=True)
    finally:
        app.close()
    scene.pause(0.3, 0.8)


SHORT = {"FARM_LEASE_SECONDS": "0.5", "FARM_HEARTBEAT_SECONDS": "3", "FARM_PROGRESS_SECONDS": "60"}


@contextmanager
def short_leases(scene: ChaosRun) -> Iterator[None]:
    """Run one more worker. Its lease is shorter than a batch and renewed too late."""
    worker = scene.stack.add_worker("null", "short", SHORT)
    scene.load.step_seconds = 0.25
    try:
        scene.idle([worker])
        with late_results(scene):
            yield
    finally:
        scene.stack.remove(worker)


@row(14, "Leases shorter than a batch", around=short_leases, mixes=False)
def lease_too_short(scene: ChaosRun) -> None:
    pid = scene.stack.processes["worker null-short"].pid

    def expired() -> int:
        return sum(worker["expired"] for worker in scene.truth.workers([pid]))

    before = expired()
    scene.wait(lambda: expired() > before, "a short lease expired")


@row(15, "A worker is cut off from Postgres alone", around=late_results)
def cut_off(scene: ChaosRun) -> None:
    worker = scene.storing(scene.stack.workers("null"))
    links = scene.stack.links("postgres", worker.name)
    for link in links:
        link.begin(Stall())
    try:
        scene.wait(lambda: worker.pid not in scene.truth.holders(), "its lease expired")
        scene.pause(0.3, 0.8)
    finally:
        for link in links:
            link.heal()


def poisoned(scene: ChaosRun, word: str) -> None:
    """Submit a job with one frame that always fails, and wait until it has failed once."""
    job = scene.load.poison(word)
    [ordinal] = job.poison
    scene.wait(lambda: scene.truth.reasons(job.id, ordinal), "the poison frame had failed")


@row(16, "A frame that ends its process by a segmentation fault")
def segfault(scene: ChaosRun) -> None:
    poisoned(scene, "SEGFAULT")


@row(17, "A frame that runs out of memory")
def out_of_memory(scene: ChaosRun) -> None:
    poisoned(scene, "MEMORY")


@row(18, "A frame that hangs")
def hang(scene: ChaosRun) -> None:
    poisoned(scene, "HANG")


@contextmanager
def wrong_clocks(scene: ChaosRun) -> Iterator[None]:
    """Run two more workers, with clocks an hour ahead and an hour behind."""
    ahead, behind = (clock.shifted(scene.stack.folder.path, hour) for hour in (3600, -3600))
    if ahead is None or behind is None:
        raise Skipped("this machine has no C compiler and no libfaketime")
    early = scene.stack.add_worker("null", "ahead", ahead)
    late = scene.stack.add_worker("null", "behind", behind)
    try:
        scene.idle([early, late])
        yield
    finally:
        scene.stack.remove(early)
        scene.stack.remove(late)


@row(19, "A worker's clock is an hour off", around=wrong_clocks, mixes=False)
def wrong_clock(scene: ChaosRun) -> None:
    early = scene.stack.processes["worker null-ahead"]
    late = scene.stack.processes["worker null-behind"]
    scene.rendering([late])
    [told] = scene.truth.workers([late.pid])
    if told["expired"]:
        scene.problems.append("leases of the worker an hour behind expired, though renewed")
    scene.rendering([early])
    pid = early.pid
    early.end()
    scene.wait(lambda: pid not in scene.truth.holders(), "its lease expired")
    # S3 refuses their signatures, so their pauses grow. A fresh worker has not paused yet.
    late.end(signal.SIGTERM)
    for worker in (early, late):
        worker.start()


@row(20, "All of these at random, under a bulk job", mixes=False)
def anything(scene: ChaosRun) -> None:
    mixed = [ROWS[number] for number in sorted(ROWS) if ROWS[number].mixes]
    scene.random.choice(mixed).inject(scene)


@row(21, "Of two janitors the leading one is killed")
def leader_killed(scene: ChaosRun) -> None:
    leading: list[str] = []

    def found() -> bool:
        port = scene.truth.leader_port()
        leading[:] = [
            link.owner
            for link in scene.stack.links("postgres")
            if port in {connection.port for connection in set(link.connections)}
        ]
        return bool(leading)

    scene.wait(found, "a janitor led")
    scene.stack.processes[leading[0]].restart()


KINDS = ("worker demo", "janitor", "api")
"""Processes that are replaced one after another."""


@row(22, "A rolling deploy and a rollback: two versions work together", most=3, mixes=False)
def rolling_deploy(scene: ChaosRun) -> None:
    """Go back to the version before and forward again, in both orders, with jobs at each step."""
    tree = release.earlier(scene.stack.folder.path)
    older = {"PYTHONPATH": str(tree)}
    for kinds in (KINDS, KINDS[::-1]):  # old workers with this API, then the other way round
        changed = [each for kind in kinds for each in _of_kind(scene, kind)]
        before = {process.name: process.program for process in changed}
        for process in changed:
            _replace(scene, process, {**process.program.env, **older}, tree)
        for process in reversed(changed):
            _replace(scene, process, before[process.name].env, before[process.name].cwd)


def _of_kind(scene: ChaosRun, kind: str) -> list[Process]:
    return [each for name, each in scene.stack.processes.items() if name.startswith(kind)]


def _replace(scene: ChaosRun, process: Process, env: Mapping[str, str], cwd: Path | None) -> None:
    """Replace a process by one of another version, then let a job render."""
    process.end(signal.SIGTERM)
    process.start(env, cwd)
    if process.name.startswith("worker"):
        scene.idle([process])
    else:
        process.ready()
    job = scene.load.demo(8)
    scene.wait(lambda: scene.truth.is_over(job.id), f"a job is rendered after {process.name}")


@contextmanager
def nothing_wasted(scene: ChaosRun) -> Iterator[None]:
    """Check that no process and no attempt ended in the block."""

    def now() -> tuple[dict[str, int | None], int]:
        pids = {name: process.pid for name, process in scene.stack.processes.items()}
        return pids, scene.truth.attempts_ended()

    before = now()
    yield
    if (after := now()) != before:
        scene.problems.append(f"a process or an attempt ended: {before} became {after}")


@row(23, "Postgres takes no writes, as after a failover", around=nothing_wasted, mixes=False)
def read_only(scene: ChaosRun) -> None:
    """Make Postgres read-only for less than a lease. After a lease, workers count as lost."""
    url, own = scene.stack.servers.database_url, "-c default_transaction_read_only=off"
    with psycopg.connect(url, autocommit=True, options=own) as operator:
        operator.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        operator.execute("SELECT pg_reload_conf()")
        try:
            scene.pause(0.5, LEASE_SECONDS / 2)
        finally:
            operator.execute("ALTER SYSTEM RESET default_transaction_read_only")
            operator.execute("SELECT pg_reload_conf()")


@row(24, "Redis is silent, and a job comes to idle workers", steady=False, most=20)
def redis_silent(scene: ChaosRun) -> None:
    server = scene.stack.processes["valkey"]
    server.signal(signal.SIGSTOP)
    try:
        job = scene.load.null(scene.random.randint(4, 16))
        # Waits only for its own frames: in row 20 a bulk job runs too.
        scene.wait(lambda: scene.truth.is_over(job.id), "it was rendered without Redis")
    finally:
        server.signal(signal.SIGCONT)


CROWD = 100


@row(25, "A crowd of clients that stall, with a key and without", most=20)
def stalled_clients(scene: ChaosRun) -> None:
    with ExitStack() as crowd:
        for url in scene.stack.apis.values():
            place = urlsplit(url)
            for number in range(CROWD):
                key = f"Authorization: Bearer {scene.stack.api_key}\r\n" if number % 10 == 0 else ""
                path = "/v1/jobs" if key else "/login"
                client = socket.create_connection((place.hostname, place.port or 0), timeout=10)
                crowd.enter_context(client)
                head = f"POST {path} HTTP/1.1\r\nHost: {place.netloc}\r\nOrigin: {url}\r\n{key}"
                client.sendall(f"{head}Content-Length: 4000\r\n\r\n{{".encode())
        scene.load.null(scene.random.randint(4, 16))
        scene.pause(0.3, 0.8)


@row(26, "All frames of a tenant run out of memory", most=3, mixes=False)
def greedy_tenant(scene: ChaosRun) -> None:
    frames = 6
    greedy = Load(scene.stack, scene.load.name, "greedy", scene.stack.key("greedy"))
    try:
        body = {**NULL, "prompts": ["MEMORY"] * frames, "bucket": 1, "max_attempts": 1}
        job = greedy.submit(body, poison=set(range(frames)))
        scene.load.accepted.append(job)
        scene.wait(lambda: scene.truth.is_over(job.id), "its frames had all failed")
    finally:
        greedy.close()


EVENTFUL_JOBS = 100
"""Jobs of an injection. Each has three events that are told."""


@row(
    27,
    "Couriers are killed, servers are away, and receivers of webhooks misbehave",
    around=bad_receivers,
    most=35,
    mixes=False,
)
def webhooks(scene: ChaosRun) -> None:
    for _ in range(EVENTFUL_JOBS):
        scene.load.null(1)
    couriers = _of_kind(scene, "courier")
    fault = scene.random.choice(("kill", "kill", "postgres", "redis"))
    if fault == "kill":
        scene.random.choice(couriers).restart()
    elif fault == "redis":
        scene.stack.processes["valkey"].restart()
    else:
        links = scene.stack.links("postgres", *(courier.name for courier in couriers))
        scene.faulty(links, scene.random.choice((Reset(), Stall())), 0.5, 2.0)
