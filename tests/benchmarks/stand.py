"""The base of all measurements: the embedded servers, and farms with their own processes."""

from __future__ import annotations

import itertools
import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psycopg
from PIL import Image
from psycopg import sql
from pydantic import SecretStr

from farm.config import DEMO_CATALOG, Settings
from farm.context import Farm, open_farm
from farm.local import commands
from farm.local.child import ManagedProcess, Program, Stage
from farm.local.folder import Folder
from farm.local.ports import HOST, free_port
from farm.local.servers import Servers, start_servers, supervised
from farm.local.supervisor import Supervisor
from farm.pipelines.families.null import write_checkpoint
from farm.services import jobs
from farm.store import keys
from farm.store.engine import transaction
from tests.benchmarks.encoding import photo_like
from tests.chaos.run import credentials
from tests.support.waiting import wait_until

TENANT = "bench"
READY_SECONDS = 900.0
"""Maximum wait for a worker, in seconds. Compiling a pipeline takes minutes."""
DONE_SECONDS = 600.0
GRACE_SECONDS = 10.0
POLL_SECONDS = 0.005
ROOT = Path(__file__).parents[2]
DEVELOPMENT = {"FARM_ENVIRONMENT": "development"}
SMALL_SIDE = 32
PHOTOS = 8
"""Number of different pictures of the lane `photo`."""

DEVICE_SECONDS = 0.2
"""Seconds of a batch of one frame on the simulated device."""
FRAME_SECONDS = 1.5 * DEVICE_SECONDS / 7
"""Seconds of each frame, so that a batch of 8 takes 2.5 times as long as one of 1."""
DEVICE = {
    frames: round(DEVICE_SECONDS + (frames - 1) * FRAME_SECONDS, 6) for frames in (1, 2, 4, 8)
}
"""Seconds of a batch on the simulated device, by its bucket."""

IDLE = "SELECT count(*) FROM workers WHERE state = 'idle' AND NOT gone AND pid = %s"
FINISHED = "SELECT extract(epoch FROM finished_at)::float8 FROM jobs WHERE id = %s"
SUCCEEDED = "SELECT succeeded, dead, cancelled FROM jobs WHERE id = %s"


@dataclass
class BenchFarm:
    """One farm with its own database and Redis database, on shared servers."""

    stand: BenchServers
    farm: Farm
    tenant: uuid.UUID
    env: dict[str, str]
    connection: psycopg.Connection[Any]

    def submit(self, **body: Any) -> uuid.UUID:
        job_id: uuid.UUID = jobs.submit(self.farm, self.tenant, body).id
        return job_id

    def rows(self, statement: str, *values: Any) -> list[Any]:
        return self.connection.execute(statement, values).fetchall()

    def done(self, job_id: uuid.UUID, frames: int) -> None:
        """Wait until every frame of a job has succeeded in Postgres.

        Raises:
            AssertionError: a frame failed, or it takes too long.
        """

        def all_succeeded() -> bool:
            succeeded, dead, cancelled = self.rows(SUCCEEDED, job_id)[0]
            assert not dead + cancelled, f"{dead} frames are dead, {cancelled} cancelled"
            return bool(succeeded == frames)

        wait_closely(all_succeeded, f"{frames} frames succeeded")

    def seconds(self, started: float, job_id: uuid.UUID, frames: int) -> float:
        """Wait until every frame of a job has succeeded.

        Return the seconds from `started`, by time.time, until the job's `finished_at`. That time is
        exact to a millisecond, even with rare polling. Postgres runs on this machine.
        """
        self.done(job_id, frames)
        finished: float = self.rows(FINISHED, job_id)[0][0]
        return finished - started

    @contextmanager
    def worker(self, pipeline: str, **settings: str) -> Iterator[ManagedProcess]:
        """Run a worker, parent and child, as users do. It is idle when the block begins."""
        with self.worker_at_work(pipeline, **settings) as child:
            wait_until(
                lambda: self.rows(IDLE, child.pid)[0][0] == 1, READY_SECONDS, "a worker was idle"
            )
            yield child

    @contextmanager
    def worker_at_work(self, pipeline: str, **settings: str) -> Iterator[ManagedProcess]:
        """Run a worker that finds work at once, so it is never idle."""
        folder = self.stand.folder
        env = commands.environment(folder, {**self.env, **settings})
        program = commands.worker(folder, env, pipeline, next(self.stand.numbers), GRACE_SECONDS)
        with self.stand.running(program) as child:
            yield child

    @contextmanager
    def api(self) -> Iterator[tuple[str, str]]:
        """Run the API by `farm api`. Yield its address and an API key."""
        port = free_port()
        env = commands.environment(self.stand.folder, self.env)
        program = commands.api(self.stand.folder, env, port)
        with transaction(self.farm.store) as connection:
            _, key = keys.create_key(connection, TENANT, "client")
        with self.stand.running(program) as child:
            self.stand.supervisor.ready(child, READY_SECONDS)
            yield f"http://{HOST}:{port}", key


@dataclass
class BenchServers:
    """The servers, and the supervisor of other processes."""

    folder: Folder
    servers: Servers
    supervisor: Supervisor
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    @contextmanager
    def site(self, **settings: Any) -> Iterator[BenchFarm]:
        """Create a farm with an empty database.

        Args:
            settings: fields of Settings.
        """
        number = next(self.numbers)
        database_url = self.database(f"bench_{number}")
        redis_url = self.redis(number)
        own = {"database_url": database_url, "redis_url": redis_url, "environment": "development"}
        places = {
            "pipelines": str(self.folder.path / "pipelines.toml"),
            "scratch_dir": str(self.folder.path / "scratch"),
            "cache_dir": str(self.folder.path / "cache"),
        }
        given = {**own, **places, **settings}
        named = {f"FARM_{name.upper()}": str(value) for name, value in given.items()}
        env = {**self.servers.env, **DEVELOPMENT, **named}
        commands.run(
            ["migrate"], commands.environment(self.folder, env), self.folder.logs / "migrate.log"
        )
        farm = open_farm(
            Settings(
                **{
                    **given,
                    "database_url": SecretStr(database_url),
                    "redis_url": SecretStr(redis_url),
                    "s3_endpoint_url": self.servers.s3_endpoint_url,
                    "s3_bucket": self.servers.s3_bucket,
                }
            )
        )
        with psycopg.connect(database_url, autocommit=True) as connection:
            with transaction(farm.store) as begun:
                tenant = keys.ensure_tenant(begun, TENANT)
            yield BenchFarm(self, farm, tenant, env, connection)
        farm.close()

    def database(self, name: str) -> str:
        """Create an empty database. Return its address."""
        with psycopg.connect(self.servers.database_url, autocommit=True) as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        return f"{self.servers.database_url.rpartition('/')[0]}/{name}"

    def redis(self, number: int) -> str:
        """Return the address of one of Redis's databases."""
        return f"{self.servers.redis_url.rpartition('/')[0]}/{number % 15 + 1}"

    @contextmanager
    def running(self, program: Program) -> Iterator[ManagedProcess]:
        """Run a program during the block."""
        name = f"{program.name} {next(self.numbers)}"
        log = self.folder.logs / f"{name.replace(' ', '-')}.log"
        child = self.supervisor.start(replace(program, name=name, log=log))
        try:
            yield child
        finally:
            self.supervisor.forget(child)

    @contextmanager
    def python(
        self, name: str, argv: list[str], env: Mapping[str, str]
    ) -> Iterator[ManagedProcess]:
        """Run a program of the suite during the block."""
        path = {"PYTHONPATH": str(ROOT), **DEVELOPMENT}
        program = Program(
            name=name,
            argv=argv,
            env={**commands.environment(self.folder, self.servers.env), **path, **env},
            log=self.folder.logs / "unused.log",
            stage=Stage.WORKER,
            cwd=ROOT,
            grace=GRACE_SECONDS,
        )
        with self.running(program) as child:
            yield child


@contextmanager
def running_stand(data: Path) -> Iterator[BenchServers]:
    """Run the servers on the folder `data` during the block."""
    with supervised(data) as (folder, supervisor):
        servers = start_servers(folder, supervisor)
        _write_catalog(folder.path)
        with credentials(servers.env):
            yield BenchServers(folder, servers, supervisor)


def _write_catalog(folder: Path) -> None:
    """Write four lanes: a fixed small picture, a simulated device, photographs, and the demo's."""
    write_checkpoint(folder / "null", [small_picture()])
    pictures = [photo_like(1024, seed) for seed in range(PHOTOS)]
    write_checkpoint(folder / "photo", pictures)
    ladder = ", ".join(
        f'{{ size = "default", bucket = {frames}, seconds = {seconds} }}'
        for frames, seconds in DEVICE.items()
    )
    demo = json.dumps(str(DEMO_CATALOG.with_name("model")))
    (folder / "pipelines.toml").write_text(
        '[pipelines.null]\nsource = "null"\nbucket = { "default" = 256 }\n\n'
        '[pipelines.device]\nsource = "null"\n'
        f'bucket = {{ "default" = {max(DEVICE)} }}\nladder = [{ladder}]\n\n'
        '[pipelines.photo]\nsource = "photo"\nbucket = { "default" = 4 }\n\n'
        f"[pipelines.demo]\nsource = {demo}\n"
        'bucket = { "default" = 32 }\ndefaults = { "steps" = 25, "guidance_scale" = 2.5 }\n'
    )


def small_picture() -> Image.Image:
    """Return the picture of null renders."""
    return photo_like(SMALL_SIDE)


def wait_closely(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition, with a delay of at most 5 ms or half a per cent of the wait.

    More frequent polling would take the cores from the measured work.

    Raises:
        AssertionError: the condition did not hold within ten minutes.
    """
    started = time.monotonic()
    while not condition():
        passed = time.monotonic() - started
        assert passed < DONE_SECONDS, f"timeout while waiting until {what}"
        time.sleep(max(POLL_SECONDS, passed / 200))
