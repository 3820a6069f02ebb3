"""The whole farm for chaos. Each process has its own links to the servers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from signal import SIGCONT, SIGKILL, Signals
from urllib.parse import urlsplit

from farm.config import DEMO_CATALOG
from farm.local import commands
from farm.local.child import ManagedProcess, Program
from farm.local.folder import Folder
from farm.local.ports import HOST, free_port
from farm.local.processes import signal_group
from farm.local.servers import Servers, start_servers, supervised
from farm.local.supervisor import Supervisor
from farm.pipelines.families.null import write_checkpoint
from tests.chaos.proxy import Link, Proxies
from tests.support.waiting import wait_until

LEASE_SECONDS = 3.0
STEP_TIMEOUT_SECONDS = 6.0
GRACE_SECONDS = 20.0
SETTINGS = {
    "FARM_LEASE_SECONDS": str(LEASE_SECONDS),
    "FARM_HEARTBEAT_SECONDS": "0.5",
    "FARM_SWEEP_SECONDS": "0.2",
    "FARM_RETRY_SECONDS": "0.1",
    "FARM_PROGRESS_SECONDS": "0.1",
    "FARM_TRANSACTION_SECONDS": "2",
    "FARM_WORKER_TIMEOUT_SECONDS": "6",
    "FARM_STEP_TIMEOUT_SECONDS": str(STEP_TIMEOUT_SECONDS),
    "FARM_TRIP_SECONDS": "1",
    "FARM_GRACE_SECONDS": str(GRACE_SECONDS),
    "FARM_ENVIRONMENT": "development",
    "FARM_FAILPOINTS": "submit.committed=exit:EXIT; render.step=segfault:SEGFAULT; "
    "render.step=hang:HANG; render.step=oom:MEMORY",
    "FARM_TORCH_THREADS": "1",
    "FARM_WEBHOOK_NETWORKS": "127.0.0.0/8",
    "FARM_WEBHOOK_PACE": "0.0005",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}
VARIABLES = {
    "postgres": "FARM_DATABASE_URL",
    "valkey": "FARM_REDIS_URL",
    "seaweedfs": "FARM_S3_ENDPOINT_URL",
}
READY_SECONDS = 300.0


class Process:
    """A program of the farm. Like any process manager, the supervisor restarts it when it ends."""

    def __init__(self, supervisor: Supervisor, child: ManagedProcess) -> None:
        self._supervisor = supervisor
        self._child = child
        self.name = child.name

    @property
    def pid(self) -> int | None:
        return self._child.pid

    @property
    def program(self) -> Program:
        return self._child.program

    def signal(self, sign: Signals) -> None:
        """Send a signal to the process and all its descendants."""
        if self._child.pid is not None:
            signal_group(self._child.pid, sign)

    def end(self, sign: Signals = SIGKILL) -> None:
        """End it by a signal. It stays ended until `start`."""
        self.leave_ended()
        self.signal(sign)
        self.ended()

    def leave_ended(self) -> None:
        """Turn off the automatic restart."""
        self._child.lasting = False

    def ended(self) -> None:
        """Wait until it has ended."""
        wait_until(lambda: not self._child.alive, 60.0, f"{self.name} ended")

    def start(self, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> None:
        """Start it again at once, without the pause of a failing program."""
        program = self.program if env is None else replace(self.program, env=env, cwd=cwd)
        self._supervisor.forget(self._child)
        self._child = self._supervisor.start(program)

    def restart(self, sign: Signals = SIGKILL) -> None:
        self.end(sign)
        self.start()

    def ready(self) -> None:
        self._supervisor.ready(self._child, READY_SECONDS)

    def forget(self) -> None:
        """Stop it permanently."""
        self.signal(SIGCONT)
        self._supervisor.forget(self._child)


@dataclass
class Stack:
    """The farm, its servers, its processes by name and their links."""

    folder: Folder
    servers: Servers
    proxies: Proxies
    supervisor: Supervisor
    random: Random
    env: dict[str, str]
    """Environment with the servers' own addresses, without links."""
    processes: dict[str, Process] = field(default_factory=dict)
    apis: dict[str, str] = field(default_factory=dict)
    """Addresses of the APIs, by process name."""
    api_key: str = ""

    def links(self, server: str, *owners: str) -> list[Link]:
        """List the links to a server, of these processes or of all."""
        return [
            link
            for link in self.proxies.links
            if link.server == server and (not owners or link.owner in owners)
        ]

    def workers(self, pipeline: str) -> list[Process]:
        return [
            process
            for name, process in self.processes.items()
            if name.startswith(f"worker {pipeline}-")
        ]

    def linked(self, owner: str, settings: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return the environment of a process, with its own link to every server."""
        urls = {}
        for server, variable in VARIABLES.items():
            url = urlsplit(self.env[variable])
            known = self.links(server, owner)
            link = known[0] if known else self.proxies.link(owner, server, HOST, url.port or 0)
            place = url.netloc.rpartition("@")
            urls[variable] = url._replace(netloc=f"{place[0]}{place[1]}{HOST}:{link.port}").geturl()
        return {**commands.environment(self.folder, self.env), **urls, **(settings or {})}

    def run(self, program: Program) -> Process:
        process = Process(self.supervisor, self.supervisor.start(program))
        self.processes[program.name] = process
        return process

    def add_worker(
        self,
        pipeline: str,
        number: int | str,
        settings: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> Process:
        """Start one more worker."""
        name = f"worker {pipeline}-{number}"
        program = commands.worker(
            self.folder, self.linked(name, settings), pipeline, 0, GRACE_SECONDS
        )
        log = self.folder.logs / f"{name.replace(' ', '-')}.log"
        return self.run(replace(program, name=name, log=log, cwd=cwd))

    def add_api(self, number: int) -> Process:
        name, port = f"api {number}", free_port()
        program = commands.api(self.folder, self.linked(name), port)
        log = self.folder.logs / f"api-{number}.log"
        self.apis[name] = f"http://{HOST}:{port}"
        return self.run(replace(program, name=name, log=log))

    def add_janitor(self, number: int) -> Process:
        name = f"janitor {number}"
        program = commands.janitor(self.folder, self.linked(name))
        log = self.folder.logs / f"janitor-{number}.log"
        return self.run(replace(program, name=name, log=log))

    def add_courier(self, number: int) -> Process:
        name = f"courier {number}"
        program = commands.courier(self.folder, self.linked(name))
        log = self.folder.logs / f"courier-{number}.log"
        return self.run(replace(program, name=name, log=log))

    def remove(self, process: Process) -> None:
        process.forget()
        del self.processes[process.name]

    def key(self, tenant: str) -> str:
        """Create an operator key of a tenant."""
        words = ("keys", "create", "--tenant", tenant, "--role", "operator", "--json")
        key: str = json.loads(self.command(*words).splitlines()[-1])["key"]
        return key

    def command(self, *words: str) -> str:
        """Run one of the farm's commands. Raise StackError if it fails."""
        env = commands.environment(self.folder, self.env)
        return commands.run([*words], env, self.folder.logs / f"{words[0]}.log")


@contextmanager
def running_stack(data: Path, rng: Random, demo_workers: int) -> Iterator[Stack]:
    """Run the farm on the folder `data` during the block."""
    with supervised(data) as (folder, supervisor), Proxies() as proxies:
        servers = start_servers(folder, supervisor)
        places = {
            "FARM_PIPELINES": str(_catalog(data)),
            "FARM_SCRATCH_DIR": str(folder.path / "scratch"),
        }
        env = {**servers.env, **SETTINGS, **places}
        stack = Stack(folder, servers, proxies, supervisor, rng, env)
        for name in VARIABLES:
            stack.processes[name] = Process(supervisor, getattr(servers, name))
        stack.command("migrate")
        stack.api_key = stack.key("chaos")
        for number in (1, 2):
            stack.add_worker("null", number)
        for number in range(1, demo_workers + 1):
            stack.add_worker("demo", number)
        fronts = [stack.add_api(number) for number in (1, 2)]
        for number in (1, 2):
            stack.add_janitor(number)
        for front in fronts:
            front.ready()
        yield stack


def _catalog(data: Path) -> Path:
    """Write a catalog of two lanes: a quick one that renders nothing, and the demo's."""
    write_checkpoint(data / "null")
    demo = DEMO_CATALOG.with_name("model")
    path = data / "pipelines.toml"
    path.write_text(
        f'[pipelines.null]\nsource = "null"\nbucket = {{ "default" = 8 }}\n\n'
        f'[pipelines.demo]\nsource = {json.dumps(str(demo))}\nbucket = {{ "default" = 4 }}\n'
    )
    return path
