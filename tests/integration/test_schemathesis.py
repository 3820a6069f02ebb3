"""Random calls, valid and invalid by OpenAPI: no 5xx and no undocumented answer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from farm.context import Farm
from tests.support.api_server import Api, render, rendering, serving
from tests.support.store import register_worker

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
EXAMPLES = int(os.environ.get("FARM_TEST_CALLS", "5"))
"""Number of examples for each call, of each kind."""
RARELY_RIGHT = "POST /v1/jobs"
"""A call with so many fields that few random bodies are right. It gets more examples."""
OPENAI = "POST /openai/v1/images/generations"
"""A call that waits for its pictures."""
ALONE: AbstractContextManager[None] = nullcontext()


@pytest.fixture
def api(farm: Farm) -> Iterator[Api]:
    with serving(farm) as running:
        yield running


@pytest.mark.full_size
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_call_fails(api: Api, mode: GenerationMode) -> None:
    """Half of the calls with a job ID use an existing job, with frames in several states."""
    answered: set[tuple[str, int]] = set()
    for found in schemathesis.openapi.from_url(f"{api.url}/openapi.json").get_all_operations():
        assert isinstance(found, Ok), found
        operation = found.ok()
        if mode is GenerationMode.POSITIVE or _takes_something(operation):
            job_id, headers = some_job(api), {"Authorization": f"Bearer {api.key()}"}
            with rendering(register_worker(api.farm)) if operation.label == OPENAI else ALONE:
                statuses = _try(operation, mode, job_id, headers)
            answered |= {(operation.label, status) for status in statuses}
    if mode is GenerationMode.POSITIVE:
        assert (RARELY_RIGHT, 202) in answered
        assert {("GET /v1/jobs/{job_id}/frames/{ordinal}", 200), (OPENAI, 200)} <= answered
    else:
        assert {(RARELY_RIGHT, 422), ("GET /v1/jobs", 422)} <= answered


def some_job(api: Api) -> str:
    client = api.client()
    job = api.submit(client, images_per_prompt=6, bucket=2, priority="interactive")
    worker = register_worker(api.farm)
    render(worker, worker.must_claim())
    worker.fail(worker.must_claim(), retryable=False)
    return str(job["id"])


def _takes_something(operation: Any) -> bool:
    parameters = (operation.path_parameters, operation.query, operation.headers)
    return bool(operation.body or any(len(each.items) for each in parameters))


FRAMING = {"content-length", "transfer-encoding"}
"""Headers of HTTP itself. Wrong values are refused before the call is known."""


def _try(operation: Any, mode: GenerationMode, job_id: str, headers: dict[str, str]) -> set[int]:
    """Make one call in many ways. Return the statuses of the answers."""
    answered: set[int] = set()

    @settings(
        max_examples=EXAMPLES * (4 if operation.label == RARELY_RIGHT else 1),
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode), known=st.booleans())
    def run(case: schemathesis.Case[Any], known: bool) -> None:
        place = case.path_parameters or {}
        if known and "job_id" in place:
            place["job_id"] = job_id
            if isinstance(place.get("ordinal"), int):
                place["ordinal"] %= 8
        query = case.query or {}
        if known and "tenant" in query:
            query["tenant"] = "ann"  # of the key
        for name in [name for name in case.headers or {} if name.lower() in FRAMING]:
            del case.headers[name]
        answered.add(case.call_and_validate(headers=headers, checks=CHECKS).status_code)

    run()
    return answered
