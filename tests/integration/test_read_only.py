"""A read-only Postgres, such as a standby or a demoted primary, is a temporary outage."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import text
from sqlalchemy.pool import QueuePool

from farm.context import Farm
from farm.errors import Unavailable
from farm.store.engine import require_writes, transaction
from farm.store.leadership import leadership
from tests.integration.noise_jobs import at_step, submit_noise
from tests.support.api_server import serving
from tests.support.noise_family import Noise
from tests.support.store import attempts_of, job_row, sql, submit
from tests.support.waiting import wait_until
from workers.render.assembly import Assembly
from workers.render.loop import RenderLoop

OTHERS_LEAVE = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
)


@contextmanager
def read_only(farm: Farm, *, all_leave: bool = False) -> Iterator[None]:
    """Make the database read-only, for new connections and for this pool's.

    With `all_leave` the connections of others are closed.
    """
    name = sql(farm, "SELECT current_database()")[0][0]
    with farm.store.connect().execution_options(isolation_level="AUTOCOMMIT") as other:
        other.detach()
        for connection in [farm.store.connect() for _ in range(pool_of(farm).checkedin())]:
            connection.execute(text("SET default_transaction_read_only = on"))
            connection.commit()
            connection.close()
        other.execute(text(f"ALTER DATABASE {name} SET default_transaction_read_only = on"))
        if all_leave:
            other.execute(text(OTHERS_LEAVE))
        try:
            yield
        finally:
            other.execute(text(f"ALTER DATABASE {name} RESET default_transaction_read_only"))


def pool_of(farm: Farm) -> QueuePool:
    assert isinstance(farm.store.pool, QueuePool)
    return farm.store.pool


def test_a_write_says_that_postgres_is_away_and_works_again(farm: Farm, tenant: uuid.UUID) -> None:
    job_id = submit(farm, tenant)
    with read_only(farm):
        for _ in range(3):
            with pytest.raises(Unavailable):
                submit(farm, tenant)
        with pytest.raises(Unavailable):
            require_writes(farm.store)
        with pytest.raises(Unavailable):
            leadership(farm.store, 60.0).__enter__()
    submit(farm, tenant)
    require_writes(farm.store)
    assert job_row(farm, tenant, job_id).status == "queued"


def test_a_kept_connection_is_seen_to_take_no_writes(farm: Farm) -> None:
    with read_only(farm), pytest.raises(Unavailable, match="Postgres is read-only"):
        require_writes(farm.store)


def test_readiness_says_no_while_it_lasts(farm: Farm) -> None:
    with serving(farm) as api:
        client = api.client()
        assert client.get("/readyz").status_code == 200
        with read_only(farm, all_leave=True):
            answer = client.get("/readyz")
            assert answer.status_code == 503
            assert not answer.json()["postgres"]["ok"]
            assert answer.json()["redis"]["ok"]
        wait_until(lambda: client.get("/readyz").status_code == 200, 30, "it is ready again")


def test_a_batch_in_hand_is_stored_once_it_takes_writes_again(
    farm: Farm, tenant: uuid.UUID, noise: Noise, loop: RenderLoop, assembly: Assembly
) -> None:
    job_id = submit_noise(farm, tenant, images_per_prompt=4)
    begun, rendered = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        assert rendered.wait(60)

    noise.disturb = at_step(5, wait)
    thread = threading.Thread(target=loop.run)
    thread.start()
    assert begun.wait(60)
    # A connection that the lease watch uses at this moment could still write otherwise.
    with read_only(farm, all_leave=True):
        rendered.set()
        wait_until(lambda: assembly.finisher.busy, 60, "the batch is at its end")
        with pytest.raises(Unavailable):
            require_writes(farm.store)
    thread.join(60)
    assert not thread.is_alive()
    job = job_row(farm, tenant, job_id)
    assert (job.status, job.succeeded) == ("succeeded", 4)
    assert attempts_of(farm, job_id) == []
    assert len(noise.batches) == 1


def test_an_error_of_the_database_holds_no_prompt(farm: Farm) -> None:
    with (
        pytest.raises(Exception, match="division") as caught,
        transaction(farm.store) as connection,
    ):
        connection.execute(text("SELECT 1 / 0, CAST(:prompt AS text)"), {"prompt": "a red star"})
    assert "a red star" not in str(caught.value)
