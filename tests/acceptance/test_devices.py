"""`farm up` on a machine with two CUDA devices, simulated where devices are listed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from farm.cli.commands.up import _show
from farm.config import Settings
from farm.local import up
from farm.pipelines.catalog import load_catalog
from farm.pipelines.runtime import gpus
from tests.acceptance.farms import LiveFarm, running
from tests.integration.test_gpus import null_catalog
from tests.support.waiting import wait_until

GPU_BYTES = 24 * 2**30


@pytest.fixture
def two_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FARM_ENVIRONMENT", "development")
    monkeypatch.setenv("FARM_SIMULATED_GPUS", "2")
    return null_catalog(tmp_path)


@pytest.mark.slow
def test_each_entry_has_a_device_that_only_its_worker_sees(
    tmp_path: Path, two_devices: Path
) -> None:
    with running(tmp_path / "data", "a", two_devices) as live:
        rows = workers(live)
        assert {name: row["device_bytes"] for name, row in rows.items()} == {
            "a": GPU_BYTES,
            "b": GPU_BYTES,
        }
        assert {row["neighbours"] for row in rows.values()} == {0}
        assert {name: seen_by_child(row["pid"]) for name, row in rows.items()} == {
            "a": {"0"},
            "b": {"1"},
        }
        assert live.ended(live.submit(prompts=["x"], steps=1)["id"])["status"] == "succeeded"


def test_what_has_no_room_is_named_with_the_way_to_choose(
    tmp_path: Path,
    two_devices: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each entry needs a whole device, and there is one. Nothing is started here."""
    monkeypatch.setenv("FARM_SIMULATED_GPUS", "1")
    monkeypatch.setattr(up, "device_bytes", lambda _: GPU_BYTES)
    found = up._placement(Settings(), load_catalog(two_devices).pipelines, {})
    assert [(each.pipeline, each.device) for each in found.workers] == [("a", 0)]
    started: Any = {"api": None, "worker a-1": None}
    servers: Any = None
    _show(up.LocalFarm("http://x", "key", tmp_path, {}, servers, started, found.left_out))
    printed = capsys.readouterr().out
    assert "No worker for b: it needs 24.0 GiB, and no device has enough memory left" in printed
    assert "Choose with --workers, for example --workers b=1,a=0" in printed


def workers(live: LiveFarm) -> dict[str, dict[str, object]]:
    def ready() -> dict[str, dict[str, object]] | None:
        rows = {row["pipeline"]: row for row in live.get("/v1/workers")["data"]}
        idle = [row for row in rows.values() if row["state"] == "idle"]
        return rows if len(idle) == 2 else None

    rows = wait_until(ready, 60, "the workers are ready")
    assert rows is not None
    return rows


def seen_by_child(pid: object) -> set[str]:
    """Return the devices that a worker's child processes are allowed to see."""
    found: set[str] = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            wanted = f"{gpus.VISIBLE}=".encode()
            found |= {
                line[len(wanted) :].decode() for line in environment if line.startswith(wanted)
            }
    return found
