"""The images are built, and run as an unprivileged user on a read-only root, as a cluster would."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from farm.local import Servers, embedded_servers
from farm.local.ports import free_port
from tests.support.cli_runner import farm
from tests.support.containers import ROOT, Containers, missing
from tests.support.waiting import wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=missing() or "-"),
]
UID = 10001
GRACE_SECONDS = 20


@pytest.fixture(scope="module")
def containers(tmp_path_factory: pytest.TempPathFactory) -> Containers:
    """Its folder may be kept between runs: FARM_TEST_IMAGES names it."""
    folder = os.environ.get("FARM_TEST_IMAGES") or tmp_path_factory.mktemp("containers")
    made = Containers(Path(folder))
    made.make_base()
    return made


@pytest.fixture(scope="module")
def server(containers: Containers) -> str:
    return containers.build("server")


@pytest.fixture(scope="module")
def worker(containers: Containers) -> str:
    return containers.build("worker")


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with embedded_servers(tmp_path_factory.mktemp("servers")) as running:
        yield running


@pytest.fixture(scope="module")
def env(servers: Servers) -> dict[str, str]:
    wanted = ("FARM_", "AWS_")
    return {name: value for name, value in servers.env.items() if name.startswith(wanted)}


@pytest.fixture(scope="module")
def api(containers: Containers, server: str, env: dict[str, str]) -> Iterator[str]:
    """Migrate the empty database with the server image, and serve the API from it."""
    told = containers.run(server, "migrate", "--wait-database", "30", env=env)
    assert told.endswith("The database is up to date.")
    port = free_port()
    words = ("api", "--host", "127.0.0.1", "--port", str(port))
    with containers.running(server, *words, env=env) as name:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: is_ready(url), 60, "the API is ready")
        yield url
        assert containers.call("podman", "stop", "--time", "30", name)
        assert containers.inspect(name)["State"]["ExitCode"] == 0


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.TransportError:
        return False


def test_the_server_image_has_no_torch_and_lists_its_packages(
    containers: Containers, server: str
) -> None:
    packages = packages_of(containers, server)
    assert {"farm", "fastapi", "celery", "diffusers"} <= packages.keys()
    assert {"torch", "transformers", "cyclonedx-bom"}.isdisjoint(packages)
    assert packages == listed_in_sbom(containers, server)
    assert pinned() >= {(name, packages[name]) for name in ("celery", "diffusers", "sqlalchemy")}


def test_the_worker_image_has_the_pinned_torch_and_a_compiler(
    containers: Containers, worker: str
) -> None:
    packages = packages_of(containers, worker)
    assert packages == listed_in_sbom(containers, worker)
    names = {"torch", "transformers", "accelerate", "compel", "safetensors"}
    assert pinned() >= {(name, packages[name].partition("+")[0]) for name in names}
    build = (
        "cd /tmp && echo '#include <Python.h>' > x.c && "
        'gcc -c $(python3 -c \'import sysconfig; print("-I" + sysconfig.get_path("include"))\') x.c'
        " && ls x.o"
    )
    assert containers.run(worker, "-c", build, env={}, entry="sh") == "x.o"


def test_images_say_what_they_are(containers: Containers, server: str, worker: str) -> None:
    for name in (server, worker):
        image = containers.inspect(name)
        labels = image["Config"]["Labels"]
        assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
        assert labels["org.opencontainers.image.version"] == project()["version"]
        assert labels["org.opencontainers.image.title"] == name.rpartition("/")[2]
        assert image["Config"]["User"] == f"{UID}:{UID}"
        assert image["Config"]["Entrypoint"] == ["tini", "--", "farm"]
        print(f"{name}: {image['Size'] / 1e6:.0f} MB")  # noqa: T201 - make test-slow shows it


def test_nothing_but_tmp_can_be_written(containers: Containers, server: str) -> None:
    code = (
        "import os\n"
        "print(os.getuid(), os.getgid())\n"
        "for folder in ('/', '/opt/farm', '/etc', '/var', '/usr/bin', os.environ['HOME']):\n"
        "    try:\n"
        "        open(f'{folder}/written', 'w').close(); print(folder)\n"
        "    except OSError:\n"
        "        pass\n"
    )
    told = containers.run(server, "-c", code, env={}, entry="/opt/farm/bin/python").splitlines()
    assert told == [f"{UID} {UID}", "/tmp"]


def test_a_worker_renders_and_ends_in_its_grace(
    containers: Containers, worker: str, env: dict[str, str], api: str, tmp_path: Path
) -> None:
    """Its picture is rendered again outside the container: every pixel is equal."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    os.chown(run_dir, UID, UID)
    beat, ready = run_dir / "beat", run_dir / "ready"
    threads = {"FARM_TORCH_THREADS": "1", "OMP_NUM_THREADS": "1"}
    own = {**env, **threads, "FARM_RUN_DIR": "/run/farm", "FARM_GRACE_SECONDS": str(GRACE_SECONDS)}
    key = containers.run("localhost/farm-server", *CREATE_KEY, env=env)
    headers = {"Authorization": f"Bearer {json.loads(key)['key']}"}
    volumes = [f"{run_dir}:/run/farm"]
    with (
        httpx.Client(base_url=f"{api}/v1", headers=headers, follow_redirects=True) as client,
        containers.running(worker, "worker", "demo", env=own, volumes=volumes) as name,
    ):
        wait_until(beat.exists, 60, "the parent shows that it lives")
        wait_until(ready.exists, 180, "the pipeline is loaded")
        assert beat.stat().st_uid == UID
        job = client.post("/jobs", json={"pipeline": "demo", "prompts": ["a red star"], "seed": 31})
        path = f"/jobs/{job.raise_for_status().json()['id']}"
        wait_until(lambda: client.get(path).json()["status"] == "succeeded", 120, "it is rendered")
        picture = tmp_path / "picture.png"
        picture.write_bytes(client.get(f"{path}/frames/0/image").raise_for_status().content)
        containers.call("podman", "stop", "--time", str(GRACE_SECONDS), name)
        state = containers.inspect(name)["State"]
        assert (state["ExitCode"], state["OOMKilled"]) == (0, False)
        assert not beat.exists()
        assert not ready.exists()
    replayed = farm("replay", str(picture), env=threads)
    assert replayed.out.startswith("identical "), replayed.out + replayed.err


CREATE_KEY = ("keys", "create", "--tenant", "default", "--role", "client", "--json")


def test_the_same_sources_give_the_same_image(containers: Containers) -> None:
    """Two builds without a cache: each layer has the same bytes, whatever the time is."""
    layers = []
    for _ in range(2):
        name = containers.build("server", "--timestamp", "315532800", "--no-cache")
        layers.append(containers.inspect(name)["RootFS"]["Layers"])
    assert layers[0] == layers[1]


def packages_of(containers: Containers, image: str) -> dict[str, str]:
    """Return the installed packages and their versions, as Python itself lists them."""
    code = (
        "import importlib.metadata as m, json\n"
        "print(json.dumps({d.metadata['Name']: d.version for d in m.distributions()}))"
    )
    told = containers.run(image, "-c", code, env={}, entry="/opt/farm/bin/python")
    return {plain(name): version for name, version in json.loads(told).items()}


def listed_in_sbom(containers: Containers, image: str) -> dict[str, str]:
    sbom = json.loads(containers.run(image, "/opt/farm/sbom.json", env={}, entry="cat"))
    assert sbom["bomFormat"] == "CycloneDX"
    return {plain(each["name"]): each["version"] for each in sbom["components"]}


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned() -> set[tuple[str, str]]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = (re.match(r"([A-Za-z0-9._-]+)==(\S+)", line) for line in lines)
    return {(plain(pin[1]), pin[2]) for pin in found if pin}


def project() -> dict[str, str]:
    project: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project
