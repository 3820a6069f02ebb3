"""The embedded Valkey, with a password and an append-only file, over loopback TCP."""

from __future__ import annotations

from farm.local import wheels
from farm.local.child import Program, Stage
from farm.local.folder import Folder, write_private
from farm.local.ports import HOST, free_ports

CONFIG = """\
bind {host}
port {port}
requirepass {password}
dir .
save ""
appendonly yes
appendfsync everysec
maxmemory-policy noeviction
"""


def program(folder: Folder, env: dict[str, str]) -> tuple[Program, str]:
    """Return the program that runs Valkey on the folder's data, and its address with password."""
    home = folder.make("valkey")
    password = folder.passwords.valkey
    [port] = free_ports(1, folder.ports / "valkey")
    # In a file, because every user of the machine can read the command line.
    config = home / "valkey.conf"
    write_private(config, CONFIG.format(host=HOST, port=port, password=password))
    url = f"redis://:{password}@{HOST}:{port}/0"

    def ready() -> bool:
        from redis import Redis

        with Redis.from_url(url, socket_timeout=2, socket_connect_timeout=2) as client:
            return bool(client.ping())

    running = Program(
        name="valkey",
        argv=[wheels.valkey(), str(config)],
        env=env,
        log=folder.logs / "valkey.log",
        stage=Stage.VALKEY,
        ready=ready,
        cwd=home,
    )
    return running, url
