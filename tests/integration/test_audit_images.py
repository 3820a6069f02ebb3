"""The audit reads stored images. It finds deleted images and images with other bytes."""

from __future__ import annotations

import uuid

import pytest

from farm.context import Farm
from farm.domain.image_formats import Format
from farm.domain.invariants import Invariant
from farm.services.audit import audited
from farm.storage import artifact_key
from tests.integration.situations import Jobs, fill
from tests.support.api_server import render
from tests.support.store import register_worker, sql, submit


@pytest.fixture
def filled(farm: Farm, tenant: uuid.UUID) -> Jobs:
    return fill(farm, tenant)


def test_an_image_with_other_bytes_is_found(farm: Farm, filled: Jobs, tenant: uuid.UUID) -> None:
    key = key_of_first_image(farm, tenant, filled.succeeded)
    content = farm.artifacts.get(key)
    farm.artifacts.put(key, content[:-1] + b"\x00")
    found = audited(farm).findings
    assert [(finding.invariant, finding.ordinal, finding.attempt) for finding in found] == [
        ("artifact_truth", 0, 1)
    ]
    assert found[0].where == f"job {filled.succeeded} frame 0 attempt 1"
    farm.artifacts.put(key, content)
    assert audited(farm).ok


def test_an_image_that_is_deleted_is_found_where_images_are_read(
    farm: Farm, filled: Jobs, tenant: uuid.UUID
) -> None:
    farm.artifacts.delete(key_of_first_image(farm, tenant, filled.succeeded))
    assert [finding.detail for finding in audited(farm).findings] == ["its image is not stored"]
    assert audited(farm, sample=0.0).ok


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_images_of_every_format_are_read(farm: Farm, tenant: uuid.UUID, form: Format) -> None:
    job_id = submit(farm, tenant, format=form)
    worker = register_worker(farm)
    render(worker, worker.must_claim())
    assert audited(farm).ok
    farm.artifacts.delete(key_of_first_image(farm, tenant, job_id, form))
    assert [finding.detail for finding in audited(farm).findings] == ["its image is not stored"]


def key_of_first_image(
    farm: Farm, tenant: uuid.UUID, job_id: uuid.UUID, form: Format = "png"
) -> str:
    [row] = sql(farm, "SELECT sha256 FROM frames WHERE job_id = :id AND ordinal = 0", id=job_id)
    return artifact_key(tenant, job_id, 0, bytes(row.sha256), form)


def test_a_sample_reads_a_part_of_the_images(farm: Farm, tenant: uuid.UUID) -> None:
    submit(farm, tenant, images_per_prompt=64, bucket=8)
    worker = register_worker(farm)
    for _ in range(8):
        render(worker, worker.must_claim())
    report = audited(farm, sample=0.5)
    assert report.ok
    assert 5 < report.checked[Invariant.ARTIFACT_TRUTH] < 59
    assert report.checked[Invariant.LEDGER] == 64
