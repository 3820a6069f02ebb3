"""Free ports on the loopback address."""

from __future__ import annotations

import random
import socket
from pathlib import Path

from farm.local.errors import StackError

HOST = "127.0.0.1"
# Below the ports of outgoing connections (32768 and up on Linux). Otherwise a client that
# reconnects to a restarting server could get the server's own port, and keep it.
RANGE = range(15_000, 30_000)


def is_free(port: int) -> bool:
    """Return True if a server could listen on 127.0.0.1:`port` now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
            # On some kernels, bind succeeds although another socket with SO_REUSEADDR listens.
            probe.listen(1)
        except OSError:
            return False
    return True


def free_port() -> int:
    """Return a free port. Raise StackError if none is found in 1,000 tries."""
    for port in random.sample(RANGE, 1_000):
        if is_free(port):
            return port
    raise StackError(
        f"No free port between {RANGE.start} and {RANGE.stop} on {HOST}. Stop some programs."
    )


def free_ports(count: int, memory: Path) -> list[int]:
    """Return `count` ports: those saved in the file `memory` if all are free, or new ones."""
    noted = noted_ports(memory)
    if len(noted) == count and all(is_free(port) for port in noted):
        return noted
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port())
    memory.write_text(" ".join(str(port) for port in ports))
    return list(ports)


def noted_ports(memory: Path) -> list[int]:
    """Return the ports saved in the file `memory`, or [] if there is no such file."""
    return [int(word) for word in memory.read_text().split()] if memory.is_file() else []
