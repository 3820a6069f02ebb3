"""The farm's own commands that `farm up` runs in addition to the servers."""

from __future__ import annotations

import http.client
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from farm.local.child import Program, Stage, launched
from farm.local.errors import StackError
from farm.local.folder import Folder
from farm.local.ports import HOST
from farm.local.processes import MARK

COMMAND_SECONDS = 300.0


def environment(folder: Folder, settings: Mapping[str, str]) -> dict[str, str]:
    """Return the caller's environment, overridden by the folder's settings."""
    env = {
        name: value
        for name, value in os.environ.items()
        # A run folder is of one process.
        if not name.startswith("AWS_") and name != "FARM_RUN_DIR"
    }
    # Addresses of this machine must not go through a proxy.
    direct = ",".join(filter(None, (env.get("NO_PROXY", env.get("no_proxy")), HOST, "localhost")))
    marks = {"FARM_DATA": str(folder.path), MARK: str(folder.path), "PYTHONUNBUFFERED": "1"}
    return {**env, "NO_PROXY": direct, "no_proxy": direct, **marks, **settings}


def farm(*words: str) -> list[str]:
    """Build the command line of `farm WORDS`, run by this interpreter."""
    return [sys.executable, "-m", "farm.cli", *words]


def run(words: list[str], env: Mapping[str, str], log: Path) -> str:
    """Run one command to its end. Return its standard output, or raise StackError."""
    with log.open("ab") as errors:
        try:
            done = subprocess.run(  # noqa: S603  the argv is ours
                launched(farm(*words)),
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                timeout=COMMAND_SECONDS,
                check=True,
                process_group=0,
            )
        except subprocess.SubprocessError:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise StackError(
                f"farm {words[0]} failed. Last lines of its log {log}:\n{tail}"
            ) from None
    return done.stdout.decode()


def api(folder: Folder, env: Mapping[str, str], port: int) -> Program:
    """Describe the API process. It is ready when /readyz answers 200."""
    return Program(
        name="api",
        argv=farm("api", "--host", HOST, "--port", str(port)),
        env=env,
        log=folder.logs / "api.log",
        stage=Stage.FRONT,
        ready=lambda: _answers(port),
    )


def janitor(folder: Folder, env: Mapping[str, str]) -> Program:
    """Describe the janitor process."""
    log = folder.logs / "janitor.log"
    return Program("janitor", farm("janitor"), env, log, Stage.FRONT)


def courier(folder: Folder, env: Mapping[str, str]) -> Program:
    """Describe the courier process, which delivers webhooks."""
    log = folder.logs / "courier.log"
    return Program("courier", farm("courier"), env, log, Stage.WORKER)


def exporter(folder: Folder, env: Mapping[str, str]) -> Program:
    """Describe the exporter process, which writes datasets."""
    log = folder.logs / "exporter.log"
    return Program("exporter", farm("exporter"), env, log, Stage.WORKER)


def worker(
    folder: Folder,
    env: Mapping[str, str],
    pipeline: str,
    number: int,
    grace: float,
    device: int | None = None,
) -> Program:
    """Describe a worker process of `pipeline`. It has `grace` seconds to finish its batch."""
    where = [] if device is None else ["--device", str(device)]
    return Program(
        name=f"worker {pipeline}-{number}",
        argv=farm("worker", pipeline, *where),
        env=env,
        log=folder.logs / f"worker-{pipeline}-{number}.log",
        stage=Stage.WORKER,
        grace=grace,
    )


def _answers(port: int) -> bool:
    with closing(http.client.HTTPConnection(HOST, port, timeout=5)) as connection:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == http.HTTPStatus.OK
