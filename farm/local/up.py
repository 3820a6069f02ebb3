"""The whole farm on one machine: servers, migrations, and all processes of the farm."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from farm.config import ENV_FILE, Settings, format_env
from farm.errors import CatalogError
from farm.local import commands
from farm.local.child import ManagedProcess
from farm.local.errors import StackError
from farm.local.folder import Folder, write_private
from farm.local.placement import Entry, Placed, Placement, place
from farm.local.ports import HOST, free_port, is_free
from farm.local.servers import Servers, start_servers, supervised
from farm.local.supervisor import Supervisor
from farm.pipelines.catalog import Pipeline, load_catalog
from farm.pipelines.resolve import resolve_pipeline, uses_gpu
from farm.pipelines.runtime.gpus import Gpu, device_bytes, list_gpus
from farm.process import cores

READY_SECONDS = 120.0


@dataclass(frozen=True)
class LocalFarm:
    """A running farm: its address, and its processes by name, such as `worker demo-1` or `api`."""

    url: str
    api_key: str
    data: Path
    env: dict[str, str]
    """Variables in farm.env."""
    servers: Servers
    children: dict[str, ManagedProcess]
    left_out: dict[str, str]
    """Entries of the catalog without a worker, since no device has room for them: the reasons."""


@contextmanager
def running_farm(
    data: Path,
    port: int = 0,
    pipelines: Path | None = None,
    workers: Mapping[str, int] | None = None,
) -> Iterator[LocalFarm]:
    """Run a whole farm on the folder `data` until the end of the block.

    Args:
        data: the data folder.
        port: port of the API; 0 for any free one.
        pipelines: the catalog; by default FARM_PIPELINES, or the demo's.
        workers: number of workers by pipeline; 1 for pipelines that are not listed. See
            `placement.place` for the devices that they get.

    Raises:
        StackError: the port is taken, a pipeline is unknown, or a part does not start.
        InvalidRequest: a worker that was asked for has no room on a device.
    """
    settings = Settings()
    catalog = (pipelines or settings.pipelines).expanduser().resolve()
    placement = _placement(settings, load_catalog(catalog).pipelines, workers or {})
    port = _port(port)
    with supervised(data) as (folder, supervisor):
        servers = start_servers(folder, supervisor)
        url = f"http://{HOST}:{port}"
        env = {**servers.env, "FARM_API_URL": url, "FARM_PIPELINES": str(catalog)}
        write_private(folder.path / ENV_FILE, format_env(env))
        full = commands.environment(folder, env)
        commands.run(["migrate"], full, folder.logs / "migrate.log")
        api_key = _api_key(folder, full)
        _start_farm(folder, supervisor, full, port, placement.workers, settings.grace_seconds)
        children = {child.name: child for child in supervisor.children}
        yield LocalFarm(url, api_key, folder.path, env, servers, children, placement.left_out)


def _placement(
    settings: Settings, pipelines: Mapping[str, Pipeline], asked: Mapping[str, int]
) -> Placement:
    """Choose the workers and their devices. Raise StackError for an unknown pipeline."""
    if unknown := sorted(set(asked) - set(pipelines)):
        raise StackError(
            f"--workers: there is no pipeline {unknown[0]!r} in the catalog. "
            f"It has {', '.join(pipelines)}."
        )
    gpus = list_gpus(settings)
    return place([_entry(name, entry, gpus) for name, entry in pipelines.items()], gpus, asked)


def _entry(name: str, pipeline: Pipeline, gpus: Sequence[Gpu]) -> Entry:
    if not (gpus and uses_gpu(name, pipeline)):
        return Entry(name, uses_gpu=False)
    try:
        whole = resolve_pipeline(name, pipeline).pipeline
        return Entry(name, uses_gpu=True, bytes=device_bytes(whole))
    except CatalogError:  # its worker says why; it may be repaired
        return Entry(name, uses_gpu=True)


def _port(port: int) -> int:
    if port == 0:
        return free_port()
    if not is_free(port):
        raise StackError(
            f"Port {port} is taken or not allowed. Choose another one, for example --port 8001, "
            "or any free one with --port 0."
        )
    return port


def _api_key(folder: Folder, env: Mapping[str, str]) -> str:
    """Return the operator's key in the folder. Create it the first time."""
    if not folder.api_key.is_file():
        words = ["keys", "create", "--tenant", "default", "--role", "operator", "--json"]
        output = commands.run(words, env, folder.logs / "keys.log")
        write_private(folder.api_key, json.loads(output.splitlines()[-1])["key"] + "\n")
    return folder.api_key.read_text().strip()


def _start_farm(
    folder: Folder,
    supervisor: Supervisor,
    env: Mapping[str, str],
    port: int,
    workers: Sequence[Placed],
    grace: float,
) -> None:
    api = supervisor.start(commands.api(folder, env, port), lasting=False)
    supervisor.start(commands.janitor(folder, env))
    scratch = {"FARM_SCRATCH_DIR": str(folder.path / "scratch")}
    supervisor.start(commands.exporter(folder, {**env, **scratch}))
    supervisor.start(commands.courier(folder, env))
    own = {**_thread_settings(len(workers)), **scratch}
    for worker in workers:
        supervisor.start(
            commands.worker(
                folder, {**env, **own}, worker.pipeline, worker.number, grace, worker.device
            )
        )
    supervisor.ready(api, READY_SECONDS)


def _thread_settings(workers: int) -> dict[str, str]:
    """Divide the cores, so that workers do not wait for the threads of others."""
    threads = str(max(1, cores() // max(1, workers)))
    return {"FARM_TORCH_THREADS": threads, "OMP_NUM_THREADS": threads}
