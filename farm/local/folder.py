"""The data folder: who holds it, its passwords, and where things lie in it."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from farm.local.errors import StackError


@dataclass(frozen=True)
class Passwords:
    """What the embedded servers ask for; drawn once for a folder."""

    postgres: str
    valkey: str
    s3_access_key: str
    s3_secret_key: str


@dataclass(frozen=True)
class Folder:
    """A data folder that this process alone holds."""

    path: Path
    passwords: Passwords

    @property
    def api_key(self) -> Path:
        """Where the operator's key is kept."""
        return self.path / "api-key"

    @property
    def logs(self) -> Path:
        """Where each child's log is written."""
        return self.path / "logs"

    @property
    def ports(self) -> Path:
        """Where each server's ports are noted, to keep them where they stay free."""
        return self.path / "ports"

    def make(self, name: str) -> Path:
        """A folder inside that only its owner may read, made if missing."""
        path = self.path / name
        path.mkdir(mode=0o700, exist_ok=True)
        return path


@contextmanager
def hold(data: Path) -> Iterator[Folder]:
    """Make `data` if missing and hold it; raises StackError when another farm up does."""
    data = data.expanduser().resolve()
    try:
        data.mkdir(parents=True, exist_ok=True)
        lock = (data / "lock").open("a+")
    except OSError as error:
        raise StackError(
            f"Cannot write to {data} ({error.strerror}): choose another with --data."
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise StackError(
                f"{data} is in use by another farm up (process {lock.read().strip()}): "
                "stop that one, or choose another folder with --data."
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield Folder(data, _passwords(data / "passwords.json"))


def write_private(path: Path, text: str) -> None:
    """Put `text` at `path`, whole or not at all, readable by the owner alone (mode 0600)."""
    draft = path.with_name(path.name + ".new")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def _passwords(path: Path) -> Passwords:
    if not path.is_file():
        drawn = {name: secrets.token_hex(20) for name in Passwords.__dataclass_fields__}
        write_private(path, json.dumps(drawn, indent=1) + "\n")
    return Passwords(**json.loads(path.read_text()))
