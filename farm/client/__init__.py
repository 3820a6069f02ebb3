"""Client of a farm for programs: `Farm`, and `AsyncFarm` for asyncio. See docs/client.md.

Heavy modules are imported when one of these names is used first.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from farm.client.asynchronous import AsyncFarm, AsyncImage, AsyncJob
    from farm.client.blocking import Farm, Image, Job
    from farm.client.core import JobFailed, WaitTimeout
    from farm.client.events import Event
    from farm.client.webhooks import InvalidSignature, verify_webhook
    from farm.errors import FarmError

__all__ = [
    "AsyncFarm",
    "AsyncImage",
    "AsyncJob",
    "Event",
    "Farm",
    "FarmError",
    "Image",
    "InvalidSignature",
    "Job",
    "JobFailed",
    "WaitTimeout",
    "verify_webhook",
]

DATA = "farm-data"
"""Default data folder of `farm up` and `farm demo`, for messages."""

_PLACES = {
    "farm.client.asynchronous": ("AsyncFarm", "AsyncImage", "AsyncJob"),
    "farm.client.blocking": ("Farm", "Image", "Job"),
    "farm.client.core": ("JobFailed", "WaitTimeout"),
    "farm.client.events": ("Event",),
    "farm.client.webhooks": ("InvalidSignature", "verify_webhook"),
    "farm.errors": ("FarmError",),
}


def __getattr__(name: str) -> object:
    for place, names in _PLACES.items():
        if name in names:
            return getattr(importlib.import_module(place), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
