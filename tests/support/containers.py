"""Building and running the farm's images with buildah, podman and runc, without a daemon."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PROGRAMS = ("buildah", "podman", "runc", "mmdebstrap")
BASE = "localhost/base:bookworm"

ENGINE = """
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=4096:4096"]
netns = "host"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""
STORAGE = """
[storage]
driver = "overlay"
graphroot = "{folder}/storage"
runroot = "{folder}/run"
"""
# As a restricted cluster runs them.
RESTRICTED = ("--read-only", "--cap-drop", "all", "--security-opt", "no-new-privileges")


def missing() -> str:
    """Return why no images can be built here, or an empty text."""
    if os.geteuid() != 0:
        return "building images without a daemon needs root"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


@dataclass
class Containers:
    """Images and containers in one folder."""

    folder: Path

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "engine.conf").write_text(ENGINE)
        (self.folder / "storage.conf").write_text(STORAGE.format(folder=self.folder))

    def call(self, *words: str, check: bool = True, seconds: float = 1500.0) -> str:
        """Run a program with this folder's settings. Return what it printed."""
        env = {
            **os.environ,
            "CONTAINERS_CONF": str(self.folder / "engine.conf"),
            "CONTAINERS_STORAGE_CONF": str(self.folder / "storage.conf"),
        }
        done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=seconds)
        assert not check or done.returncode == 0, f"{words}\n{done.stdout[-3000:]}{done.stderr}"
        return done.stdout.strip()

    def make_base(self) -> None:
        """Make the base image from Debian's packages: no registry is needed."""
        if BASE in self.call("podman", "images", "--format", "{{.Repository}}:{{.Tag}}"):
            return
        tar = self.folder / "base.tar"
        packages = "ca-certificates,python3,python3-venv"
        self.call("mmdebstrap", "--variant=minbase", f"--include={packages}", "bookworm", str(tar))
        self.call("podman", "import", str(tar), BASE)
        tar.unlink()

    def build(self, target: str, *more: str) -> str:
        """Build a target of the Dockerfile. Return the name of the image."""
        name = f"localhost/farm-{target}"
        mounts = ["/etc/ssl/certs", "/etc/pip.conf", os.environ.get("PIP_FIND_LINKS", "")]
        volumes = [f"--volume={path}:{path}:ro" for path in mounts if path and Path(path).exists()]
        env = [
            f"--env={name}={os.environ[name]}"
            for name in ("PIP_CERT", "PIP_FIND_LINKS", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL")
            if name in os.environ
        ]
        self.call(
            *("buildah", "build", "--isolation", "chroot", "--layers", "--quiet"),
            *("--build-arg", f"BASE={BASE}", "--build-arg", "VERSION=0.1.0", *volumes, *env),
            *("--target", target, "--tag", name, *more),
            *("--file", str(ROOT / "helm/images/Dockerfile"), str(ROOT)),
        )
        return name

    def inspect(self, name: str) -> dict[str, Any]:
        """Return the details of an image or a container."""
        [found] = json.loads(self.call("podman", "inspect", name))
        return dict(found)

    def run(self, image: str, *words: str, env: Mapping[str, str], entry: str | None = None) -> str:
        """Run a command in a new container, and return what it printed."""
        entrypoint = ("--entrypoint", entry) if entry else ()
        return self.call(
            *("podman", "run", "--rm", "--tmpfs", "/tmp", *RESTRICTED, *entrypoint),
            *(f"--env={name}={value}" for name, value in env.items()),
            *(image, *words),
        )

    @contextmanager
    def running(
        self, image: str, *words: str, env: Mapping[str, str], volumes: Sequence[str] = ()
    ) -> Iterator[str]:
        """Run a container in the background during the block. Yield its ID."""
        name = self.call(
            *("podman", "run", "--detach", "--tmpfs", "/tmp", *RESTRICTED),
            *(f"--env={name}={value}" for name, value in env.items()),
            *(f"--volume={volume}" for volume in volumes),
            *(image, *words),
        )
        try:
            yield name
        finally:
            self.call("podman", "rm", "--force", "--time", "0", name, check=False)
