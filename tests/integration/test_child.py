"""A worker whose pipeline cannot be loaded: it reports the reason, tries again, and recovers."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from farm.bells import lane
from farm.config import Settings
from farm.context import Farm, open_farm
from farm.errors import CatalogError
from farm.pipelines.runtime import loading
from farm.store.engine import transaction
from farm.store.leadership import leadership
from tests.support.api_server import Api, serving
from tests.support.checkpoint_sandbox import CheckpointSandbox
from tests.support.cli_runner import farm as farm_command
from tests.support.store import job_row, sql, submit
from tests.support.waiting import wait_until
from workers.janitor.janitor import Janitor
from workers.render import child as module
from workers.render.child import LOAD_AGAIN_SECONDS, RenderProcess
from workers.render.identity import Identity
from workers.render.parent import enlist

# diffusers' own samplers hand torch tensors to numpy.array.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

ENTRIES = {
    "sd": 'source = "stable_diffusion"',
    "kandinsky": 'source = "kandinsky22_decoder"\nprior = "kandinsky22_prior"',
}
SMALL: dict[str, Any] = {"steps": 1, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("good")


@pytest.fixture
def bench(good: Path, tmp_path: Path) -> CheckpointSandbox:
    bench = CheckpointSandbox(good, tmp_path)
    bench.take("stable_diffusion", "kandinsky22_decoder", "kandinsky22_prior")
    bench.write_catalog(**ENTRIES)
    return bench


@pytest.fixture
def settings(settings: Settings, bench: CheckpointSandbox) -> Settings:
    return settings.model_copy(update={"pipelines": bench.catalog, "torch_threads": 1})


@pytest.fixture
def api(farm: Farm) -> Iterator[Api]:
    with serving(farm) as running:
        yield running


class Clock:
    """A clock that stands still until a test moves it."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def hire(farm: Farm, pipeline: str, clock: Clock | None = None) -> RenderProcess:
    """Return a worker's child, registered in the same way as by its parent."""
    identity = Identity(uuid.uuid4(), pipeline, "here", os.getpid())
    with transaction(farm.store) as connection:
        enlist(connection, identity)
    return RenderProcess(farm, identity, clock or Clock())


@contextmanager
def reopened(farm: Farm) -> Iterator[Farm]:
    """Open the farm again, as a newly started worker does."""
    opened = open_farm(farm.settings)
    yield opened
    opened.close()


def worker(farm: Farm) -> Any:
    """Read the state and the problem of the only worker."""
    [row] = sql(farm, "SELECT state, problem FROM workers")
    return row


@contextmanager
def told_of(settings: Settings, api: Api) -> Iterator[None]:
    """Set the variables for commands of this process."""
    env = variables(settings) | {"FARM_API_URL": api.url, "FARM_API_KEY": api.key()}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        yield


def variables(settings: Settings) -> dict[str, str]:
    return {
        "FARM_DATABASE_URL": settings.database_url.get_secret_value(),
        "FARM_REDIS_URL": settings.redis_url.get_secret_value(),
        "FARM_S3_ENDPOINT_URL": settings.s3_endpoint_url or "",
        "FARM_S3_BUCKET": settings.s3_bucket,
        "FARM_PIPELINES": str(settings.pipelines),
        "FARM_TORCH_THREADS": "1",
        **({"FARM_RUN_DIR": str(settings.run_dir)} if settings.run_dir else {}),
    }


@contextmanager
def pickle(bench: CheckpointSandbox) -> Iterator[None]:
    bench.rename("stable_diffusion/unet/diffusion_pytorch_model", ".bin")
    yield
    bench.take("stable_diffusion")


@contextmanager
def no_prior(bench: CheckpointSandbox) -> Iterator[None]:
    bench.write_catalog(sd=ENTRIES["sd"], kandinsky='source = "kandinsky22_decoder"')
    yield
    bench.write_catalog(**ENTRIES)


@contextmanager
def no_memory(bench: CheckpointSandbox) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "free_memory", lambda _device: 1000)
        yield


PICKLE = (
    "Pipeline sd: stable_diffusion: unet/diffusion_pytorch_model.bin is a pickle, which can run "
    "any code. Only safetensors are loaded."
)
NO_PRIOR = (
    "Pipeline kandinsky: kandinsky22_decoder needs a prior, which makes embeddings of prompts, and "
    "has no README.md that names one. Set `prior`, for example to "
    "kandinsky-community/kandinsky-2-2-prior."
)
NO_MEMORY = (
    "Out of memory: stable_diffusion needs 0.0 GiB on cpu for its weights, but 0.0 GiB are "
    f"free. {loading.HELP}"
)


@pytest.mark.parametrize(
    ("pipeline", "spoiled", "reason"),
    [("sd", pickle, PICKLE), ("kandinsky", no_prior, NO_PRIOR), ("sd", no_memory, NO_MEMORY)],
    ids=["a pickle", "no prior", "no memory"],
)
def test_a_failed_load_is_told_everywhere(
    farm: Farm,
    api: Api,
    bench: CheckpointSandbox,
    caplog: pytest.LogCaptureFixture,
    pipeline: str,
    spoiled: Callable[[CheckpointSandbox], AbstractContextManager[None]],
    reason: str,
) -> None:
    """The job was accepted before the fault."""
    client = api.client()
    job = api.submit(client, pipeline=pipeline, **SMALL)
    with spoiled(bench):
        with reopened(farm) as started, caplog.at_level(logging.INFO):
            child = hire(started, pipeline)
            child.start()
            assert worker(farm) == ("failed", reason)
            child.answer()  # too early for the next try
        [logged] = [record for record in caplog.records if record.name == module.__name__]
        assert logged.levelname == "ERROR"
        assert logged.getMessage().endswith(f" cannot load pipeline {pipeline}: {reason}")
        assert logged.exc_info is None
        waiting = client.get(f"/v1/jobs/{job['id']}").json()
        assert waiting["status"] == "queued"
        expected = f"The workers cannot render pipeline {pipeline}: {reason}"
        assert waiting["waiting_because"] == expected
        listed = api.client(role="operator").get("/v1/workers").json()["data"]
        assert [(row["state"], row["problem"]) for row in listed] == [("failed", reason)]
        check_doctor(farm, api, pipeline, reason)
    with reopened(farm) as started:
        hire(started, pipeline).start()
        waiting = client.get(f"/v1/jobs/{job['id']}").json()
        assert waiting["waiting_because"] == "A worker is about to take it."


def check_doctor(farm: Farm, api: Api, pipeline: str, reason: str) -> None:
    """Check the doctor's report on the workers, and on the pipeline if its files are faulty."""
    with told_of(farm.settings, api):
        outcome, plain = farm_command("doctor", "--json"), farm_command("doctor")
    assert (outcome.code, plain.code) == (1, 1)
    checks = {check["name"]: check for check in outcome.json["checks"]}
    assert checks[f"workers {pipeline}"]["ok"] is False
    assert checks[f"workers {pipeline}"]["detail"] == f"1 worker failed to load it: {reason}"
    is_in_files = reason != NO_MEMORY
    assert checks[f"pipeline {pipeline}"]["ok"] is not is_in_files
    assert (checks[f"pipeline {pipeline}"]["detail"] == reason) is is_in_files
    assert any(
        line.endswith(f"1 worker failed to load it: {reason}") for line in plain.out.splitlines()
    )
    assert "Correct that problem. The workers then try again by themselves." in plain.out
    assert f"farm worker {pipeline}" not in plain.out, "there is one"
    assert "Traceback" not in plain.out + plain.err


@pytest.mark.parametrize("spoiled", [pickle, no_memory])
def test_a_mended_checkpoint_is_loaded_and_what_waits_rendered(
    farm: Farm,
    bench: CheckpointSandbox,
    tenant: uuid.UUID,
    spoiled: Callable[[CheckpointSandbox], AbstractContextManager[None]],
) -> None:
    clock = Clock()
    child = hire(farm, "sd", clock)
    job_id = submit(farm, tenant, pipeline="sd", **SMALL)
    with spoiled(bench):
        child.start()
        clock.now += LOAD_AGAIN_SECONDS
        child.answer()
        assert worker(farm).state == "failed"
    clock.now += 2 * LOAD_AGAIN_SECONDS - 1
    child.answer()
    assert worker(farm).state == "failed", "not before its time"
    clock.now += 1
    child.answer()
    assert worker(farm) == ("idle", None)
    assert job_row(farm, tenant, job_id).status == "succeeded"


def test_another_checkpoint_in_its_place_is_taken_as_what_it_is(
    farm: Farm, bench: CheckpointSandbox, tenant: uuid.UUID
) -> None:
    """Resolved pipelines are cached. A worker that tries again reads the files again."""
    clock = Clock()
    child = hire(farm, "sd", clock)
    bench.change("stable_diffusion/unet/config.json", block_out_channels=[32, 32])
    child.start()
    assert "do not have the shapes" in worker(farm).problem
    bench.take("sdxl")
    shutil.rmtree(bench.folder / "stable_diffusion")
    (bench.folder / "sdxl").rename(bench.folder / "stable_diffusion")
    clock.now += LOAD_AGAIN_SECONDS
    child.answer()
    assert worker(farm) == ("idle", None)
    job_id = submit(farm, tenant, pipeline="sd", **SMALL, target_size=[64, 64])
    child.answer()
    assert job_row(farm, tenant, job_id).status == "succeeded"


def test_tries_are_further_and_further_apart(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, tries = Clock(), list[float]()

    def fail(_name: str, _entry: object) -> None:
        tries.append(clock.now)
        clock.now += 7  # a failing load takes time, too
        raise CatalogError("It is broken.")

    monkeypatch.setattr(module, "resolve_pipeline", fail)
    child = hire(farm, "sd", clock)
    child.start()
    while clock.now < 3000:
        child.answer()
        clock.now += 1
    pauses = [after - before - 7 for before, after in itertools.pairwise(tries)]
    assert pauses[:7] == [10, 20, 40, 80, 160, 300, 300]


def test_what_nobody_foresaw_is_named_and_the_rest_stays_in_the_log(
    farm: Farm, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_name: str, _entry: object) -> None:
        raise ZeroDivisionError("/a/path/of/this/machine")

    monkeypatch.setattr(module, "resolve_pipeline", fail)
    hire(farm, "sd").start()
    assert worker(farm) == ("failed", "ZeroDivisionError")
    assert "/a/path/of/this/machine" in caplog.text


def test_a_long_message_is_cut(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_name: str, _entry: object) -> None:
        raise CatalogError("It is broken:\n" + "in many ways, " * 1000)

    monkeypatch.setattr(module, "resolve_pipeline", fail)
    hire(farm, "sd").start()
    problem = worker(farm).problem
    assert len(problem) == module.MAX_CHARACTERS
    assert problem.startswith("It is broken: in many ways")


def test_the_janitor_rings_for_a_lane_whose_worker_failed(
    farm: Farm, bench: CheckpointSandbox, tenant: uuid.UUID
) -> None:
    submit(farm, tenant, pipeline="sd", **SMALL)
    with pickle(bench):
        hire(farm, "sd").start()
    bells = farm.bells._redis
    bells.flushdb()  # the first bell is lost, or was answered without success
    with leadership(farm.store, 5.0) as connection:
        assert connection is not None
        Janitor(farm).sweep(connection)
    assert bells.llen(lane("sd")) == 1


def test_a_lane_s_only_worker_comes_back_without_anyone_s_help(
    farm: Farm, bench: CheckpointSandbox, tenant: uuid.UUID, tmp_path: Path
) -> None:
    """Uses the real worker, without a janitor. The first pause passes in real time."""
    run_dir = tmp_path / "run"
    settings = farm.settings.model_copy(update={"run_dir": run_dir})
    with pickle(bench), worker_process(settings) as process:
        wait_until(lambda: failed(farm, process), 120, "the worker has failed to load")
        (run_dir / "beat").unlink()
        wait_until((run_dir / "beat").exists, 30, "it beats, although it cannot render")
        assert not (run_dir / "ready").exists()
        bench.take("stable_diffusion")
        wait_until((run_dir / "ready").exists, 120, "it has loaded the repaired checkpoint")
        job_id = submit(farm, tenant, pipeline="sd", **SMALL)
        wait_until(
            lambda: job_row(farm, tenant, job_id).status == "succeeded", 120, "it has rendered"
        )
        assert process.poll() is None, "it is the same process"
    assert [*run_dir.iterdir()] == []
    assert process.returncode == 0


def failed(farm: Farm, process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None, "the worker ended"
    return bool(sql(farm, "SELECT 1 FROM workers WHERE state = 'failed'"))


@contextmanager
def worker_process(settings: Settings) -> Iterator[subprocess.Popen[bytes]]:
    env = {**os.environ, **variables(settings)}
    process = subprocess.Popen([sys.executable, "-m", "farm.cli", "worker", "sd"], env=env)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def test_a_child_that_ended_while_it_loaded_makes_the_next_one_wait(
    farm: Farm, tenant: uuid.UUID, caplog: pytest.LogCaptureFixture
) -> None:
    """As after the kernel's OOM killer: the pool starts the next one at once."""
    clock = Clock()
    child = hire(farm, "sd", clock)
    scratch = child._scratch
    scratch.folder.mkdir(parents=True)
    scratch.begin_load()
    scratch.begin_load()
    child.start()
    problem = "Its process ended while it loaded the pipeline."
    assert worker(farm) == ("failed", problem)
    job_id = submit(farm, tenant, pipeline="sd", **SMALL)
    clock.now += 2 * LOAD_AGAIN_SECONDS - 1
    child.answer()
    assert worker(farm) == ("failed", problem)
    clock.now += 1
    child.answer()
    assert job_row(farm, tenant, job_id).status == "succeeded"
    assert scratch.unfinished_loads() == 0
