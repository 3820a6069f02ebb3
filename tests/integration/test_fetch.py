"""`farm fetch` and `farm migrate --create-bucket`: what a deployment does before its first job."""

from __future__ import annotations

import os
from pathlib import Path

import boto3
import pytest

from farm.config import Settings
from tests.integration.test_migrations import env_of
from tests.support.cli_runner import farm


@pytest.fixture
def catalog(tmp_path: Path) -> Path:
    path = tmp_path / "pipelines.toml"
    path.write_text(
        '[pipelines.here]\nsource = "model"\n[pipelines.absent]\nsource = "some-org/absent"\n'
    )
    return path


def fetch(catalog: Path, *names: str) -> tuple[int, str, str]:
    """Fetch without a network: the hub's cache is all there is."""
    env = {
        "FARM_PIPELINES": str(catalog),
        "HF_HOME": str(catalog.parent / "home"),
        "HF_HUB_OFFLINE": "1",
    }
    done = farm("fetch", *names, env=env)
    return done.code, done.out, done.err


def test_a_folder_needs_no_download(catalog: Path) -> None:
    (catalog.parent / "model").mkdir()
    code, out, _ = fetch(catalog, "here")
    assert (code, out) == (0, f"here: model is in {catalog.parent / 'model'}.\n")


def test_one_file_needs_no_download_but_must_be_there(catalog: Path) -> None:
    (catalog.parent / "model").mkdir()
    path = catalog.parent / "dream.safetensors"
    catalog.write_text(f'[pipelines.one]\nsource = "{path.name}"\nconfig = "model"\n')
    code, _, err = fetch(catalog, "one")
    assert code == 1
    assert "There is no file dream.safetensors next to the catalog." in err
    path.touch()
    assert fetch(catalog, "one")[:2] == (0, f"one: dream.safetensors is in {path}.\n")


def test_a_pipeline_that_is_not_in_the_catalog_is_refused(catalog: Path) -> None:
    code, _, err = fetch(catalog, "here", "nowhere")
    assert code == 1
    assert "There is no pipeline 'nowhere' in the catalog. It has absent, here." in err


def test_what_the_hub_does_not_give_is_named(catalog: Path) -> None:
    code, out, err = fetch(catalog, "absent")
    assert (code, out) == (1, "")
    assert "some-org/absent is not a folder next to the catalog" in err
    assert "Traceback" not in err


def test_a_bucket_is_created_once(settings: Settings, tmp_path: Path) -> None:
    env = {**env_of(settings), "FARM_S3_BUCKET": "a-new-bucket"}
    client = boto3.client("s3", endpoint_url=settings.s3_endpoint_url)
    try:
        for _ in range(2):
            done = farm("migrate", "--create-bucket", env={**env, **aws()})
            assert done.code == 0, done.err
        names = [each["Name"] for each in client.list_buckets()["Buckets"]]
        assert names.count("a-new-bucket") == 1
    finally:
        client.delete_bucket(Bucket="a-new-bucket")
        client.close()


def test_a_storage_that_is_away_is_one_line(settings: Settings) -> None:
    env = {**env_of(settings), **aws(), "FARM_S3_ENDPOINT_URL": "http://127.0.0.1:1"}
    done = farm("migrate", "--create-bucket", env=env)
    assert done.code == 1
    assert "The storage did not create bucket farm: " in done.err
    assert "Traceback" not in done.err


def aws() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
