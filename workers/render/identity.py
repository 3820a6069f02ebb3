"""Identity of a worker. The parent passes it to its child process in the environment."""

from __future__ import annotations

import os
import signal
import socket
import uuid
from dataclasses import dataclass

VARIABLE = "FARM_WORKER"
KNOCK = signal.SIGURG
"""Signal from the parent to its child: frames wait, but no bell came, as when Redis is down.

A child without a handler ignores it.
"""


@dataclass(frozen=True)
class Identity:
    """A worker of one lane. It gets a new ID at each start."""

    id: uuid.UUID
    pipeline: str
    host: str
    pid: int
    """Process ID of the parent."""

    @property
    def name(self) -> str:
        """Name for people, for example `demo-1f2e3d4c`. Tenants see it, so it hides the machine."""
        return f"{self.pipeline}-{self.id.hex[:8]}"

    def announce(self) -> None:
        """Write the identity to the environment, where a child process reads it."""
        os.environ[VARIABLE] = f"{self.id} {self.pid} {self.host} {self.pipeline}"


def new_identity(pipeline: str) -> Identity:
    """Create the identity of this process as a worker of a pipeline."""
    return Identity(uuid.uuid4(), pipeline, socket.gethostname(), os.getpid())


def announced_identity() -> Identity:
    """Read the identity that the parent announced."""
    worker_id, pid, host, pipeline = os.environ[VARIABLE].split(" ", 3)
    return Identity(uuid.UUID(worker_id), pipeline, host, int(pid))
