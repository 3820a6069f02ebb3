"""The API under test: uvicorn on a free port, a client for each tenant and role, and completed
frames with a real picture in the storage."""

from __future__ import annotations

import hashlib
import io
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from PIL import Image, ImageDraw

from api.app import create_app
from api.server import ApiServer
from farm.config import Settings
from farm.context import Farm
from farm.storage import artifact_key
from farm.store import frames, keys
from farm.store.claim import ClaimedFrame, Lease
from farm.store.engine import transaction
from tests.support.store import FakeWorker, fence, sql
from tests.support.waiting import wait_until

JOB: dict[str, Any] = {"pipeline": "demo", "prompts": ["a red star"], "seed": 7, "steps": 2}


@dataclass
class Api:
    """A running API."""

    farm: Farm
    url: str
    clients: ExitStack
    app: FastAPI

    def key(self, tenant: str = "ann", role: str = "client", *, everywhere: bool = False) -> str:
        with transaction(self.farm.store) as connection:
            return keys.create_key(connection, tenant, role, role, everywhere=everywhere)[1]

    def client(
        self, tenant: str = "ann", role: str = "client", *, everywhere: bool = False
    ) -> httpx.Client:
        key = self.key(tenant, role, everywhere=everywhere)
        return self.bare(Authorization=f"Bearer {key}")

    def bare(self, **headers: str) -> httpx.Client:
        client = httpx.Client(base_url=self.url, headers=headers, timeout=60)
        return self.clients.enter_context(client)

    def submit(self, client: httpx.Client, **fields: Any) -> dict[str, Any]:
        response = client.post("/v1/jobs", json={**JOB, **fields})
        assert response.status_code == 202, response.text
        job: dict[str, Any] = response.json()
        return job

    def done_by_people(self) -> list[dict[str, Any]]:
        """Return the log of actions, newest first, without what changed by itself."""
        log = self.client("ops", "operator").get("/v1/actions").json()["data"]
        return [each for each in log if each["via"] != "farm"]

    def jobs_stored(self) -> int:
        """Count the jobs of all tenants."""
        return int(sql(self.farm, "SELECT count(*) FROM jobs")[0][0])


@contextmanager
def serving(farm: Farm, settings: Settings | None = None) -> Iterator[Api]:
    """Serve the API on a free port of loopback, by default with the farm's own settings."""
    app = create_app(settings or farm.settings)
    with running(app) as url, ExitStack() as clients:
        yield Api(farm, url, clients, app)


@contextmanager
def listening(settings: Settings) -> Iterator[str]:
    """Serve an API of these settings in a thread. Return its address."""
    with running(create_app(settings)) as url:
        yield url


@contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """Run the server of an API process in a thread. Return its address."""
    config = uvicorn.Config(app, log_config=None, access_log=False, proxy_headers=False)
    server = ApiServer(app, config)
    port = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [port]})
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive(), 30, "the API serves")
        yield f"http://127.0.0.1:{port.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        port.close()


def render(worker: FakeWorker, lease: Lease, *ordinals: int) -> None:
    """Complete a lease's frames, or only these ordinals, each with a picture in the storage."""
    done = []
    for slot, frame in enumerate(lease.frames):
        if ordinals and frame.ordinal not in ordinals:
            continue
        content = picture(frame)
        digest = hashlib.sha256(content).digest()
        form = frame.spec.format
        key = artifact_key(frame.tenant_id, frame.job_id, frame.ordinal, digest, form)
        worker.farm.artifacts.put(key, content)
        done.append(frames.CompletedFrame(fence(frame), digest, len(content), slot))
    with transaction(worker.farm.store) as connection:
        assert len(frames.complete(connection, lease.id, done)) == len(done)


@contextmanager
def rendering(worker: FakeWorker) -> Iterator[None]:
    """Render what the worker finds, in a thread, during the block."""
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(0.05):
            while lease := worker.claim():
                render(worker, lease)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def picture(frame: ClaimedFrame) -> bytes:
    """Return a picture that depends on its seed only."""
    width, height = frame.spec.params["width"], frame.spec.params["height"]
    hue = frame.spec.seed * 47 % 360
    image = Image.new("RGB", (width, height), f"hsl({hue}, 45%, 82%)")
    box = (width * 0.2, height * 0.2, width * 0.8, height * 0.8)
    ImageDraw.Draw(image).ellipse(box, fill=f"hsl({(hue + 150) % 360}, 60%, 45%)")
    buffer = io.BytesIO()
    image.save(buffer, format=frame.spec.format.upper())
    return buffer.getvalue()
