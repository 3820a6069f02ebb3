"""Jobs on the pipeline `noise`, and the faults that a test puts into their batches."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from farm.context import Farm
from farm.domain.spec import FrameSpec
from farm.store import workers
from farm.store.engine import transaction
from tests.support.noise_family import Disturb
from tests.support.store import sql, submit

LAST_STEP = 9
"""Index of the last of a batch's ten steps."""


def submit_noise(farm: Farm, tenant: uuid.UUID, **fields: Any) -> uuid.UUID:
    """Submit a job to `noise`, for example `submit_noise(farm, tenant, images_per_prompt=6)`."""
    return submit(farm, tenant, pipeline="noise", **fields)


def at_step(number: int, act: Callable[[], object]) -> Disturb:
    """Return a hook that acts at this step of every batch."""

    def disturb(_frames: Sequence[FrameSpec], step: int) -> None:
        if step == number:
            act()

    return disturb


def always(error: Exception) -> Disturb:
    """Return a hook that raises this error at the first step."""

    def disturb(_frames: Sequence[FrameSpec], _step: int) -> None:
        raise error

    return disturb


def take(seconds: float) -> None:
    """Take this time, like a step or an encoding of a real pipeline."""
    threading.Event().wait(seconds)


def lane_sums(farm: Farm) -> dict[str, Any]:
    """Read the sums of the lane's workers."""
    with transaction(farm.store) as connection:
        return dict(workers.sums(connection)[0]._asdict())


def leases_left(farm: Farm) -> int:
    return int(sql(farm, "SELECT count(*) FROM leases")[0][0])
