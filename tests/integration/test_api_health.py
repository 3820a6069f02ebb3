"""Health, metrics, OpenAPI, and the API's answers while a server is away."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr

from api.routes.health import SCHEMA_SECONDS
from farm.config import DEMO_CATALOG, Settings
from farm.context import Farm
from farm.domain.spec import Priority
from farm.local.ports import free_port
from farm.store import workers
from farm.store.engine import transaction
from farm.store.histograms import place
from farm.store.workers import Account
from tests.integration.test_api_refusals import check_problem
from tests.support.api_server import JOB, Api, listening, render, serving
from tests.support.store import let_leases_expire, register_worker, sql


@pytest.fixture
def api(farm: Farm) -> Iterator[Api]:
    with serving(farm) as running:
        yield running


def without(settings: Settings, server: str) -> Settings:
    """Return the same settings, with an address for one server where nothing listens."""
    nowhere = f"127.0.0.1:{free_port()}"
    urls: dict[str, dict[str, Any]] = {
        "postgres": {"database_url": SecretStr(f"postgresql://farm@{nowhere}/farm")},
        "redis": {"redis_url": SecretStr(f"redis://{nowhere}/0")},
        "s3": {"s3_endpoint_url": f"http://{nowhere}"},
    }
    return settings.model_copy(update=urls[server])


def readiness(url: str, **query: str) -> tuple[int, dict[str, Any]]:
    response = httpx.get(f"{url}/readyz", params=query, timeout=60)
    return response.status_code, response.json()


def test_ready_when_every_server_answers(api: Api) -> None:
    status, parts = readiness(api.url)
    assert status == 200
    assert parts["ready"] is True
    assert all(parts[name] == {"ok": True, "detail": "ok"} for name in ("postgres", "redis", "s3"))
    assert httpx.get(f"{api.url}/healthz").json() == {"ok": True}


@pytest.mark.parametrize(("server", "status"), [("postgres", 503), ("s3", 503), ("redis", 200)])
def test_readiness_names_the_server_that_is_away(
    settings: Settings, server: str, status: int
) -> None:
    with listening(without(settings, server)) as url:
        answered, parts = readiness(url)
        assert answered == status
        assert parts["ready"] is (status == 200)
        assert [name for name in ("postgres", "redis", "s3") if not parts[name]["ok"]] == [server]
        assert httpx.get(f"{url}/healthz").status_code == 200


@pytest.mark.parametrize("server", ["postgres", "s3", "redis"])
def test_a_load_balancer_keeps_an_api_whose_server_is_away(settings: Settings, server: str) -> None:
    """All API processes share their servers: they would leave the load balancer together."""
    with listening(without(settings, server)) as url:
        status, parts = readiness(url, only="schema")
    assert (status, parts["ready"]) == (200, True)
    assert parts["postgres"]["ok"] is (server != "postgres")
    assert parts["redis"] is parts["s3"] is None


def test_a_load_balancer_is_not_kept_waiting_by_a_silent_postgres(settings: Settings) -> None:
    """It accepts the connection and says nothing. Five looks at once do not wait for each other."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = f"postgresql://farm@127.0.0.1:{silent.getsockname()[1]}/farm"
        url = SecretStr(place)
        with listening(settings.model_copy(update={"database_url": url})) as address:
            began = time.monotonic()
            with ThreadPoolExecutor(5) as visitors:
                looks = visitors.map(lambda _: readiness(address, only="schema"), range(5))
                assert {(status, parts["ready"]) for status, parts in looks} == {(200, True)}
            assert time.monotonic() - began < 2 * SCHEMA_SECONDS


def test_readiness_of_something_unknown_is_refused(api: Api) -> None:
    problem = check_problem(httpx.get(f"{api.url}/readyz?only=s3"), 422)
    assert problem["error"]["param"] == "only"


def test_not_ready_on_an_older_schema(api: Api) -> None:
    sql(api.farm, "DELETE FROM alembic_version")
    for query in ({}, {"only": "schema"}):
        status, parts = readiness(api.url, **query)
        assert status == 503
        assert "farm migrate" in parts["postgres"]["detail"]
    sql(api.farm, "INSERT INTO alembic_version VALUES ('of a newer version')")
    assert readiness(api.url)[0] == 200


def test_without_postgres_every_call_says_try_again(settings: Settings) -> None:
    headers = {"Authorization": "Bearer farm_any"}
    with listening(without(settings, "postgres")) as url:
        for path in ("/v1/jobs", "/v1/pipelines", "/v1/workers", "/metrics"):
            response = httpx.get(url + path, headers=headers)
            problem = check_problem(response, 503)
            assert problem["detail"] == "Postgres does not answer."
            assert int(response.headers["retry-after"]) > 0
        response = httpx.post(f"{url}/v1/jobs", headers=headers, json=JOB)
        check_problem(response, 503)
        assert response.headers["x-should-retry"] == "true", "nothing can have been stored"


def test_without_redis_a_job_is_still_taken(farm: Farm) -> None:
    with serving(farm, without(farm.settings, "redis")) as api:
        assert api.submit(api.client())["status"] == "queued"
        assert api.jobs_stored() == 1


ORDER = ("pipeline", "priority", "outcome", "stage", "state", "le")
"""Order of the labels."""


def samples(url: str) -> dict[tuple[str, ...], float]:
    """Return the samples of /metrics, by name, pipeline (if any) and other label."""
    text = httpx.get(f"{url}/metrics").text
    return {
        (sample.name, *(sample.labels[name] for name in ORDER if name in sample.labels)): (
            sample.value
        )
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_count_what_happened(api: Api) -> None:
    client = api.client()
    api.submit(client, images_per_prompt=5, bucket=2)
    api.submit(client, priority="bulk", images_per_prompt=100)
    worker = register_worker(api.farm)
    lease = worker.must_claim()
    render(worker, lease)
    with transaction(api.farm.store) as connection:
        batch = Account(
            succeeded=2,
            denoise_seconds=1.5,
            encode_seconds=0.25,
            put_seconds=0.5,
            work_seconds=1.6,
            denoise_buckets=Counter([place(0.2), place(1.5), place(2000.0)]),
            wait_buckets=Counter([place(0.3, Priority.NORMAL)]),
        )
        workers.account(connection, worker.id, batch)
    worker.must_claim()
    let_leases_expire(api.farm)
    seen = samples(api.url)
    assert seen["farm_queue_frames", "demo", "interactive"] == 0
    assert seen["farm_queue_frames", "demo", "normal"] == 3
    assert seen["farm_queue_frames", "demo", "bulk"] == 100
    assert seen["farm_frames_total", "demo", "succeeded"] == 2
    assert seen["farm_stage_seconds_total", "demo", "denoise"] == 1.5
    assert seen["farm_stage_seconds_total", "demo", "put"] == 0.5
    assert seen["farm_work_seconds_total", "demo"] == 1.6
    assert seen["farm_batches_total", "demo"] == 1
    assert seen["farm_lease_expiries_total", "demo"] == 1
    assert seen["farm_workers", "demo", "idle"] + seen["farm_workers", "demo", "loading"] == 1
    assert seen["farm_workers", "demo", "failed"] == 0
    assert 0 < seen["farm_oldest_waiting_seconds", "demo", "bulk"] < 600
    assert seen["farm_oldest_waiting_seconds", "demo", "interactive"] == 0
    assert seen[("farm_database_bytes",)] > 1_000_000
    bounds = ("0.25", "0.5", "1.0", "2.0", "1024.0", "+Inf")
    counts = [seen["farm_denoise_seconds_bucket", "demo", le] for le in bounds]
    assert counts == [1, 1, 1, 2, 2, 3]
    for priority, waits in ("interactive", [0, 0]), ("normal", [0, 1]), ("bulk", [0, 0]):
        counts = [seen["farm_wait_seconds_bucket", "demo", priority, le] for le in bounds[:2]]
        assert counts == waits
    assert seen["farm_spooled_bytes", "demo"] == 0


def test_pipelines_tell_what_a_job_takes(api: Api) -> None:
    register_worker(api.farm)
    [demo] = api.client().get("/v1/pipelines").json()["data"]
    assert (demo["name"], demo["family"], demo["workers"]) == ("demo", "stable_diffusion", 1)
    assert demo["problem"] is None
    assert demo["defaults"]["width"] == 64
    assert demo["parameters"]["properties"]["steps"]["maximum"] == 1000
    assert demo["buckets"]["64x64"] == 8
    assert demo["limits"]["max_pixels"] == 65_536


def test_a_broken_checkpoint_hides_no_other_pipeline(farm: Farm, tmp_path: Path) -> None:
    catalog = tmp_path / "pipelines.toml"
    good = DEMO_CATALOG.read_text().replace('"model"', f'"{DEMO_CATALOG.parent / "model"}"')
    catalog.write_text(f'{good}\n[pipelines.broken]\nsource = "."\n')
    with serving(farm, farm.settings.model_copy(update={"pipelines": catalog})) as api:
        broken, demo = api.client().get("/v1/pipelines").json()["data"]
    assert (broken["name"], broken["parameters"]) == ("broken", None)
    assert broken["problem"]
    assert (demo["name"], demo["problem"]) == ("demo", None)


def test_openapi_tells_the_whole_job(api: Api) -> None:
    document = httpx.get(f"{api.url}/openapi.json").json()
    job = document["components"]["schemas"]["JobSpec"]
    assert job["additionalProperties"] is False
    assert job["required"] == ["pipeline"]
    assert job["oneOf"] == [{"required": ["prompts"]}, {"required": ["input"]}]
    assert {"pipeline", "prompts", "seed", "grid", "width", "steps", "sampler"} <= set(
        job["properties"]
    )
    assert "params" not in job["properties"]
    submit = document["paths"]["/v1/jobs"]["post"]
    statuses = {"200", "202", "400", "401", "403", "409", "413", "422", "429", "503"}
    assert set(submit["responses"]) == statuses
    for status, response in submit["responses"].items():
        media = "application/json" if status in {"200", "202"} else "application/problem+json"
        assert list(response["content"]) == [media]
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_the_api_loads_neither_torch_nor_diffusers() -> None:
    words = (
        "import sys, api.app; api.app.create_app(); print({'torch', 'diffusers'} & {*sys.modules})"
    )
    found = subprocess.run(
        [sys.executable, "-c", words], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "set()"


def test_an_unexpected_error_tells_nothing_of_the_inside(
    api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    sql(api.farm, "DROP TABLE leases CASCADE")
    response = api.client().get("/v1/workers")
    problem = check_problem(response, 500)
    assert "leases" not in response.text
    assert response.headers["x-request-id"] in problem["detail"]
    assert response.headers["x-request-id"] in caplog.text


def test_an_idle_connection_outlives_those_of_clients(farm: Farm) -> None:
    """A client that keeps it for 5 s, as httpx does, must not meet a closed one."""
    with serving(farm) as api:
        connection = HTTPConnection("127.0.0.1", int(api.url.rpartition(":")[2]), timeout=6.5)
        with closing(connection):
            for _ in range(2):
                connection.request("GET", "/healthz")
                with connection.getresponse() as answer:
                    assert (answer.status, answer.read()) == (200, b'{"ok":true}')
            with pytest.raises(TimeoutError):
                connection.sock.recv(1)
