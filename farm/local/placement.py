"""Placement: the CUDA device of each worker that `farm up` starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from farm.errors import InvalidRequest
from farm.humanize import size
from farm.pipelines.runtime.gpus import Gpu


@dataclass(frozen=True)
class Entry:
    """An entry of the catalog, as placement sees it."""

    name: str
    uses_gpu: bool
    bytes: int | None = None
    """Device memory that it needs. None: its weights are not on this machine yet."""


@dataclass(frozen=True)
class Placed:
    """A worker that is to be started."""

    pipeline: str
    number: int
    """Number among the workers of its pipeline, from 1."""
    device: int | None
    """Number of its CUDA device. None: it uses none."""


@dataclass
class Placement:
    """Workers to start, and the entries for which there is no room."""

    workers: list[Placed] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    """Reason by pipeline."""


def place(entries: Sequence[Entry], gpus: Sequence[Gpu], asked: Mapping[str, int]) -> Placement:
    """Give each worker a device.

    Every entry gets one worker, or as many as asked for. If nothing is asked for and devices are
    left, the first entry that uses them gets one worker on each. If there are fewer devices than
    workers, they share a device where the headers of their weights say that they fit together.

    Args:
        entries: of the catalog, in its order.
        gpus: CUDA devices of this machine. Without any, no worker gets one.
        asked: number of workers by pipeline. 0 leaves an entry out.

    Raises:
        InvalidRequest: a worker that was asked for has no room.
    """
    found = Placement()
    counts = {entry.name: asked.get(entry.name, 1) for entry in entries}
    on_gpus = [entry for entry in entries if entry.uses_gpu] if gpus else []
    if on_gpus and not asked:
        counts[on_gpus[0].name] += max(0, len(gpus) - len(on_gpus))
    devices = [_Device(gpu) for gpu in gpus]
    # The first worker of every entry, then the second ones: an entry is left out last of all.
    for number in range(1, max(counts.values(), default=0) + 1):
        for entry in entries:
            if number > counts[entry.name]:
                continue
            if entry not in on_gpus:
                found.workers.append(Placed(entry.name, number, None))
                continue
            device = _device_for(entry, devices)
            if device is not None:
                devices[device].entries.append(entry)
                found.workers.append(Placed(entry.name, number, device))
            elif entry.name in asked:
                raise InvalidRequest(
                    f"--workers: there is no room for worker {number} of {entry.name}: "
                    f"{_why(entry, devices)}. Ask for fewer workers.",
                    param="workers",
                )
            else:
                found.left_out[entry.name] = _why(entry, devices)
    return found


@dataclass
class _Device:
    gpu: Gpu
    entries: list[Entry] = field(default_factory=list)

    def has_room(self, entry: Entry) -> bool:
        """Return True if an entry fits. One of unknown need fits on an empty device only."""
        needs = [each.bytes for each in (*self.entries, entry)]
        known = [need for need in needs if need is not None]
        if len(known) < len(needs):
            return not self.entries
        return sum(known) <= self.gpu.bytes


def _device_for(entry: Entry, devices: Sequence[_Device]) -> int | None:
    free = [number for number, device in enumerate(devices) if device.has_room(entry)]
    return min(free, key=lambda number: len(devices[number].entries), default=None)


def _why(entry: Entry, devices: Sequence[_Device]) -> str:
    if entry.bytes is None:
        return "its weights are not here yet, so it needs an empty device, and there is none"
    largest = max(device.gpu.bytes for device in devices)
    if entry.bytes > largest:
        return f"it needs {size(entry.bytes)}, and the largest device has {size(largest)}"
    return f"it needs {size(entry.bytes)}, and no device has enough memory left"
