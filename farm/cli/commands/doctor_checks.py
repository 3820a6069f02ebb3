"""The checks of `farm doctor`: those of the servers, and those of this machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib import metadata
from pathlib import Path

from farm.cli.client.http import FarmClient
from farm.config import ENV_FILE, Settings
from farm.errors import CatalogError, FarmError
from farm.humanize import size
from farm.pipelines.catalog import Pipeline, load_catalog
from farm.pipelines.resolve import resolve_pipeline, uses_gpu
from farm.pipelines.runtime.devices import device_name, device_of
from farm.pipelines.runtime.gpus import Gpu, device_bytes, list_gpus
from farm.services.doctor import Check, Wrong, elsewhere, server_checks, workers_check
from farm.store.engine import Store


def all_checks(settings: Settings, store: Store) -> Iterator[Check]:
    """Yield every check, including those for each pipeline of the catalog."""
    data = os.environ.get("FARM_DATA", "DIR")
    yield Check("settings", _settings, f"Create the folder with `farm up --data {data}`.")
    yield from server_checks(settings, store)
    yield Check("api", partial(_api, settings), f"{elsewhere()} FARM_API_URL and FARM_API_KEY.")
    yield Check("torch", _torch, "Install the farm again, with constraints.txt.")
    catalog = "Set FARM_PIPELINES to your catalog, for example pipelines.toml."
    yield Check("catalog", partial(_catalog, settings), catalog)
    yield from _pipeline_checks(settings, store)


def _pipeline_checks(settings: Settings, store: Store) -> Iterator[Check]:
    try:
        pipelines = load_catalog(settings.pipelines).pipelines
    except CatalogError:  # the catalog check reports it
        return
    devices = cache(partial(list_gpus, settings))
    yield Check("devices", partial(_devices, devices), "Check the driver: `nvidia-smi`.")
    for name, entry in pipelines.items():
        look = partial(_pipeline, name, entry, devices)
        yield Check(f"pipeline {name}", look, f"Correct its entry in {settings.pipelines}.")
        yield workers_check(settings, store, name)


def _settings() -> str:
    data = os.environ.get("FARM_DATA")
    if not data:
        return "FARM_* variables; FARM_DATA is not set"
    if not (Path(data) / ENV_FILE).is_file():
        raise FarmError(f"FARM_DATA is {data}, which has no file {ENV_FILE}.")
    return str(Path(data) / ENV_FILE)


def _api(settings: Settings) -> str:
    with FarmClient.of(settings) as client:
        client.check_ready()
        client.workers()
    return f"ready at {settings.api_url}, and accepts the key"


def _torch() -> str:
    device = device_of(Pipeline(source="any"))
    return f"{metadata.version('torch')} on {device_name(device)}"


def _catalog(settings: Settings) -> str:
    names = load_catalog(settings.pipelines).pipelines
    return f"{settings.pipelines}: {', '.join(names)}"


def _devices(devices: Callable[[], list[Gpu]]) -> str:
    found = [f"{n}: {gpu.name}, {size(gpu.bytes)}" for n, gpu in enumerate(devices())]
    return "; ".join(found) or "no CUDA device; pipelines render on the CPU"


def _pipeline(name: str, entry: Pipeline, devices: Callable[[], list[Gpu]]) -> str:
    resolved = resolve_pipeline(name, entry)
    found = f"{resolved.family.name} from {entry.checkpoint}"
    if not (uses_gpu(name, entry) and devices()):
        return found
    needed = device_bytes(resolved.pipeline)
    if needed is None:
        return f"{found}; its weights are not here yet, so their size is not known"
    fits = [str(number) for number, gpu in enumerate(devices()) if needed <= gpu.bytes]
    if not fits:
        largest = size(max(gpu.bytes for gpu in devices()))
        raise Wrong(
            f"It needs about {size(needed)}, and the largest device has {largest}.",
            "Set `offload`, or use a smaller dtype or a larger device.",
        )
    return f"{found}; needs about {size(needed)}, fits on device {', '.join(fits)}"
