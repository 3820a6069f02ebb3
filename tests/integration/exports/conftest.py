"""A farm whose image storage and export bucket belong to one test, and a client of its API."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from farm.config import Settings
from farm.context import Farm
from tests.integration.exports.scenes import grant, render_all, submit
from tests.support.api_server import Api, serving
from workers.janitor.storage_cleaner import StorageCleaner


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"s3_bucket": f"exports-{uuid.uuid4().hex}"})


@pytest.fixture
def elsewhere(farm: Farm) -> str:
    """Return another bucket, into which Ann may export below `ann/`."""
    bucket = f"to-{farm.settings.s3_bucket}"
    farm.artifacts._s3.create_bucket(Bucket=bucket)
    grant(farm, f"s3://{bucket}/ann")
    return bucket


@pytest.fixture
def api(farm: Farm) -> Iterator[Api]:
    farm.artifacts._s3.create_bucket(Bucket=farm.settings.s3_bucket)
    with serving(farm) as running:
        yield running


@pytest.fixture
def ann(api: Api) -> httpx.Client:
    return api.client("ann")


@pytest.fixture
def bob(api: Api) -> httpx.Client:
    return api.client("bob")


@pytest.fixture
def job(farm: Farm, ann: httpx.Client) -> str:
    """Return the ID of a job of Ann's with ten rendered pictures."""
    job_id = submit(ann)
    render_all(farm)
    return job_id


@pytest.fixture
def storage_work(farm: Farm) -> StorageCleaner:
    """Return the leading janitor's work in the storage. Each step deletes removed objects."""
    return StorageCleaner(farm)


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep the caches of the `datasets` library inside the test's folder."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
