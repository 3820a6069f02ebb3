"""Requests a second of a tenant: counted for all API processes, and refused before the body."""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import pytest
from pydantic import SecretStr

from api.request_rates import Rate, RequestRates
from farm.context import Farm
from tests.integration.test_api_refusals import check_problem
from tests.support.api_server import Api, serving
from tests.support.store import new_tenant, sql
from tests.support.waiting import wait_until

NOWHERE = SecretStr("redis://127.0.0.1:1/0")
"""Address at which nothing answers."""


@pytest.fixture
def api(farm: Farm) -> Iterator[Api]:
    with serving(farm) as running:
        yield running


def limit(farm: Farm, per_second: float, burst: int | None = None, name: str = "ann") -> None:
    new_tenant(farm, name)
    sql(
        farm,
        "UPDATE tenants SET requests_a_second = :rate, requests_burst = :burst WHERE name = :name",
        rate=per_second,
        burst=burst,
        name=name,
    )


def statuses(client: httpx.Client, requests: int) -> list[int]:
    return [client.get("/v1/jobs").status_code for _ in range(requests)]


def test_requests_beyond_the_burst_are_refused(farm: Farm, api: Api) -> None:
    limit(farm, 0.05, burst=3)
    ann, bob = api.client("ann"), api.client("bob")
    assert statuses(ann, 5) == [200, 200, 200, 429, 429]
    response = ann.get("/v1/jobs")
    assert response.json()["error"]["code"] == "limit_exceeded"
    assert response.json()["limit"] == {"name": "requests_a_second", "value": 0.05, "used": 0.05}
    assert response.headers["ratelimit-policy"] == '"requests_a_second";q=3;w=60'
    assert 1 <= int(response.headers["retry-after"]) <= 20
    wait = response.headers["retry-after"]
    assert response.headers["ratelimit"] == f'"requests_a_second";r=0;t={wait}'
    assert statuses(api.client("ann"), 1) == [429]  # another key of the tenant
    assert statuses(bob, 5) == [200] * 5


def test_pages_and_signing_in_count_too(farm: Farm, api: Api) -> None:
    limit(farm, 0.01, burst=3)
    form = {"key": api.key("ann")}
    browser = api.bare(Origin=api.url)
    assert browser.post("/login", data=form).status_code < 400
    assert [browser.get("/").status_code for _ in range(3)] == [200, 200, 429]
    assert browser.post("/login", data=form).status_code == 429
    assert api.bare().get("/").status_code == 200  # the sign-in page


def test_requests_come_again_after_the_time_that_was_told(farm: Farm, api: Api) -> None:
    limit(farm, 4.0, burst=1)
    ann = api.client("ann")
    assert statuses(ann, 2) == [200, 429]
    began = time.monotonic()
    wait_until(lambda: ann.get("/v1/jobs").status_code == 200, 5.0, "a request is let in")
    assert time.monotonic() - began > 0.15


def test_a_burst_is_by_default_ten_seconds_of_requests(farm: Farm, api: Api) -> None:
    limit(farm, 0.4)
    assert statuses(api.client("ann"), 6) == [200] * 4 + [429] * 2


def test_a_submission_is_refused_before_its_body_is_read(farm: Farm, api: Api) -> None:
    limit(farm, 0.01, burst=1)
    key = api.key("ann")
    assert statuses(api.bare(Authorization=f"Bearer {key}"), 1) == [200]
    place = urlsplit(api.url)
    with socket.create_connection((place.hostname, place.port), timeout=20) as connection:
        head = [
            "POST /v1/jobs HTTP/1.1",
            "Host: here",
            f"Authorization: Bearer {key}",
            "Content-Type: application/json",
            "Content-Length: 1000000",
        ]
        connection.sendall("\r\n".join([*head, "", "{"]).encode())
        assert connection.recv(12) == b"HTTP/1.1 429"
    assert api.jobs_stored() == 0


def test_all_api_processes_count_together(farm: Farm, api: Api) -> None:
    """32 clients of two apps. Each app has its own connections, as a process has."""
    limit(farm, 0.01, burst=40)
    with serving(farm) as other:
        clients = [(api, other)[number % 2].client("ann") for number in range(32)]
        for app in (api, other):
            app.client("bob").get("/v1/jobs").raise_for_status()
        with ThreadPoolExecutor(32) as pool:
            told = [each for three in pool.map(lambda c: statuses(c, 3), clients) for each in three]
    assert Counter(told) == {200: 40, 429: 56}


def test_without_redis_each_process_counts_for_itself(farm: Farm) -> None:
    limit(farm, 0.01, burst=3)
    alone = farm.settings.model_copy(update={"redis_url": NOWHERE})
    with serving(farm, alone) as one, serving(farm, alone) as other:
        for app in (one, other):
            assert statuses(app.client("ann"), 5) == [200] * 3 + [429] * 2


def test_what_a_process_counts_agrees_with_what_redis_counts(farm: Farm) -> None:
    alone = farm.settings.model_copy(update={"redis_url": NOWHERE})
    tenant = new_tenant(farm, "ann")
    for rate in (Rate(0.5, 1), Rate(0.1, 5), Rate(0.02, 1)):
        both = [
            [rates.take(tenant, rate) for _ in range(rate.burst + 1)]
            for rates in (RequestRates(farm.settings), RequestRates(alone))
        ]
        for told in both:
            assert [each.wait for each in told[:-1]] == [0.0] * rate.burst
            assert told[-1].wait == pytest.approx(1 / rate.per_second, rel=0.5)
            assert [each.left(rate) for each in told] == [*range(rate.burst - 1, -1, -1), 0]
            assert told[0].full_in == pytest.approx(1 / rate.per_second, rel=0.01)
        tenant = new_tenant(farm, f"tenant {rate}")


def test_each_answer_says_what_is_left(farm: Farm, api: Api) -> None:
    limit(farm, 0.5, burst=3)
    ann = api.client("ann")
    answers = [ann.get("/v1/jobs"), ann.get("/v1/jobs/none"), ann.get("/v1/nowhere")]
    assert [answer.status_code for answer in answers] == [200, 422, 404]
    assert {answer.headers.get("RateLimit-Policy") for answer in answers[:2]} == {
        '"requests_a_second";q=3;w=6'
    }
    told = [answer.headers["RateLimit"] for answer in answers[:2]]
    assert told == ['"requests_a_second";r=2;t=2', '"requests_a_second";r=1;t=4']
    assert "RateLimit" not in answers[2].headers, "nothing was counted"
    assert "RateLimit" not in api.client("bob").get("/v1/jobs").headers, "it has no limit"


def test_a_changed_limit_counts_at_once(farm: Farm, api: Api) -> None:
    ops, ann = api.client("ops", role="operator"), api.client("ann")
    change = {"requests_a_second": 0.01, "requests_burst": 1}
    told = ops.patch("/v1/tenants/ann", json=change).raise_for_status().json()
    assert (told["requests_a_second"], told["requests_burst"]) == (0.01, 1)
    assert statuses(ann, 2) == [200, 429]
    ops.patch("/v1/tenants/ann", json={"requests_burst": 3}).raise_for_status()
    assert statuses(ann, 3) == [200, 200, 429]
    ops.patch("/v1/tenants/ann", json={"requests_a_second": 20}).raise_for_status()
    wait_until(lambda: statuses(ann, 1) == [200], 2.0, "the higher limit counts")
    ops.patch("/v1/tenants/ann", json={"requests_a_second": None}).raise_for_status()
    assert statuses(ann, 9) == [200] * 9


@pytest.mark.parametrize(
    "change", [{"requests_a_second": 0}, {"requests_a_second": "5"}, {"requests_burst": 0.5}]
)
def test_a_wrong_rate_is_refused(farm: Farm, api: Api, change: dict[str, object]) -> None:
    new_tenant(farm, "ann")
    response = api.client("ops", role="operator").patch("/v1/tenants/ann", json=change)
    check_problem(response, 422)
