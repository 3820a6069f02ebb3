"""The number of round trips to Postgres per batch, counted on the wire."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from pydantic import SecretStr
from sqlalchemy import make_url

from farm.context import Farm
from farm.store.engine import open_store
from tests.chaos.proxy import Connection, Fault, Proxies
from tests.support.noise_family import Noise
from tests.support.store import job_row, new_tenant, submit
from workers.render.loop import RenderLoop

MOST = 3.0


@dataclass
class Counted(Fault):
    """Records each message from the client. The client waits for an answer before the next one."""

    requests: list[bytes] = field(default_factory=list)

    async def request(self, connection: Connection, data: bytes) -> bytes:
        self.requests.append(data)
        return data


@pytest.fixture
def counted(farm: Farm) -> Iterator[Counted]:
    """Connect the farm to Postgres through a proxy that counts."""
    url = make_url(farm.settings.database_url.get_secret_value())
    with Proxies() as proxies:
        link = proxies.link("line", "postgres", url.host or "127.0.0.1", url.port or 5432)
        through = url.set(host="127.0.0.1", port=link.port)
        store, direct = (
            open_store(
                farm.settings.model_copy(
                    update={
                        "database_url": SecretStr(through.render_as_string(hide_password=False))
                    }
                )
            ),
            farm.store,
        )
        link.begin(fault := Counted())
        farm.store = store
        yield fault
        farm.store = direct
        store.dispose()


def test_a_batch_costs_at_most_three(
    farm: Farm,
    tenant: uuid.UUID,
    noise: Noise,
    counted: Counted,
    loop: RenderLoop,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(farm.settings, "progress_seconds", 60.0)  # reports go by time, not by batch
    others = [new_tenant(farm, name) for name in ("second", "third")]

    def work(images: int) -> int:
        """Render two jobs of each tenant. Return the number of messages."""
        jobs = [
            (owner, submit(farm, owner, pipeline="noise", bucket=4, images_per_prompt=images))
            for owner in [tenant, *others]
            for _ in range(2)
        ]
        before = len(counted.requests)
        loop.run()
        for owner, job_id in jobs:
            assert job_row(farm, owner, job_id).status == "succeeded"
        return len(counted.requests) - before

    work(6)  # opens connections and prepares statements
    few, many = work(6), work(46)
    batches = (46 - 6) * 6 // 4
    assert 1.0 < (many - few) / batches <= MOST, (few, many)
