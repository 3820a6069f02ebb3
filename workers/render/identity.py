"""Who a worker is: told by the parent to its spawned child through the environment."""

from __future__ import annotations

import os
import signal
import socket
import uuid
from dataclasses import dataclass

VARIABLE = "FARM_WORKER"
KNOCK = signal.SIGURG
"""Signal from the parent to its child: work waits and no bell came, such as while Redis is away.
A child without a handler ignores it."""


@dataclass(frozen=True)
class Identity:
    """A worker of one lane; it gets a new id each time it starts."""

    id: uuid.UUID
    pipeline: str
    host: str
    pid: int
    """The parent's process."""

    @property
    def name(self) -> str:
        """What people call it; tenants see it, so it tells nothing of the machine."""
        return f"{self.pipeline}-{self.id.hex[:8]}"

    def announce(self) -> None:
        """Put it where a spawned child finds it."""
        os.environ[VARIABLE] = f"{self.id} {self.pid} {self.host} {self.pipeline}"


def new_identity(pipeline: str) -> Identity:
    """Make this process a worker of a pipeline."""
    return Identity(uuid.uuid4(), pipeline, socket.gethostname(), os.getpid())


def announced_identity() -> Identity:
    """Read what the parent announced."""
    worker_id, pid, host, pipeline = os.environ[VARIABLE].split(" ", 3)
    return Identity(uuid.UUID(worker_id), pipeline, host, int(pid))
