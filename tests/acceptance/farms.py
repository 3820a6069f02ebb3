"""A whole farm for tests, run by `farm up` with short leases."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from farm.local import LocalFarm, running_farm
from farm.pipelines.families.null import write_checkpoint
from tests.support.waiting import wait_until

ENDED = {"succeeded", "partial", "failed", "cancelled"}
QUICK = {
    "FARM_LEASE_SECONDS": "4",
    "FARM_HEARTBEAT_SECONDS": "0.5",
    "FARM_SWEEP_SECONDS": "0.5",
    "FARM_RETRY_SECONDS": "0.1",
    "FARM_PROGRESS_SECONDS": "0.1",
    "FARM_WEBHOOK_NETWORKS": "127.0.0.0/8",
}


@dataclass(frozen=True)
class LiveFarm:
    """A running farm, and a client with an operator key."""

    farm: LocalFarm
    client: httpx.Client
    pipeline: str

    def get(self, path: str, **params: Any) -> Any:
        response = self.client.get(path, params=params)
        response.raise_for_status()
        return response.json()

    def submit(self, **fields: Any) -> dict[str, Any]:
        response = self.client.post("/v1/jobs", json={"pipeline": self.pipeline, **fields})
        assert response.status_code == 202, response.text
        job: dict[str, Any] = response.json()
        return job

    def ended(self, job_id: str, seconds: float = 120.0) -> dict[str, Any]:
        def end() -> dict[str, Any] | None:
            job: dict[str, Any] = self.get(f"/v1/jobs/{job_id}")
            return job if job["status"] in ENDED else None

        job = wait_until(end, seconds, f"job {job_id} ended")
        assert job is not None
        return job

    def halfway(self, job_id: str) -> dict[str, Any]:
        """Wait until some frames of a job are done and others run."""

        def between() -> dict[str, Any] | None:
            job: dict[str, Any] = self.get(f"/v1/jobs/{job_id}")
            assert job["status"] not in ENDED, "the job was over before it could be disturbed"
            return job if job["counts"]["succeeded"] and job["counts"]["running"] else None

        job = wait_until(between, 120.0, f"job {job_id} was halfway")
        assert job is not None
        return job

    def frames(self, job_id: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        after = None
        while True:
            params = {"limit": 200} | ({"after": after} if after is not None else {})
            page = self.get(f"/v1/jobs/{job_id}/frames", **params)
            rows += page["data"]
            after = page["next"]
            if after is None:
                return rows

    def image(self, job_id: str, ordinal: int) -> bytes:
        response = self.client.get(
            f"/v1/jobs/{job_id}/frames/{ordinal}/image", follow_redirects=False
        )
        assert response.status_code == 307, response.text
        stored = httpx.get(response.headers["location"])
        stored.raise_for_status()
        return stored.content


def null_catalog(folder: Path) -> Path:
    """Write a catalog with one pipeline that loads nothing and waits in each step."""
    write_checkpoint(folder / "null")
    path = folder / "pipelines.toml"
    path.write_text('[pipelines.null]\nsource = "null"\nbucket = { "default" = 16 }\n')
    return path


@contextmanager
def running(data: Path, pipeline: str, catalog: Path | None = None) -> Iterator[LiveFarm]:
    """Run a whole farm with short leases during the block."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in QUICK.items():
            patch.setenv(name, value)
        with running_farm(data, pipelines=catalog) as farm:
            headers = {"Authorization": f"Bearer {farm.api_key}"}
            with httpx.Client(base_url=farm.url, headers=headers, timeout=30) as client:
                yield LiveFarm(farm, client, pipeline)
