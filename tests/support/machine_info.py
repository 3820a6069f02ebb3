"""Machine and versions of a measurement, and the pages that report it."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from farm.local import wheels
from farm.process import cores

PACKAGES = ("celery", "sqlalchemy", "psycopg", "torch", "diffusers", "boto3")


def replace_between(path: Path, begin: str, end: str, text: str) -> None:
    """Replace the text between two markers of a page."""
    before, _, rest = path.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def machine() -> str:
    """Return the processor, the usable cores, the memory and the system."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{_processor()}, {cores()} cores, {memory:.0f} GiB, {_system()}"


def versions(also: Sequence[str] = ()) -> str:
    """Return the versions of Python, the relevant packages and the servers."""
    packages = [f"{name} {version(name)}" for name in (*PACKAGES, *also)]
    return ", ".join([f"Python {platform.python_version()}", *packages, *_servers()])


def _servers() -> list[str]:
    def first_line(*argv: str) -> str:
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        return done.stdout.partition("\n")[0]

    postgres = first_line(wheels.postgres("postgres"), "--version").split()[-1]
    valkey = first_line(wheels.valkey(), "--version").partition("v=")[2].split()[0]
    weed = first_line(wheels.weed(), "version").split()
    return [f"Postgres {postgres}", f"Valkey {valkey}", f"SeaweedFS {weed[2]}"]


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for entry in info.read_text().splitlines():
            if entry.startswith("model name"):
                return entry.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _system() -> str:
    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']} ({platform.release()})"
    except OSError:
        return platform.platform()
