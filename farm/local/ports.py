"""Free ports on the loopback address."""

from __future__ import annotations

import random
import socket
from pathlib import Path

from farm.local.errors import StackError

HOST = "127.0.0.1"
# Below where kernels pick ports of outgoing connections (32768 on Linux): a client that redials
# a server being restarted could otherwise be handed the server's own port, and keep it.
RANGE = range(15_000, 30_000)


def is_free(port: int) -> bool:
    """Whether a server could listen on 127.0.0.1:`port` now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
            # Binding alone passes beside a listener that set SO_REUSEADDR on some kernels.
            probe.listen(1)
        except OSError:
            return False
    return True


def free_port() -> int:
    """A port that nothing listens on; raises StackError when none is found in 1,000 tries."""
    for port in random.sample(RANGE, 1_000):
        if is_free(port):
            return port
    raise StackError(f"No free port between {RANGE.start} and {RANGE.stop} on {HOST}: free some.")


def free_ports(count: int, memory: Path) -> list[int]:
    """`count` free ports: those noted in the file `memory` where still free, else new ones."""
    noted = noted_ports(memory)
    if len(noted) == count and all(is_free(port) for port in noted):
        return noted
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port())
    memory.write_text(" ".join(str(port) for port in ports))
    return list(ports)


def noted_ports(memory: Path) -> list[int]:
    """The ports noted in the file `memory`; none when there is no such file."""
    return [int(word) for word in memory.read_text().split()] if memory.is_file() else []
