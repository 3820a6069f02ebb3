"""Traces: the data sent to a real receiver, and a receiver that is away, which costs nothing."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from pydantic import ValidationError

from farm.config import Settings
from farm.context import Farm, open_farm
from farm.domain.spec import FrameSpec
from farm.local.ports import free_port
from farm.pipelines.families.null import write_checkpoint
from farm.tracing import Traces
from tests.support.api_server import serving
from tests.support.noise_family import Noise
from tests.support.otlp_receiver import Received, Receiver, receiving
from tests.support.render_loops import assembly_of
from tests.support.store import job_row, new_tenant, submit
from tests.support.waiting import wait_until
from workers.render.loop import RenderLoop

SENDING_SECONDS = 6.0
"""Seconds of one try to send without an answer. Nothing may wait for it."""
STAGES = ["claim", "denoise", "encode", "put", "complete"]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as running:
        yield running


@pytest.fixture
def settings(settings: Settings, receiver: Receiver) -> Settings:
    return settings.model_copy(update={"otlp_endpoint": receiver.url})


@pytest.fixture
def still(settings: Settings, tmp_path: Path) -> Settings:
    """Return settings with a catalog of one pipeline that renders nothing."""
    write_checkpoint(tmp_path / "null")
    catalog = tmp_path / "pipelines.toml"
    catalog.write_text('[pipelines.still]\nsource = "null"\nbucket = { "default" = 4 }\n')
    return settings.model_copy(update={"pipelines": catalog})


def trace_of(job_id: uuid.UUID | str) -> str:
    return str(job_id).replace("-", "")


def root_of(job_id: uuid.UUID | str) -> str:
    return hashlib.sha256(bytes.fromhex(trace_of(job_id))).hexdigest()[:16]


def check_batch(spans: Sequence[Received], root: str, **attributes: str | int) -> None:
    """Check a batch's stages: each once, below the job's root span, in order."""
    assert [span.name for span in spans] == STAGES
    claim, denoise, encode, put, complete = spans
    assert all(span.parent == root for span in spans)
    assert all(span.ended >= span.started for span in spans)
    assert len({span.id for span in spans} | {root}) == 6
    assert claim.ended <= denoise.started <= denoise.ended <= encode.started <= put.started
    assert encode.ended <= put.ended <= complete.started
    for span in spans:
        assert {name: span.attributes[f"farm.{name}"] for name in attributes} == attributes


def test_a_trace_leads_from_the_call_to_the_commit(still: Settings, receiver: Receiver) -> None:
    """The API and the worker share only the job's ID."""
    farm = open_farm(still)
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    before = time.time_ns()
    with serving(farm) as api:
        client = api.client()
        client.headers["traceparent"] = traceparent
        job = api.submit(client, pipeline="still", images_per_prompt=4, step_seconds=0.01)
        line = assembly_of(farm, "still").loop
        line.run()
        line.close()
        assert client.get(f"/v1/jobs/{job['id']}").json()["status"] == "succeeded"
        root, *batch = receiver.await_spans(trace_of(job["id"]), 6)
    farm.close()
    assert (root.name, root.id, root.parent) == ("job submitted", root_of(job["id"]), "")
    assert root.links == [("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331")]
    assert root.attributes == {
        "farm.job": job["id"],
        "farm.pipeline": "still",
        "farm.priority": "normal",
        "farm.frames": 4,
    }
    check_batch(batch, root.id, job=job["id"], frames=4, succeeded=4, attempt=1, batch=4)
    with_names = {(span.attributes["farm.worker"][:6], span.service) for span in batch}
    assert with_names == {("still-", "farm")}
    assert before <= root.started <= batch[1].started <= batch[-1].ended <= time.time_ns()
    assert batch[1].ended - batch[1].started >= 2 * 10**7  # two steps of 10 ms each
    assert receiver.paths == {"/v1/traces"}
    assert len(receiver.spans) == 6


@contextmanager
def worker_process(settings: Settings, pipeline: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run `farm worker`. It sends its spans only at its end."""
    env = {
        "FARM_DATABASE_URL": settings.database_url.get_secret_value(),
        "FARM_REDIS_URL": settings.redis_url.get_secret_value(),
        "FARM_S3_ENDPOINT_URL": str(settings.s3_endpoint_url),
        "FARM_S3_BUCKET": settings.s3_bucket,
        "FARM_PIPELINES": str(settings.pipelines),
        "FARM_SCRATCH_DIR": str(settings.scratch_dir),
        "FARM_CACHE_DIR": str(settings.cache_dir),
        "OTEL_EXPORTER_OTLP_ENDPOINT": settings.otlp_endpoint,
        "OTEL_BSP_SCHEDULE_DELAY": "3600000",
        "OTEL_SERVICE_NAME": "renderers",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "farm.cli", "worker", pipeline], env=os.environ | env
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_worker_sends_its_last_spans_before_it_ends(still: Settings, receiver: Receiver) -> None:
    farm = open_farm(still)
    tenant = new_tenant(farm, "ann")
    job_id = submit(farm, tenant, pipeline="still")
    with worker_process(still, "still") as process:
        wait_until(
            lambda: job_row(farm, tenant, job_id).status == "succeeded", 120, "it is rendered"
        )
        assert [span.name for span in receiver.spans if span.service == "renderers"] == []
        process.terminate()
        assert process.wait(60) == 0
    root, *batch = receiver.await_spans(trace_of(job_id), 6)
    check_batch(batch, root.id, frames=1, succeeded=1)
    assert {span.service for span in batch} == {"renderers"}
    farm.close()


def test_a_batch_of_two_jobs_stands_in_both_traces(
    farm: Farm, tenant: uuid.UUID, loop: RenderLoop, receiver: Receiver
) -> None:
    jobs = {
        submit(farm, tenant, pipeline="noise", bucket=4, images_per_prompt=3): 3,
        submit(farm, new_tenant(farm, "bob"), pipeline="noise", bucket=4): 1,
    }
    loop.run()
    leases = set()
    for job_id, frames in jobs.items():
        _, *batch = receiver.await_spans(trace_of(job_id), 6)
        check_batch(batch, root_of(job_id), job=str(job_id), frames=frames, batch=4)
        leases |= {span.attributes["farm.lease"] for span in batch}
    assert len(leases) == 1


def test_spans_are_bounded_by_batches_and_not_by_frames(
    farm: Farm, tenant: uuid.UUID, loop: RenderLoop, receiver: Receiver
) -> None:
    job_id = submit(farm, tenant, pipeline="noise", images_per_prompt=12)
    loop.run()
    farm.close_traces()
    spans = receiver.await_spans(trace_of(job_id), 16)
    assert len(spans) == len(receiver.spans) == 1 + 3 * len(STAGES)
    assert len({span.attributes["farm.lease"] for span in spans[1:]}) == 3


def test_what_failed_is_traced_too(
    farm: Farm, tenant: uuid.UUID, noise: Noise, loop: RenderLoop, receiver: Receiver
) -> None:
    def disturb(frames: Sequence[FrameSpec], step: int) -> None:
        if len(noise.batches) == 1 and step == 5:
            raise RuntimeError("out of luck")

    noise.disturb = disturb
    job_id = submit(farm, tenant, pipeline="noise")
    loop.run()
    _, *spans = receiver.await_spans(trace_of(job_id), 8)
    first = [span for span in spans if span.attributes["farm.attempt"] == 1]
    assert [(span.name, span.attributes["farm.succeeded"]) for span in first] == [
        ("claim", 0),
        ("complete", 0),
    ]
    second = [span for span in spans if span.attributes["farm.attempt"] == 2]
    check_batch(second, root_of(job_id), frames=1, succeeded=1)


def test_a_job_submitted_twice_has_one_root(
    farm: Farm, loop: RenderLoop, receiver: Receiver
) -> None:
    with serving(farm) as api:
        client = api.client()
        client.headers.update({"Idempotency-Key": "once", "traceparent": "nonsense"})
        first, second = api.submit(client), api.submit(client)
        assert first["id"] == second["id"]
        [root] = receiver.await_spans(trace_of(first["id"]), 1)
    assert root.links == []
    assert len(receiver.spans) == 1  # the API has ended and sent its spans


def test_spans_that_cannot_be_made_cost_nothing(
    farm: Farm, tenant: uuid.UUID, caplog: pytest.LogCaptureFixture
) -> None:
    assert farm.traces is not None
    farm.traces.batch({tenant: {}}, {"claim": (float("nan"), 0.0)})
    farm.traces.submitted(tenant, float("inf"), None, {})
    assert caplog.text.count("Spans were not recorded") == 2


def said_by(words: str) -> str:
    """Return the standard output of a fresh interpreter, without warnings."""
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_without_an_endpoint_nothing_of_it_is_loaded() -> None:
    """redis-py itself loads the SDK's metrics if they are installed."""
    ours = ("farm.tracing", "opentelemetry.sdk.trace", "opentelemetry.exporter", "google.protobuf")
    words = (
        "import sys, api.app; from workers.render import celery_app;"
        "from farm.config import Settings;"
        "from farm.context import open_farm; assert open_farm(Settings()).traces is None;"
        f"print([name for name in sys.modules if name.startswith({ours})])"
    )
    assert said_by(words) == "[]"


def test_where_it_is_not_installed_the_farm_starts_without() -> None:
    words = (
        "import sys; sys.modules['opentelemetry'] = None;"
        "import logging; logging.basicConfig(stream=sys.stdout, format='%(message)s');"
        "from farm.config import Settings; from farm.context import open_farm;"
        "assert open_farm(Settings(otlp_endpoint='http://127.0.0.1:4318')).traces is None"
    )
    assert said_by(words) == "Traces are not sent: run pip install 'farm[traces]'."


def test_the_endpoint_is_opentelemetrys_own_or_the_farms(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "FARM_OTLP_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    assert Settings().otlp_endpoint == ""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318")
    assert Settings().otlp_endpoint == "http://collector:4318"
    monkeypatch.setenv("FARM_OTLP_ENDPOINT", "")
    assert Settings().otlp_endpoint == ""
    monkeypatch.setenv("FARM_OTLP_ENDPOINT", "collector:4317")
    with pytest.raises(
        ValidationError, match=r"OTEL_EXPORTER_OTLP_ENDPOINT\) must begin with http"
    ):
        Settings()


@pytest.mark.parametrize("kind", ["nobody listens", "nobody answers"])
def test_a_receiver_that_is_away_costs_nothing(
    farm: Farm,
    tenant: uuid.UUID,
    loop: RenderLoop,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", str(round(SENDING_SECONDS)))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1] if kind == "nobody answers" else free_port()
        nowhere = farm.settings.model_copy(update={"otlp_endpoint": f"http://127.0.0.1:{port}"})
        farm.close_traces()
        farm.traces = Traces(nowhere.otlp_endpoint)
        moments = [time.monotonic()]
        with serving(farm, nowhere) as api:
            job_id = submit(farm, tenant, pipeline="noise", images_per_prompt=40)
            moments.append(time.monotonic())
            loop.run()
            moments.append(time.monotonic())
            assert job_row(farm, tenant, job_id).status == "succeeded"
            assert api.submit(api.client())["status"] == "queued"
            moments.append(time.monotonic())
        moments.append(time.monotonic())
        farm.close_traces()
        moments.append(time.monotonic())
    took = [after - before for before, after in pairwise(moments)]
    assert max(took) < SENDING_SECONDS, took

    def senders() -> list[str]:
        names = [thread.name for thread in threading.enumerate()]
        return [name for name in names if name.startswith(("Otel", "traces-close"))]

    # They go on trying, and use `random`, which later tests of this process seed.
    wait_until(lambda: not senders(), 60, "the senders end")
