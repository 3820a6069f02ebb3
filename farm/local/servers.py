"""The three embedded servers together: Postgres, Valkey and SeaweedFS."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from farm.local import postgres, seaweedfs, valkey
from farm.local.child import ManagedProcess, Program
from farm.local.errors import StackError
from farm.local.folder import Folder, hold
from farm.local.processes import MARK, end_leftovers
from farm.local.supervisor import Supervisor

START_SECONDS = 60.0
# Another process can take a port after it was found free.
START_TRIES = 3
INHERITED = ("PATH", "LANG", "TMPDIR", "TZ")

Plan = Callable[[Folder, dict[str, str]], tuple[Program, str]]


@dataclass(frozen=True)
class Servers:
    """The running servers: addresses with credentials, and processes."""

    database_url: str
    redis_url: str
    s3_endpoint_url: str
    s3_bucket: str
    access_key: str
    secret_key: str
    region: str
    postgres: ManagedProcess
    valkey: ManagedProcess
    seaweedfs: ManagedProcess

    @property
    def env(self) -> dict[str, str]:
        """Environment variables with which the farm's processes and boto3 use these servers."""
        return {
            "FARM_DATABASE_URL": self.database_url,
            "FARM_REDIS_URL": self.redis_url,
            "FARM_S3_ENDPOINT_URL": self.s3_endpoint_url,
            "FARM_S3_BUCKET": self.s3_bucket,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": self.region,
        }


@contextmanager
def embedded_servers(data: Path) -> Iterator[Servers]:
    """Run the three servers on the folder `data` (made if missing) until the end of the block.

    They start in a few seconds. A server that ends is restarted on the same port and data. No
    process is left behind.

    Raises:
        StackError: `data` is in use, the [local] extra is missing, or a server does not start
            within 60 s.
    """
    with supervised(data) as (folder, supervisor):
        yield start_servers(folder, supervisor)


@contextmanager
def supervised(data: Path) -> Iterator[tuple[Folder, Supervisor]]:
    """Lock the folder, and end all leftover processes before and after the block."""
    with hold(data) as folder:
        end_leftovers(folder.path)
        for part in (folder.logs, folder.ports):
            folder.make(part.name)
        try:
            with Supervisor() as supervisor:
                yield folder, supervisor
        finally:
            end_leftovers(folder.path)
            seaweedfs.remove_sockets(folder)


def start_servers(folder: Folder, supervisor: Supervisor) -> Servers:
    """Start the servers in parallel, and wait until each one serves."""
    # The slowest first: the others, and Postgres's initdb, run during its start.
    plans = (seaweedfs.program, valkey.program, postgres.program)
    starting = [_start(plan, folder, supervisor) for plan in plans]
    settled = [
        _settle(plan, started, folder, supervisor)
        for plan, started in zip(plans, starting, strict=True)
    ]
    (s3, s3_url), (redis, redis_url), (database, database_url) = settled
    return Servers(
        database_url=database_url,
        redis_url=redis_url,
        s3_endpoint_url=s3_url,
        s3_bucket=seaweedfs.BUCKET,
        access_key=folder.passwords.s3_access_key,
        secret_key=folder.passwords.s3_secret_key,
        region=seaweedfs.REGION,
        postgres=database,
        valkey=redis,
        seaweedfs=s3,
    )


def _start(plan: Plan, folder: Folder, supervisor: Supervisor) -> tuple[ManagedProcess, str]:
    env = {name: os.environ[name] for name in INHERITED if name in os.environ}
    program, url = plan(folder, env | {MARK: str(folder.path)})
    return supervisor.start(program, lasting=False), url


def _settle(
    plan: Plan, started: tuple[ManagedProcess, str], folder: Folder, supervisor: Supervisor
) -> tuple[ManagedProcess, str]:
    """Wait until the server serves. If it ends at its start, try again on free ports."""
    for tries_left in reversed(range(START_TRIES)):
        child, _url = started
        try:
            supervisor.ready(child, START_SECONDS)
            break
        except StackError:
            if child.alive or not tries_left:
                raise
        supervisor.forget(child)
        started = _start(plan, folder, supervisor)
    return started
