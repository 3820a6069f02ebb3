"""CUDA devices of this machine, and the device memory that a pipeline needs.

Neither loads torch in this process: a process that never renders must hold no device.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from farm.config import Settings
from farm.errors import CatalogError, FarmError
from farm.pipelines.catalog import Pipeline, Weights
from farm.pipelines.checkpoints.hub import cached_folder
from farm.pipelines.checkpoints.weights import parameter_counts
from farm.pipelines.runtime.devices import BYTES, dtype_of

VISIBLE = "CUDA_VISIBLE_DEVICES"
"""Variable that limits a process to some devices.

See https://docs.nvidia.com/cuda/cuda-c-programming-guide/#cuda-environment-variables.
"""
LIST_SECONDS = 120.0

ROOM_BYTES = 2 * 2**30
ROOM_SHARE = 0.25
"""Memory for a batch, in addition to the weights: a quarter of them, at least ROOM_BYTES."""

SCRIPT = """
import json, torch
found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
print(json.dumps([[str(getattr(each, "uuid", "")), each.name, each.total_memory]
                  for each in found]))
"""


class Gpu(NamedTuple):
    """A CUDA device that this process may use."""

    token: str
    """Its name for CUDA_VISIBLE_DEVICES."""
    id: str
    """Its UUID, the same in every process and container. Without one, its token and the host."""
    name: str
    bytes: int


def list_gpus(settings: Settings) -> list[Gpu]:
    """List the CUDA devices that this process may use, in torch's order.

    A short process asks torch, so devices, their order and MIG slices are those that a worker sees.

    Raises:
        FarmError: torch cannot list them, although the machine has devices.
    """
    if settings.simulated_gpus:
        numbers = range(settings.simulated_gpus)
        return [Gpu(str(each), f"simulated-{each}", "Simulated", 24 * 2**30) for each in numbers]
    if not _has_devices():
        return []
    try:
        ended = subprocess.run(  # noqa: S603 - the argv is ours
            [sys.executable, "-c", SCRIPT],
            capture_output=True,
            text=True,
            timeout=LIST_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise FarmError(
            f"The driver did not list the CUDA devices within {LIST_SECONDS:g} s. "
            "Check it: `nvidia-smi`."
        ) from error
    if ended.returncode:
        last = ended.stderr.strip().splitlines()[-1:]
        raise FarmError(f"torch cannot list the CUDA devices: {''.join(last)}")
    found: list[tuple[str, str, int]] = json.loads(ended.stdout.splitlines()[-1])
    tokens = [token.strip() for token in os.environ.get(VISIBLE, "").split(",") if token.strip()]
    host = os.uname().nodename
    return [
        Gpu(token, uuid or f"{host}/{token}", name, size)
        for token, (uuid, name, size) in zip(
            tokens or map(str, range(len(found))), found, strict=False
        )
    ]


def _has_devices() -> bool:
    """Return True if the system shows a CUDA device: of a driver, or of WSL."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()


def device_bytes(pipeline: Pipeline) -> int | None:
    """Estimate the device memory of a pipeline from the headers of its weights, in bytes.

    With `offload`, only the largest component is on the device at a time.

    Returns:
        None if weights are not on this machine yet.

    Raises:
        CatalogError: a local checkpoint cannot be read.
    """
    width = BYTES[dtype_of(pipeline, "cuda")]
    sizes: list[int] = []
    for part in (pipeline, *pipeline.parts.values()):
        counts = _counts(part, pipeline.variant_of(part))
        if not any(counts):
            return None
        sizes += [count * width for count in counts]
    weights = max(sizes) if pipeline.offload else sum(sizes)
    return weights + max(ROOM_BYTES, int(weights * ROOM_SHARE))


def _counts(part: Weights, variant: str | None) -> list[int]:
    """Count the parameters of each component. Empty if the weights are not on this machine."""
    folder = Path(part.checkpoint) if part.is_local else cached_folder(part)
    if folder is None:
        return []
    try:
        return parameter_counts(folder, variant)
    except (OSError, ValueError) as error:
        raise CatalogError(f"{part.source}: its weights cannot be read: {error}") from error
