"""The embedded SeaweedFS: an S3 server on the loopback address."""

from __future__ import annotations

import json
import signal
from contextlib import closing, suppress
from functools import cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from farm.local import wheels
from farm.local.child import Program, Stage
from farm.local.folder import Folder, Passwords, write_private
from farm.local.ports import HOST, free_ports, noted_ports

if TYPE_CHECKING:
    import boto3

BUCKET = "farm"
REGION = "us-east-1"
PARTS = ("master", "volume", "filer", "s3")
OPTIONS = (
    f"-ip={HOST}",
    f"-ip.bind={HOST}",
    "-dir=.",
    "-filer",
    "-s3",
    "-s3.config=s3.json",
    "-s3.port.iceberg=0",
    "-s3.port.lance=0",
    "-s3.localSocket=s3.sock",
    "-filer.localSocket=filer.sock",
    "-master.telemetry=false",
    "-master.electionTimeout=1s",  # a single master; by default a restart waits 10 to 20 s
    # A bucket opens seven volumes. They grow as they fill, and reserve no space.
    "-master.volumeSizeLimitMB=1024",
    "-volume.max=1000",
    "-volume.id=farm",  # not address:port, which changes between runs
)


def program(folder: Folder, env: dict[str, str]) -> tuple[Program, str]:
    """Return the program that runs SeaweedFS on the folder's data, and its S3 address."""
    home = folder.make("seaweedfs")
    remove_sockets(folder)
    ports = free_ports(2 * len(PARTS), folder.ports / "seaweedfs")
    names = [f"{part}.port{kind}" for part in PARTS for kind in ("", ".grpc")]
    port = dict(zip(names, ports, strict=True))
    write_private(home / "s3.json", json.dumps(_identities(folder.passwords)))
    url = f"http://{HOST}:{port['s3.port']}"
    running = Program(
        name="seaweedfs",
        argv=[wheels.weed(), "server", *OPTIONS, *(f"-{k}={v}" for k, v in port.items())],
        env=env | {"HOME": str(home), "GOMEMLIMIT": "512MiB"},
        log=folder.logs / "seaweedfs.log",
        stage=Stage.SEAWEEDFS,
        ready=lambda: _stores(url, folder.passwords),
        cwd=home,
        # Acknowledged data is on disk. A graceful stop would wait 15 s for internal streams.
        stop_signal=signal.SIGKILL,
    )
    return running, url


def remove_sockets(folder: Folder) -> None:
    """Delete SeaweedFS's sockets in /tmp. It leaves some of them behind."""
    for part, port in product(PARTS, noted_ports(folder.ports / "seaweedfs")):
        with suppress(OSError):
            Path(f"/tmp/seaweedfs-{part}-grpc-{port}.sock").unlink()  # noqa: S108  its choice


def _identities(passwords: Passwords) -> dict[str, object]:
    key = {"accessKey": passwords.s3_access_key, "secretKey": passwords.s3_secret_key}
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    return {"identities": [{"name": "farm", "credentials": [key], "actions": actions}]}


def _stores(url: str, passwords: Passwords) -> bool:
    """Store a test object, and return True on success. Create the bucket if it is missing.

    A simpler check is not enough: the S3 port answers before a volume is writable.
    """
    from botocore.config import Config

    config = Config(connect_timeout=2, read_timeout=5, retries={"max_attempts": 0}, proxies={})
    session = _session(passwords.s3_access_key, passwords.s3_secret_key)
    with closing(session.client("s3", endpoint_url=url, config=config)) as client:
        with suppress(client.exceptions.BucketAlreadyOwnedByYou):
            client.create_bucket(Bucket=BUCKET)
        client.put_object(Bucket=BUCKET, Key=".ready", Body=b"ready")
        client.delete_object(Bucket=BUCKET, Key=".ready")
    return True


@cache
def _session(access_key: str, secret_key: str) -> boto3.Session:
    """Cache the session: boto3 needs more time to read its S3 data than to ask the server."""
    import boto3

    return boto3.Session(
        aws_access_key_id=access_key, aws_secret_access_key=secret_key, region_name=REGION
    )
