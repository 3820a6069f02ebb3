"""The janitor's port: health that no outage fails, and the farm's metrics exported once."""

from __future__ import annotations

import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr
from sqlalchemy import make_url

from farm.context import Farm, open_farm
from farm.errors import FarmError
from tests.chaos.proxy import Proxies, Reset
from tests.support.api_server import serving
from tests.support.store import new_tenant, register_worker, sql, submit
from tests.support.waiting import wait_until
from workers.janitor.health_port import MAX_TURN_SECONDS, health_port
from workers.janitor.janitor import Janitor, JanitorStatus


def families(url: str) -> set[str]:
    answer = httpx.get(f"{url}/metrics")
    assert answer.status_code == 200
    return {family.name for family in text_string_to_metric_families(answer.text)}


@contextmanager
def port_of(farm: Farm, status: JanitorStatus) -> Iterator[str]:
    with health_port(farm, status, "127.0.0.1", 0) as port:
        yield f"http://127.0.0.1:{port}"


@contextmanager
def running(farm: Farm) -> Iterator[tuple[str, JanitorStatus]]:
    janitor, stop = Janitor(farm), threading.Event()
    thread = threading.Thread(target=janitor.run, args=(stop,))
    thread.start()
    try:
        with port_of(farm, janitor.status) as url:
            yield url, janitor.status
    finally:
        stop.set()
        thread.join()


def test_of_two_janitors_one_exports_what_the_api_does(farm: Farm, tenant: uuid.UUID) -> None:
    submit(farm, tenant)
    with running(farm) as (first, one), running(farm) as (second, other), serving(farm) as api:
        wait_until(lambda: one.leading or other.leading, 30, "one leads")
        leads, waits = (first, second) if one.leading else (second, first)
        assert families(waits) == {"farm_janitor_leading", "farm_build_info"}
        wait_until(lambda: (one.swept_at or other.swept_at) is not None, 30, "it has swept")
        own = {"farm_janitor_leading", "farm_janitor_swept_timestamp_seconds"}
        own |= {"farm_build_info", "farm_storage_up", "farm_tenant_limit", "farm_tenant_used"}
        assert families(leads) == families(api.url) | own
        assert "farm_storage_up 1.0" in httpx.get(f"{leads}/metrics").text
        assert 'farm_queue_frames{pipeline="demo",priority="normal"} 1.0' in (
            httpx.get(f"{leads}/metrics").text
        )
    assert [status.leading for status in (one, other)] == [False, False]


def test_limits_and_what_is_used_of_them_are_told_by_the_janitor_alone(
    farm: Farm, tenant: uuid.UUID
) -> None:
    new_tenant(farm, "unlimited")
    submit(farm, tenant, images_per_prompt=3, bucket=2)
    register_worker(farm).must_claim()
    sql(
        farm,
        "UPDATE tenants SET max_open_jobs = 5, max_running_frames = 6, max_waiting_frames = 7"
        " WHERE id = :id",
        id=tenant,
    )
    with running(farm) as (url, status), serving(farm) as api:
        wait_until(lambda: status.leading, 30, "it leads")
        told = httpx.get(f"{url}/metrics").text
        assert "farm_tenant" not in httpx.get(f"{api.url}/metrics").text
    found = {line for line in told.splitlines() if line.startswith("farm_tenant")}
    [name] = {re.findall('tenant="(.*?)"', line)[0] for line in found}
    assert found == {
        f'farm_tenant_{kind}{{limit="{limit}",tenant="{name}"}} {value}.0'
        for kind, values in {"limit": (5, 6, 7), "used": (1, 2, 1)}.items()
        for limit, value in zip(
            ("max_open_jobs", "max_running_frames", "max_waiting_frames"), values, strict=True
        )
    }


def test_health_is_that_of_the_loop(farm: Farm) -> None:
    status = JanitorStatus()
    with port_of(farm, status) as url:
        assert (httpx.get(f"{url}/healthz").status_code, httpx.head(url).status_code) == (200, 404)
        status.turned_at = time.monotonic() - MAX_TURN_SECONDS - 1
        answer = httpx.get(f"{url}/healthz?verbose")
    assert (answer.status_code, answer.text) == (
        503,
        "The janitor's loop has not turned for 61 s.\n",
    )


def test_an_outage_of_postgres_ends_neither_health_nor_beats(farm: Farm) -> None:
    """Its loop turns, and its readiness stays."""
    run_dir = farm.settings.scratch_dir / "run"
    run_dir.mkdir(parents=True)
    url = make_url(farm.settings.database_url.get_secret_value())
    with Proxies() as proxies:
        link = proxies.link("janitor", "postgres", url.host or "127.0.0.1", url.port or 5432)
        address = url.set(host="127.0.0.1", port=link.port).render_as_string(hide_password=False)
        own = {"database_url": SecretStr(address), "run_dir": run_dir}
        through = open_farm(farm.settings.model_copy(update=own))
        with running(through) as (health, status):
            wait_until(lambda: status.leading, 30, "it leads")
            link.begin(Reset())
            wait_until(lambda: not status.leading, 30, "it leads no more")
            (run_dir / "beat").unlink()
            turned_at = status.turned_at
            wait_until(lambda: status.turned_at > turned_at, 30, "it turns")
            wait_until((run_dir / "beat").exists, 30, "it beats")
            assert httpx.get(f"{health}/healthz").status_code == 200
            assert families(health) >= {"farm_janitor_leading"}
            assert (run_dir / "ready").exists()
        through.close()


def test_a_client_that_sends_nothing_holds_up_no_other(farm: Farm) -> None:
    with port_of(farm, JanitorStatus()) as url:
        address = httpx.URL(url)
        with socket.create_connection((address.host, address.port or 0)):
            assert httpx.get(f"{url}/healthz", timeout=5).status_code == 200


def test_a_port_that_is_taken_is_named(farm: Farm) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        wanted = health_port(farm, JanitorStatus(), "127.0.0.1", port)
        message = f"^--port: 127.0.0.1:{port} cannot be used: Address"
        with pytest.raises(FarmError, match=message), wanted:
            pass


def test_without_a_port_nothing_listens(farm: Farm) -> None:
    with health_port(farm, JanitorStatus(), "127.0.0.1", None) as port:
        assert port is None
