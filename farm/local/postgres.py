"""The embedded Postgres: the database `farm` of the user `farm`, over loopback TCP."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
from pathlib import Path

from farm.local import wheels
from farm.local.child import Program, Stage, launched
from farm.local.errors import StackError
from farm.local.folder import Folder, write_private
from farm.local.ports import HOST, free_ports

INITDB_SECONDS = 120.0


def program(folder: Folder, env: dict[str, str]) -> tuple[Program, str]:
    """Return the program that runs Postgres on the folder's data, and its address.

    Missing data is created.
    """
    home = folder.make("postgres")
    user = _own(home)
    data = home / "data"
    if not data.exists():
        _initdb(folder, home, user, env)
    [port] = free_ports(1, folder.ports / "postgres")
    settings = {
        "listen_addresses": HOST,
        "port": str(port),
        "unix_socket_directories": "",
        "max_connections": "200",
    }
    options = [word for key, value in settings.items() for word in ("-c", f"{key}={value}")]
    probe = [wheels.postgres("pg_isready"), "-q", "-h", HOST, "-p", str(port)]

    def ready() -> bool:
        return subprocess.run(probe, env=env, check=False).returncode == 0  # noqa: S603

    running = Program(
        name="postgres",
        argv=[wheels.postgres("postgres"), "-D", str(data), *options],
        env=env,
        log=folder.logs / "postgres.log",
        stage=Stage.POSTGRES,
        ready=ready,
        cwd=home,
        user=user,
        stop_signal=signal.SIGINT,  # fast shutdown: ends sessions, writes a checkpoint
        grace=30.0,
        orphan_signal=signal.SIGINT,
    )
    return running, f"postgresql://farm:{folder.passwords.postgres}@{HOST}:{port}/farm"


def _own(home: Path) -> int:
    """Return the ID of the user to run as, -1 for the current one.

    Postgres refuses root. Root starts it as the folder's owner, or as `nobody` if that is root.
    """
    if os.geteuid() != 0:
        return -1
    owner = home.stat().st_uid
    if owner == 0:
        nobody = pwd.getpwnam("nobody")
        os.chown(home, nobody.pw_uid, nobody.pw_gid)
        owner = nobody.pw_uid
    return owner


def _initdb(folder: Folder, home: Path, user: int, env: dict[str, str]) -> None:
    """Create the data under another name first, so that incomplete data is never used."""
    draft = home / "draft"
    if draft.exists():
        shutil.rmtree(draft)
    password = home / "password"
    write_private(password, folder.passwords.postgres)
    if user >= 0:
        os.chown(password, user, -1)
    locale = ["--no-locale", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
    login = ["--username=farm", "--auth=scram-sha-256", f"--pwfile={password}"]
    _run(["initdb", "-D", str(draft), "--encoding=UTF8", *locale, *login], home, user, env)
    single = ["postgres", "--single", "-D", str(draft), "postgres"]
    _run(single, home, user, env, "CREATE DATABASE farm;\n")
    password.unlink()
    draft.rename(home / "data")


def _run(argv: list[str], home: Path, user: int, env: dict[str, str], text: str = "") -> None:
    try:
        subprocess.run(  # noqa: S603  the argv is ours
            launched([wheels.postgres(argv[0]), *argv[1:]], user),
            input=text,
            env=env,
            cwd=home,
            capture_output=True,
            text=True,
            timeout=INITDB_SECONDS,
            check=True,
            process_group=0,
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        said = str(error.stderr or error)
        raise StackError(f"Postgres's data cannot be created in {home}:\n{said}") from None
