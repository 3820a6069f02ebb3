"""Steps of an export: a job of ten prompts, its pictures, its shards, its files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import httpx

from farm.context import Farm
from farm.services.exports.service import parse_place
from farm.store import destinations, keys
from farm.store import exports as stored
from farm.store.engine import one_statement, transaction
from farm.store.exports import Shard
from tests.support.api_server import render
from tests.support.store import register_worker, sql
from workers.exporter import Exporter

LINES: list[dict[str, Any]] = [
    {"prompt": f"a star, number {number} ✨", "key": f"k{number}", "labels": {"n": str(number)}}
    for number in range(10)
]


def submit(client: httpx.Client, **fields: Any) -> str:
    """Submit a job of the ten LINES. Return its ID."""
    content = b"".join(json.dumps(line).encode() + b"\n" for line in LINES)
    source = client.post("/v1/inputs", content=content).json()["id"]
    body = {"pipeline": "demo", "input": source, "steps": 2, "bucket": 4, **fields}
    response = client.post("/v1/jobs", json=body)
    assert response.status_code == 202, response.text
    return str(response.json()["id"])


def render_all(farm: Farm, *, dead: int | None = None) -> None:
    """Render all waiting frames, except that this ordinal ends dead."""
    worker = register_worker(farm)
    while lease := worker.claim():
        lost = [frame.fence for frame in lease.frames if frame.ordinal == dead]
        if lost:
            worker.fail(lease, retryable=False, fences=lost)
        render(worker, lease, *[frame.ordinal for frame in lease.frames if frame.ordinal != dead])


def grant(farm: Farm, dest: str, tenant: str = "ann") -> None:
    """Let a tenant export to a place."""
    bucket, prefix = parse_place(dest, "dest")
    with transaction(farm.store) as connection:
        keys.ensure_tenant(connection, tenant)
        assert destinations.grant(connection, tenant, bucket, prefix) is not None


def export(client: httpx.Client, job_id: str, **fields: Any) -> dict[str, Any]:
    """Ask for an export of a job, in shards of four frames. Return the API's answer."""
    response = client.post(f"/v1/jobs/{job_id}/exports", json={"shard_frames": 4, **fields})
    assert response.status_code == 202, response.text
    found: dict[str, Any] = response.json()
    return found


def write_shards(farm: Farm, client: httpx.Client, found: dict[str, Any]) -> dict[str, Any]:
    """Write all shards that are due. Return the export from the API afterwards."""
    Exporter(farm, "exporter").answer()
    now: dict[str, Any] = client.get(f"/v1/exports/{found['id']}").json()
    return now


def written_export(farm: Farm, client: httpx.Client, job_id: str, **fields: Any) -> dict[str, Any]:
    return write_shards(farm, client, export(client, job_id, **fields))


def make_due(farm: Farm) -> None:
    """Make all unwritten shards due now, including those that a writer holds."""
    sql(farm, "UPDATE export_shards SET due_at = clock_timestamp() WHERE done_at IS NULL")


def claim_shard(farm: Farm, writer: str) -> Shard:
    with one_statement(farm.store) as connection:
        shard = stored.claim_shard(connection, writer, 60.0)
    assert shard is not None
    return shard


def download(client: httpx.Client, found: dict[str, Any], folder: Path) -> Path:
    """Download every file that the shards list, and check it. Return the folder."""
    for shard in client.get(f"/v1/exports/{found['id']}/shards?limit=200").json()["data"]:
        for file in shard["files"]:
            answer = client.get(file["url"])
            content = httpx.get(answer.headers["Location"]).content
            assert hashlib.sha256(content).hexdigest() == file["sha256"]
            assert len(content) == file["bytes"]
            path = folder / file["name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return folder


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def stored_keys(farm: Farm, prefix: str, bucket: str | None = None) -> list[str]:
    """List the storage's keys below a prefix, by default in the farm's own bucket."""
    bucket = bucket or farm.settings.s3_bucket
    found = farm.artifacts._s3.list_objects_v2(Bucket=bucket, Prefix=prefix)
    return [each["Key"] for each in found.get("Contents", [])]
