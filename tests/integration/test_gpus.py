"""CUDA devices: which one a worker takes, what stands with it, and what fits on it.

The devices are simulated at `list_gpus`, the only function that lists devices.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from farm.cli.commands.doctor_checks import _pipeline
from farm.config import Settings
from farm.context import Farm
from farm.errors import FarmError, InvalidRequest
from farm.pipelines.catalog import Pipeline, load_catalog
from farm.pipelines.families.null import write_checkpoint
from farm.pipelines.resolve import uses_gpu
from farm.pipelines.runtime import gpus as module
from farm.pipelines.runtime.gpus import Gpu, device_bytes, list_gpus
from farm.services.doctor import Wrong
from farm.store import workers
from farm.store.engine import transaction
from tests.integration.test_migrations import env_of
from tests.support.checkpoints import save
from tests.support.cli_runner import Outcome, farm_process
from tests.support.store import sql
from workers.render.identity import Identity
from workers.render.parent import choose_gpu, enlist

TWO = [Gpu("0", "GPU-a", "Some GPU", 24 * 2**30), Gpu("1", "GPU-b", "Some GPU", 24 * 2**30)]


def hire(farm: Farm, device: int | None = None, gpus: list[Gpu] = TWO) -> str | None:
    """Register a worker as its parent does. Return its device."""
    identity = Identity(uuid.uuid4(), "demo", "here", os.getpid())
    with transaction(farm.store) as connection:
        gpu = choose_gpu(connection, gpus, device)
        enlist(connection, identity, gpu)
    return gpu.id if gpu else None


def test_a_worker_takes_the_device_with_the_fewest_workers(farm: Farm) -> None:
    assert [hire(farm) for _ in range(3)] == ["GPU-a", "GPU-b", "GPU-a"]
    assert hire(farm) == "GPU-b"
    sql(farm, "UPDATE workers SET gone = true WHERE device_id = 'GPU-b'")
    assert [hire(farm), hire(farm)] == ["GPU-b", "GPU-b"]


def test_workers_that_start_at_once_take_different_devices(farm: Farm) -> None:
    together = threading.Barrier(4)

    def start(_: int) -> str | None:
        together.wait(30)
        return hire(farm)

    with ThreadPoolExecutor(4) as pool:
        assert sorted(map(str, pool.map(start, range(4)))) == ["GPU-a"] * 2 + ["GPU-b"] * 2


def test_the_device_that_is_named_is_taken(farm: Farm) -> None:
    assert [hire(farm, 1), hire(farm, 1)] == ["GPU-b", "GPU-b"]


@pytest.mark.parametrize(("gpus", "there"), [(TWO, "0 to 1"), ([], "none")])
def test_a_device_that_is_not_there_is_refused(farm: Farm, gpus: list[Gpu], there: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"^--device: .* CUDA device 2 .*: {there}\.$"):
        hire(farm, 2, gpus)
    assert sql(farm, "SELECT FROM workers") == []


def test_without_devices_a_worker_has_none(farm: Farm) -> None:
    assert hire(farm, gpus=[]) is None
    with transaction(farm.store) as connection:
        [row] = workers.list_workers(connection)
    assert (row.device_bytes, row.neighbours) == (None, 0)


def test_memory_and_neighbours_stand_with_the_worker(farm: Farm) -> None:
    for device in (0, 1, 1):
        hire(farm, device)
    hire(farm, gpus=[])
    with transaction(farm.store) as connection:
        rows = workers.list_workers(connection)
    told = sorted((row.device_bytes or 0, row.neighbours) for row in rows)
    assert told == [(0, 0), (24 * 2**30, 0), (24 * 2**30, 1), (24 * 2**30, 1)]


# Listing


def test_a_machine_without_a_driver_lists_none_without_torch(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_has_devices", lambda: False)
    monkeypatch.setattr(subprocess, "run", None)
    assert list_gpus(settings) == []


@pytest.mark.parametrize(
    ("visible", "tokens"),
    [(None, ["0", "1"]), ("2,3", ["2", "3"]), ("GPU-x, MIG-y", ["GPU-x", "MIG-y"])],
)
def test_devices_are_named_as_the_child_must_be_told(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, visible: str | None, tokens: list[str]
) -> None:
    """torch counts the visible devices from 0. The child's variable needs the outer names."""
    told = json.dumps([["uuid-a", "H200", 5], ["", "H200", 6]])
    monkeypatch.setattr(module, "_has_devices", lambda: True)
    monkeypatch.setattr(module, "SCRIPT", f"print('a warning'); print({told!r})")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    else:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = list_gpus(settings)
    assert [gpu.token for gpu in found] == tokens
    assert [(gpu.name, gpu.bytes) for gpu in found] == [("H200", 5), ("H200", 6)]
    assert found[0].id == "uuid-a"
    assert found[1].id == f"{os.uname().nodename}/{tokens[1]}"


def test_the_real_script_lists_what_torch_sees(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(module, "_has_devices", lambda: True)
    assert len(list_gpus(settings)) == torch.cuda.device_count()


def test_a_driver_that_fails_is_told_in_one_line(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_has_devices", lambda: True)
    monkeypatch.setattr(module, "SCRIPT", "raise RuntimeError('no driver')")
    with pytest.raises(
        FarmError, match=r"^torch cannot list the CUDA devices: Runtime.*no driver$"
    ):
        list_gpus(settings)


def test_a_driver_that_hangs_is_told_in_one_line(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_has_devices", lambda: True)
    monkeypatch.setattr(module, "SCRIPT", "import threading; threading.Event().wait()")
    monkeypatch.setattr(module, "LIST_SECONDS", 0.2)
    with pytest.raises(FarmError, match=r"^The driver did not list .* within 0\.2 s\."):
        list_gpus(settings)


# Memory


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    return save("stable_diffusion", folder / "stable_diffusion")


def parameters(checkpoint: Path) -> dict[str, int]:
    """Count parameters with safetensors itself."""
    from safetensors import safe_open

    counts: dict[str, int] = {}
    for path in checkpoint.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            total = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
        counts[path.parent.name] = total
    return counts


@pytest.mark.parametrize(
    ("fields", "width"), [({}, 2), ({"dtype": "float32"}, 4), ({"dtype": "bfloat16"}, 2)]
)
def test_the_need_is_that_of_the_weights_and_room_for_a_batch(
    checkpoint: Path, fields: dict[str, str], width: int
) -> None:
    counts = parameters(checkpoint)
    entry = Pipeline(source=str(checkpoint), **fields)
    assert device_bytes(entry) == width * sum(counts.values()) + 2 * 2**30
    parked = Pipeline(source=str(checkpoint), offload="model", **fields)
    assert device_bytes(parked) == width * max(counts.values()) + 2 * 2**30


def test_weights_of_the_hub_that_are_not_here_have_no_size(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert device_bytes(Pipeline(source="some-org/gone")) is None


def test_doctor_says_what_fits_before_anything_is_loaded(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = Pipeline(source=str(checkpoint))
    small, large = Gpu("0", "a", "Small", 2**30), Gpu("1", "b", "Large", 24 * 2**30)
    assert _pipeline("sd", entry, lambda: [small, large, large]).endswith(
        "; needs about 2.0 GiB, fits on device 1, 2"
    )
    with pytest.raises(Wrong, match=r"needs about 2\.0 GiB, and the largest device has 1\.0 GiB"):
        _pipeline("sd", entry, lambda: [small])
    assert "needs" not in _pipeline("sd", entry, list)


# Entries, and whole processes


@pytest.mark.parametrize(
    ("device", "family", "takes"),
    [
        ("cpu", "stable_diffusion", False),
        ("cuda", "null", True),
        ("auto", "null", False),
        ("auto", "stable_diffusion", True),
    ],
)
def test_entries_that_take_a_device(
    checkpoint: Path, tmp_path: Path, device: str, family: str, takes: bool
) -> None:
    source = checkpoint
    if family == "null":
        source = tmp_path / "null"
        write_checkpoint(source)
    assert (
        uses_gpu("x", Pipeline.model_validate({"source": str(source), "device": device})) is takes
    )


def test_a_device_that_is_not_there_is_one_line_for_the_command(
    settings: Settings, tmp_path: Path
) -> None:
    refused = worker(settings, tmp_path, "--device", "2", FARM_SIMULATED_GPUS="2")
    assert (refused.code, refused.err.splitlines()[-1]) == (
        1,
        "Error: --device: there is no CUDA device 2 here. Devices: 0 to 1.",
    )


def test_simulated_devices_are_refused_in_production(settings: Settings, tmp_path: Path) -> None:
    refused = worker(settings, tmp_path, FARM_SIMULATED_GPUS="2", FARM_ENVIRONMENT="production")
    assert "FARM_SIMULATED_GPUS is refused in production" in refused.err


def worker(settings: Settings, folder: Path, *words: str, **variables: str) -> Outcome:
    catalog = null_catalog(folder)
    env = env_of(settings) | {"FARM_PIPELINES": str(catalog), "FARM_ENVIRONMENT": "development"}
    return farm_process("worker", "a", *words, env=env | variables, seconds=60)


def null_catalog(folder: Path) -> Path:
    """Write a catalog with two entries that take a device and compute nothing."""
    write_checkpoint(folder / "null")
    catalog = folder / "pipelines.toml"
    catalog.write_text(
        "".join(f'[pipelines.{name}]\nsource = "null"\ndevice = "cuda"\n' for name in "ab")
    )
    assert list(load_catalog(catalog).pipelines) == ["a", "b"]
    return catalog
