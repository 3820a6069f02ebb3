"""The data folder: its lock, its passwords, and the paths in it."""

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
    """Passwords of the embedded servers, generated once per folder."""

    postgres: str
    valkey: str
    s3_access_key: str
    s3_secret_key: str


@dataclass(frozen=True)
class Folder:
    """A data folder that is locked by this process."""

    path: Path
    passwords: Passwords

    @property
    def api_key(self) -> Path:
        """Path of the file with the operator's key."""
        return self.path / "api-key"

    @property
    def logs(self) -> Path:
        """Path of the folder with the children's logs."""
        return self.path / "logs"

    @property
    def ports(self) -> Path:
        """Path of the folder with each server's ports, which are used again if they are free."""
        return self.path / "ports"

    def make(self, name: str) -> Path:
        """Return a subfolder that only its owner may read. Create it if it is missing."""
        path = self.path / name
        path.mkdir(mode=0o700, exist_ok=True)
        return path


@contextmanager
def hold(data: Path) -> Iterator[Folder]:
    """Create `data` if missing, and lock it. Raise StackError if another farm up has locked it."""
    data = data.expanduser().resolve()
    try:
        data.mkdir(parents=True, exist_ok=True)
        lock = (data / "lock").open("a+")
    except OSError as error:
        raise StackError(
            f"Cannot write to {data} ({error.strerror}). Choose another folder with --data."
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise StackError(
                f"{data} is in use by another farm up (process {lock.read().strip()}). "
                "Stop that one, or choose another folder with --data."
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield Folder(data, _passwords(data / "passwords.json"))


def write_private(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, readable only by the owner (mode 0600)."""
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
