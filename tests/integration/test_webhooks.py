"""Webhooks: every event that is asked for arrives, signed, with the same bytes on each attempt.

`FARM_TEST_DEAD_DELIVERIES=100000 python -m pytest tests/integration/test_webhooks.py` has more of
them to a dead endpoint.
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from standardwebhooks import Webhook

from farm.context import Farm
from farm.errors import FarmError
from farm.services import doctor
from farm.services.metrics import render_metrics
from farm.services.webhooks.messages import make_messages, sample
from farm.services.webhooks.sending import Answer
from farm.store import webhooks as stored
from farm.store.engine import reads, transaction
from farm.store.tenants import remove_tenant
from tests.integration.test_api_refusals import check_problem
from tests.integration.test_events import told
from tests.support.api_server import Api, render, serving
from tests.support.receiver import Receiver, Request, receiving
from tests.support.store import register_worker, sql
from tests.support.waiting import wait_until
from workers.courier import Courier
from workers.janitor.janitor import Janitor

DEAD_DELIVERIES = int(os.environ.get("FARM_TEST_DEAD_DELIVERIES", "3000"))
PACE = 0.0002
"""Factor of the times between attempts: the ten take a minute."""


@pytest.fixture
def api(farm: Farm) -> Iterator[Api]:
    farm.settings.webhook_networks = "127.0.0.0/8"
    farm.settings.webhook_pace = PACE
    with serving(farm) as running:
        yield running


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as running:
        yield running


@contextmanager
def couriering(farm: Farm) -> Iterator[Courier]:
    """Run a courier in a thread."""
    made: list[tuple[asyncio.AbstractEventLoop, asyncio.Event, Courier]] = []

    async def work() -> None:
        stop = asyncio.Event()
        courier = Courier(farm)
        made.append((asyncio.get_running_loop(), stop, courier))
        await courier.run(stop)

    thread = threading.Thread(target=asyncio.run, args=(work(),))
    thread.start()
    wait_until(lambda: made, 10, "the courier works")
    loop, stop, courier = made[0]
    try:
        yield courier
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)


@pytest.fixture
def courier(api: Api) -> Iterator[Courier]:
    with couriering(api.farm) as running:
        yield running


def endpoint(client: httpx.Client, url: str, **fields: Any) -> dict[str, Any]:
    response = client.post("/v1/webhooks", json={"url": url, **fields})
    assert response.status_code == 201, response.text
    found: dict[str, Any] = response.json()
    return found


def health(client: httpx.Client, made: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = client.get(f"/v1/webhooks/{made['id']}").json()
    return {**found["health"], "state": found["state"]}


def deliveries(client: httpx.Client, made: dict[str, Any], **query: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.get(
        f"/v1/webhooks/{made['id']}/deliveries", params=query
    ).json()["data"]
    return found


def ended_job(api: Api, client: httpx.Client, **fields: Any) -> dict[str, Any]:
    job = api.submit(client, **fields)
    worker = register_worker(api.farm)
    render(worker, worker.must_claim())
    return job


# Messages


def test_the_end_of_a_job_is_told_with_its_images(
    api: Api, receiver: Receiver, courier: Courier
) -> None:
    ann = api.client("ann")
    made = endpoint(ann, receiver.url)
    job = ended_job(api, ann, images_per_prompt=2, labels={"order": "1017"})
    [request] = wait_until(lambda: receiver.requests, 10, "it arrives")
    assert request.is_signed_by(made["secret"])
    assert not request.is_signed_by("whsec_" + "A" * 32)
    verified = Webhook(made["secret"]).verify(request.body, request.headers)
    assert verified == request.message, "as the library of the standard reads it"
    assert request.headers["content-type"] == "application/json"
    message = request.message
    assert (message["type"], request.id) == ("job.succeeded", f"msg_{message['data']['event']}")
    data = message["data"]
    assert (data["id"], data["status"]) == (job["id"], "succeeded")
    assert data["labels"] == {"order": "1017"}
    frames = ann.get(f"/v1/jobs/{job['id']}/frames").json()["data"]
    for name in ("ordinal", "seed", "sha256", "bytes", "format"):
        assert [each[name] for each in data["frames"]] == [each[name] for each in frames]
    assert data["more"] is False
    [event] = [each for each in told(ann) if each["kind"] == "job.succeeded"]
    assert (data["event"], message["timestamp"]) == (event["id"], event["at"])


def test_the_receiver_of_the_page_takes_a_message(
    api: Api, receiver: Receiver, courier: Courier
) -> None:
    ann = api.client("ann")
    made = endpoint(ann, receiver.url)
    ended_job(api, ann)
    [sent] = wait_until(lambda: receiver.requests, 10, "it arrives")
    page = (Path(__file__).parents[2] / "docs/webhooks.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(re.sub(r"whsec_[\w+/]+", made["secret"], code), names)

    async def statuses() -> list[int]:
        transport = httpx.ASGITransport(app=names["app"])
        async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
            return [
                (await client.post("/hooks/farm", content=body, headers=sent.headers)).status_code
                for body in (sent.body, sent.body.replace(b"demo", b"else"))
            ]

    assert asyncio.run(statuses()) == [204, 401]


def test_images_have_addresses_that_need_no_key(
    api: Api, receiver: Receiver, courier: Courier
) -> None:
    api.farm.settings.public_url = api.url
    ann = api.client("ann")
    endpoint(ann, receiver.url, kinds=["frames.succeeded"])
    ended_job(api, ann)
    [request] = wait_until(lambda: receiver.requests, 10, "it arrives")
    [frame] = request.message["data"]["frames"]
    got = httpx.get(frame["image_url"])
    assert (len(got.content), got.headers["etag"]) == (frame["bytes"], f'"{frame["sha256"]}"')


def test_every_kind_is_told_to_those_that_ask_for_it(
    api: Api, receiver: Receiver, courier: Courier
) -> None:
    ann = api.client("ann")
    kinds = ["job.*", "frames.succeeded", "frame.dead"]
    endpoint(ann, receiver.url, kinds=kinds)
    job = api.submit(ann, images_per_prompt=2, bucket=1, max_attempts=1)
    worker = register_worker(api.farm)
    render(worker, worker.must_claim())
    worker.fail(worker.must_claim())
    cancelled = api.submit(ann)
    ann.post(f"/v1/jobs/{cancelled['id']}/cancel")
    wait_until(lambda: len(receiver.requests) >= 5, 10, "all arrive")
    by_kind = {each.kind: each.message["data"] for each in receiver.requests}
    assert sorted(receiver.kinds()) == sorted(
        ["job.running", "frames.succeeded", "frame.dead", "job.partial", "job.cancelled"]
    )
    assert by_kind["frame.dead"]["frames"] == [{"ordinal": 1, "attempt": 1}]
    assert by_kind["frame.dead"]["reason"] == "render_error"
    assert by_kind["job.partial"]["counts"]["dead"] == 1
    assert by_kind["job.cancelled"]["id"] == cancelled["id"]
    assert by_kind["job.partial"]["event"] > by_kind["job.running"]["event"]
    assert by_kind["frames.succeeded"]["id"] == job["id"]


def test_an_endpoint_gets_only_its_kinds_labels_and_tenant(
    api: Api, receiver: Receiver, courier: Courier
) -> None:
    ann, bob = api.client("ann"), api.client("bob")
    endpoint(ann, f"{receiver.url}/spring", labels={"campaign": "spring"})
    endpoint(ann, f"{receiver.url}/failed", kinds=["job.failed"])
    endpoint(bob, f"{receiver.url}/bob")
    ended_job(api, ann, labels={"campaign": "autumn"})
    spring = ended_job(api, ann, labels={"campaign": "spring", "team": "a"})
    other = ended_job(api, bob)
    wait_until(lambda: len(receiver.requests) >= 2, 10, "both arrive")
    assert_settled(api.farm)
    found = {each.path: each.message["data"]["id"] for each in receiver.requests}
    assert found == {"/hook/spring": spring["id"], "/hook/bob": other["id"]}


def assert_settled(farm: Farm) -> None:
    def is_settled() -> bool:
        [(events, waiting)] = sql(
            farm,
            "SELECT (SELECT count(*) FROM webhook_events),"
            " (SELECT count(*) FROM webhook_deliveries WHERE state IN ('pending', 'retrying'))",
        )
        return bool(events == waiting == 0)

    wait_until(is_settled, 20, "everything is delivered")


def test_a_late_commit_is_told(api: Api, receiver: Receiver, courier: Courier) -> None:
    ann = api.client("ann")
    endpoint(ann, receiver.url, kinds=["webhook.*"])
    [(tenant,)] = sql(api.farm, "SELECT id FROM tenants WHERE name = 'ann'")
    address = api.farm.settings.database_url.get_secret_value()
    add = "INSERT INTO events (tenant_id, kind, data) VALUES (%s, 'webhook.failing', '{}')"
    with psycopg.connect(address) as slow, psycopg.connect(address) as quick:
        slow.execute(add, [tenant])
        quick.execute(add, [tenant])
        quick.commit()
        wait_until(lambda: receiver.requests, 10, "the later one arrives at once")
        slow.commit()
    wait_until(lambda: len(receiver.requests) == 2, 10, "the earlier one arrives too")
    assert_settled(api.farm)
    late, early = receiver.requests
    assert int(early.id.removeprefix("msg_")) < int(late.id.removeprefix("msg_"))


def test_a_large_message_is_cut(api: Api, receiver: Receiver, courier: Courier) -> None:
    ann = api.client("ann")
    endpoint(ann, receiver.url)
    api.submit(ann, images_per_prompt=60)
    worker = register_worker(api.farm)
    while lease := worker.claim():
        render(worker, lease)
    [request] = wait_until(lambda: receiver.requests, 10, "it arrives")
    assert len(request.message["data"]["frames"]) == 50
    assert request.message["data"]["more"] is True
    assert len(request.body) < 20_000


# Attempts


def test_a_failure_is_tried_again_with_the_same_bytes(
    api: Api, receiver: Receiver, courier: Courier
) -> None:
    ann = api.client("ann")
    made = endpoint(ann, receiver.url)
    receiver.answer = lambda _: 500 if len(receiver.requests) < 3 else 204
    ended_job(api, ann)
    wait_until(lambda: len(receiver.requests) == 3, 20, "it is tried three times")
    assert_settled(api.farm)
    assert len({(each.id, each.body) for each in receiver.requests}) == 1
    assert [each.headers["farm-attempt"] for each in receiver.requests] == ["1", "2", "3"]
    assert all(each.is_signed_by(made["secret"]) for each in receiver.requests)
    [delivery] = deliveries(ann, made)
    assert delivery["state"] == "succeeded"
    assert [each["status"] for each in delivery["attempts"]] == [500, 500, 204]
    assert [each["error"] for each in delivery["attempts"]] == ["answered 500"] * 2 + [None]
    assert health(ann, made)["failures"] == 0


def test_a_short_outage_parks_for_a_short_time(api: Api, receiver: Receiver) -> None:
    """Eight attempts are in flight when it begins. They count as five failures."""
    api.farm.settings.webhook_pace = 1.0
    ann = api.client("ann")
    made = endpoint(ann, receiver.url, kinds=["job.cancelled"])
    receiver.answer = lambda _: 503
    for _ in range(20):
        job = api.submit(ann)
        ann.post(f"/v1/jobs/{job['id']}/cancel")
    with couriering(api.farm), couriering(api.farm):
        wait_until(lambda: health(ann, made)["parked_until"], 20, "it is parked")
        sql(api.farm, "UPDATE webhook_deliveries SET next_at = clock_timestamp()")
        job = api.submit(ann)  # work for the couriers
        assert_made(api.farm)
    found = health(ann, made)
    assert found["failures"] == stored.PARKING_FAILURES
    until = datetime.fromisoformat(found["parked_until"]) - datetime.now(UTC)
    assert until < timedelta(seconds=stored.PARKED_SECONDS)
    assert len(receiver.requests) <= stored.PER_ENDPOINT


def assert_made(farm: Farm) -> None:
    wait_until(
        lambda: sql(farm, "SELECT count(*) FROM webhook_events") == [(0,)], 10, "all are made"
    )


def test_an_event_without_a_message_holds_up_no_others(
    api: Api, receiver: Receiver, courier: Courier, caplog: pytest.LogCaptureFixture
) -> None:
    ann = api.client("ann")
    endpoint(ann, receiver.url, kinds=["frame.dead", "job.cancelled"])
    [(tenant,)] = sql(api.farm, "SELECT id FROM tenants WHERE name = 'ann'")
    sql(
        api.farm,
        "INSERT INTO events (tenant_id, job_id, kind, data) VALUES"
        " (:t, gen_random_uuid(), 'frames.failed', '{\"frames\": [[0, 1, \"dead\"], [0]]}')",
        t=tenant,
    )
    job = api.submit(ann)
    ann.post(f"/v1/jobs/{job['id']}/cancel")
    [request] = wait_until(lambda: receiver.requests, 10, "the other one arrives")
    assert request.kind == "job.cancelled"
    assert "gets no message" in caplog.text


def test_an_outcome_counts_only_with_its_lease(api: Api, receiver: Receiver) -> None:
    ann = api.client("ann")
    made = endpoint(ann, receiver.url)
    ended_job(api, ann)
    make_messages(api.farm)
    with transaction(api.farm.store) as connection:
        [late] = stored.claim(connection, [], 10)
    sql(api.farm, "UPDATE webhook_deliveries SET leased_until = clock_timestamp()")
    courier = Courier(api.farm)
    with transaction(api.farm.store) as connection:
        [now] = stored.claim(connection, [], 10)
    courier._record(late, Answer(5, None, "no answer within 10 s"))
    [delivery] = deliveries(ann, made)
    assert (delivery["state"], delivery["attempts"]) == ("pending", [])
    assert health(ann, made)["failures"] == 0
    courier._record(now, Answer(5, 200))
    [delivery] = deliveries(ann, made)
    assert (delivery["state"], len(delivery["attempts"])) == ("succeeded", 1)


def test_a_message_is_dead_after_ten_attempts(
    api: Api, receiver: Receiver, courier: Courier
) -> None:
    """Statuses that may be about this message alone park no endpoint."""
    api.farm.settings.webhook_pace = 0.00001
    ann = api.client("ann")
    made = endpoint(ann, receiver.url)
    receiver.answer = lambda _: 422
    ended_job(api, ann)
    wait_until(lambda: len(receiver.requests) >= 10, 60, "ten attempts")
    assert_settled(api.farm)
    [delivery] = deliveries(ann, made)
    assert (delivery["state"], len(delivery["attempts"])) == ("dead", 10)
    assert len(receiver.requests) == 10
    assert health(ann, made)["state"] == "enabled"
    response = ann.post(f"/v1/deliveries/{delivery['id']}/redeliver")
    assert response.status_code == 202
    receiver.answer = lambda _: 200
    wait_until(lambda: deliveries(ann, made)[0]["state"] == "succeeded", 20, "it is sent again")
    assert receiver.requests[-1].id == receiver.requests[0].id


def test_410_disables_an_endpoint_and_its_tenant_is_told(
    api: Api, receiver: Receiver, courier: Courier
) -> None:
    ann = api.client("ann")
    made = endpoint(ann, receiver.url)
    with receiving() as other:
        endpoint(ann, other.url, kinds=["webhook.disabled"])
        receiver.answer = lambda _: 410
        ended_job(api, ann)
        [request] = wait_until(lambda: other.requests, 20, "the other endpoint is told")
        assert request.message["data"]["webhook"] == made["id"]
    assert health(ann, made)["state"] == "disabled"
    assert health(ann, made)["disabled_because"] == "answered 410"
    assert deliveries(ann, made)[0]["state"] == "dropped"
    ended_job(api, ann)
    assert_settled(api.farm)
    assert len(receiver.requests) == 1
    receiver.answer = lambda _: 200
    ann.patch(f"/v1/webhooks/{made['id']}", json={"state": "enabled"})
    ended_job(api, ann)
    wait_until(lambda: len(receiver.requests) == 2, 10, "it is told again")
    since = {"since": (datetime.now(UTC) - timedelta(hours=1)).isoformat()}
    replayed = ann.post(f"/v1/webhooks/{made['id']}/replay", json=since).json()
    assert replayed["queued"] == 2, "the dropped one, and that of the time when it was disabled"
    wait_until(lambda: len(receiver.requests) == 4, 10, "all arrive")
    assert_settled(api.farm)
    assert [each["kind"] for each in told(ann, kind="webhook.disabled")] == ["webhook.disabled"]


def test_a_redirect_is_a_failure(api: Api, receiver: Receiver, courier: Courier) -> None:
    ann = api.client("ann")
    made = endpoint(ann, receiver.url)
    with receiving() as other:
        receiver.headers = {"location": other.url}
        receiver.answer = lambda _: 301
        ended_job(api, ann)
        wait_until(lambda: health(ann, made)["failures"], 10, "an attempt failed")
        error = deliveries(ann, made)[0]["attempts"][0]["error"]
        assert error.startswith(f"answered 301 to {other.url}; redirects are not followed")
        assert other.requests == []


def test_a_dead_endpoint_is_parked_and_delays_nobody(
    api: Api, receiver: Receiver, courier: Courier
) -> None:
    ann, bob = api.client("ann"), api.client("bob")
    made = endpoint(ann, f"{receiver.url}/dead", kinds=["job.cancelled", "webhook.failing"])
    works = endpoint(bob, f"{receiver.url}/quick", kinds=["job.cancelled"])
    receiver.answer = lambda request: 503 if request.path.endswith("/dead") else 200
    for _ in range(20):
        job = api.submit(ann)
        ann.post(f"/v1/jobs/{job['id']}/cancel")
    wait_until(lambda: health(ann, made)["parked_until"], 20, "it is parked")
    job = api.submit(bob)
    bob.post(f"/v1/jobs/{job['id']}/cancel")
    committed = time.time()
    [arrived] = wait_until(lambda: quick(receiver), 10, "it arrives")
    assert arrived.at - committed < 1.0
    assert health(bob, works)["failures"] == 0
    wait_until(lambda: health(ann, made)["failures"] > 6, 30, "it is tried now and then")
    [(tries,)] = sql(api.farm, "SELECT max(tries) FROM webhook_deliveries")
    assert tries <= stored.PARKING_FAILURES, "tries of a parked endpoint are not used up"
    assert [each["kind"] for each in told(ann, kind="webhook.*")] == ["webhook.failing"]
    receiver.answer = lambda _: 200
    wait_until(
        lambda: {each["state"] for each in deliveries(ann, made)} == {"succeeded"},
        30,
        "all arrive once it works again",
    )
    took = Counter(each.id for each in receiver.requests if each.path.endswith("/dead"))
    assert len(took) == 20


def quick(receiver: Receiver, least: int = 1) -> list[Request]:
    """Return the requests of the endpoint that works, once it has so many."""
    found = [each for each in receiver.requests if "quick" in each.path]
    return found if len(found) >= least else []


@pytest.mark.full_size
def test_many_deliveries_to_a_dead_endpoint_delay_nobody(
    api: Api, receiver: Receiver, courier: Courier
) -> None:
    """The dead one hangs until the attempt ends."""
    ann, bob = api.client("ann"), api.client("bob")
    dead = endpoint(ann, f"{receiver.url}/dead", kinds=["job.cancelled"])
    endpoint(bob, f"{receiver.url}/quick", kinds=["job.cancelled"])
    hanging = threading.Event()

    def answer(request: Request) -> int:
        if "dead" in request.path:
            hanging.wait(30)
        return 200

    receiver.answer = answer
    sql(
        api.farm,
        "INSERT INTO webhook_deliveries (webhook_id, message_id, kind, body)"
        " SELECT :id, 'msg_old_' || n, 'job.cancelled', '{}' FROM generate_series(1, :n) n",
        id=dead["id"],
        n=DEAD_DELIVERIES,
    )
    late = []
    for number in range(20):
        job = api.submit(bob)
        committed = time.time()
        bob.post(f"/v1/jobs/{job['id']}/cancel")
        [*_, came] = wait_until(partial(quick, receiver, number + 1), 10, "it arrives")
        late.append(came.at - committed)
    hanging.set()
    assert sorted(late)[18] < 1.0, "the 95th percentile"


def test_the_lag_is_what_couriers_leave_undone(api: Api, receiver: Receiver) -> None:
    def lag() -> float:
        with reads(api.farm.store) as connection:
            return stored.lag(connection)

    ann = api.client("ann")
    endpoint(ann, receiver.url)
    assert lag() == 0
    ended_job(api, ann)
    sql(api.farm, "UPDATE events SET at = at - interval '90 s'")
    assert 89 < lag() < 120, "an event without its message"
    make_messages(api.farm)
    sql(api.farm, "UPDATE webhook_deliveries SET next_at = next_at - interval '70 s'")
    assert 69 < lag() < 100, "a message without an attempt"
    for column, value in (
        ("served_at", "clock_timestamp()"),  # a slow receiver is tried all the time
        ("parked_until", "clock_timestamp() + interval '1 h'"),
        ("state", "'paused'"),
    ):
        sql(api.farm, "UPDATE webhooks SET served_at = NULL, parked_until = NULL")
        assert lag() > 69
        sql(api.farm, f"UPDATE webhooks SET {column} = {value}")
        assert lag() < 10, column
    sql(api.farm, "UPDATE webhooks SET state = 'enabled'")
    with pytest.raises(FarmError, match="no courier is alive"):
        doctor._courier(api.farm.store)
    assert b"farm_webhook_lag_seconds 7" in render_metrics(api.farm)
    with couriering(api.farm):
        wait_until(lambda: receiver.requests and lag() == 0, 10, "it is sent")
    assert doctor._courier(api.farm.store)


def test_a_message_of_a_killed_courier_is_sent_again(api: Api, receiver: Receiver) -> None:
    ann = api.client("ann")
    made = endpoint(ann, receiver.url)
    ended_job(api, ann)
    make_messages(api.farm)
    with transaction(api.farm.store) as connection:
        [claimed] = stored.claim(connection, [], 10)  # its courier dies
        assert stored.claim(connection, [], 10) == []
    sql(api.farm, "UPDATE webhook_deliveries SET leased_until = clock_timestamp()")
    with couriering(api.farm):
        [request] = wait_until(lambda: receiver.requests, 10, "another courier sends it")
    assert (request.id, request.body) == (claimed.message_id, claimed.body)
    assert request.is_signed_by(made["secret"])


def test_two_couriers_send_each_message_once(api: Api, receiver: Receiver) -> None:
    ann = api.client("ann")
    endpoint(ann, receiver.url, kinds=["job.cancelled"])
    with couriering(api.farm), couriering(api.farm):
        for _ in range(40):
            job = api.submit(ann)
            ann.post(f"/v1/jobs/{job['id']}/cancel")
        wait_until(lambda: len(receiver.requests) >= 40, 20, "all arrive")
        assert_settled(api.farm)
    assert set(Counter(each.id for each in receiver.requests).values()) == {1}


# The API


def test_a_secret_is_shown_once_and_can_be_replaced(
    api: Api, receiver: Receiver, courier: Courier
) -> None:
    ann = api.client("ann")
    made = endpoint(ann, receiver.url)
    for path in ("/v1/webhooks", f"/v1/webhooks/{made['id']}"):
        assert made["secret"][6:] not in ann.get(path).text
    path = f"/v1/webhooks/{made['id']}/rotate"
    rotated = ann.post(path, json={"keep_seconds": 60}).json()
    assert rotated["previous_until"] is not None
    ended_job(api, ann)
    [request] = wait_until(lambda: receiver.requests, 10, "it arrives")
    assert request.is_signed_by(made["secret"])
    assert request.is_signed_by(rotated["secret"])
    last = ann.post(path, json={"keep_seconds": 0}).json()
    ended_job(api, ann)
    wait_until(lambda: len(receiver.requests) == 2, 10, "it arrives")
    assert receiver.requests[1].is_signed_by(last["secret"])
    assert not receiver.requests[1].is_signed_by(rotated["secret"])


def test_a_sample_is_sent_at_once(api: Api, receiver: Receiver) -> None:
    ann = api.client("ann")
    made = endpoint(ann, receiver.url)
    path = f"/v1/webhooks/{made['id']}/test"
    got = ann.post(path, json={"kind": "job.failed"}).json()
    [request] = receiver.requests
    assert request.is_signed_by(made["secret"])
    assert (request.kind, request.id) == ("job.failed", got["message"])
    assert request.message["data"]["test"] is True
    assert (got["status"], got["error"], got["answer"]) == (200, None, "ok")
    receiver.answer, receiver.body = lambda _: 403, b"who\x00 are\x1b you?"
    got = ann.post(path, json={}).json()
    assert (got["status"], got["error"], got["answer"]) == (403, "answered 403", "who  are  you?")
    assert deliveries(ann, made) == []
    assert check_problem(ann.post(path, json={"kind": "job.done"}), 422)["error"]["param"] == "kind"


def test_a_new_endpoint_is_told_of_the_past(api: Api, receiver: Receiver, courier: Courier) -> None:
    ann = api.client("ann")
    jobs = [ended_job(api, ann)["id"] for _ in range(3)]
    made = endpoint(ann, receiver.url)
    since = (datetime.now(UTC) - timedelta(hours=1)).isoformat()
    path = f"/v1/webhooks/{made['id']}/replay"
    response = ann.post(path, json={"since": since})
    assert (response.status_code, response.json()) == (202, {"queued": 3, "cursor": None})
    wait_until(lambda: len(receiver.requests) == 3, 10, "all arrive")
    assert {each.message["data"]["id"] for each in receiver.requests} == set(jobs)
    assert ann.post(path, json={"since": since}).json()["queued"] == 0


def test_a_paused_endpoint_keeps_its_messages(
    api: Api, receiver: Receiver, courier: Courier
) -> None:
    ann = api.client("ann")
    made = endpoint(ann, receiver.url)
    path = f"/v1/webhooks/{made['id']}"
    assert ann.patch(path, json={"state": "paused"}).json()["state"] == "paused"
    ended_job(api, ann)
    wait_until(lambda: deliveries(ann, made), 10, "the message is made")
    assert receiver.requests == []
    changed = ann.patch(path, json={"state": "enabled", "description": "shop"}).json()
    assert (changed["state"], changed["description"]) == ("enabled", "shop")
    wait_until(lambda: receiver.requests, 10, "it arrives")


def test_a_deleted_endpoint_gets_nothing_and_leaves_nothing(
    api: Api, receiver: Receiver, courier: Courier
) -> None:
    ann = api.client("ann")
    made = endpoint(ann, receiver.url)
    ended_job(api, ann)
    wait_until(lambda: receiver.requests, 10, "it arrives")
    assert ann.delete(f"/v1/webhooks/{made['id']}").status_code == 204
    check_problem(ann.get(f"/v1/webhooks/{made['id']}"), 404)
    ended_job(api, ann)
    assert_settled(api.farm)
    assert len(receiver.requests) == 1
    with api.farm.store.connect() as connection:
        Janitor(api.farm).sweep(connection)
    assert sql(api.farm, "SELECT count(*) FROM webhooks") == [(0,)]
    assert sql(api.farm, "SELECT count(*) FROM webhook_attempts") == [(0,)]


def test_a_delivery_is_shown_as_it_is_sent(api: Api, receiver: Receiver, courier: Courier) -> None:
    ann, bob = api.client("ann"), api.client("bob")
    made = endpoint(ann, receiver.url)
    job = ended_job(api, ann)
    assert wait_until(lambda: receiver.requests, 10, "it arrives")
    assert_settled(api.farm)
    [listed] = deliveries(ann, made, state="succeeded")
    shown = ann.get(f"/v1/deliveries/{listed['id']}").json()
    assert shown["body"] == receiver.requests[0].message
    assert (shown["job"], shown["message"]) == (job["id"], receiver.requests[0].id)
    assert deliveries(ann, made, state="dead") == []
    check_problem(bob.get(f"/v1/deliveries/{listed['id']}"), 404)
    check_problem(bob.post(f"/v1/deliveries/{listed['id']}/redeliver"), 404)


def test_tenants_do_not_see_each_others_endpoints(api: Api, receiver: Receiver) -> None:
    ann, bob = api.client("ann"), api.client("bob")
    made = endpoint(ann, receiver.url)
    path = f"/v1/webhooks/{made['id']}"
    assert bob.get("/v1/webhooks").json()["data"] == []
    for call in (
        bob.get(path),
        bob.get(f"{path}/deliveries"),
        bob.patch(path, json={"state": "paused"}),
        bob.delete(path),
        bob.post(f"{path}/rotate", json={}),
        bob.post(f"{path}/test", json={}),
        bob.post(f"{path}/replay", json={"since": "2026-01-01T00:00:00Z"}),
    ):
        check_problem(call, 404)
    viewer = api.client("ann", "viewer")
    assert viewer.get(path).status_code == 200
    for call in (viewer.post("/v1/webhooks", json={"url": receiver.url}), viewer.delete(path)):
        check_problem(call, 403)
    assert receiver.requests == []


def test_a_removed_tenants_endpoints_go(api: Api, receiver: Receiver) -> None:
    ann = api.client("ann")
    endpoint(ann, receiver.url)
    ended_job(api, ann)
    [(tenant,)] = sql(api.farm, "SELECT id FROM tenants WHERE name = 'ann'")
    with transaction(api.farm.store) as connection:
        remove_tenant(connection, tenant)
    with api.farm.store.connect() as connection:
        for _ in range(3):
            Janitor(api.farm).sweep(connection)
    with couriering(api.farm):
        wait_until(
            lambda: sql(api.farm, "SELECT count(*) FROM webhook_events") == [(0,)], 10, "all taken"
        )
    assert receiver.requests == []
    assert sql(api.farm, "SELECT count(*) FROM webhooks") == [(0,)]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "url"),
        ({"url": "shop.example/hooks"}, "url"),
        ({"url": "ftp://shop.example/"}, "url"),
        ({"url": "https://user:pw@shop.example/"}, "url"),
        ({"url": "https://shop.example/#x"}, "url"),
        ({"url": "https://shop.example/" + "x" * 2000}, "url"),
        ({"url": "https://sh op.example/"}, "url"),
        ({"url": "https://10.0.0.5/"}, "url"),
        ({"url": "https://shop.example/", "kinds": ["job.done"]}, "kinds"),
        ({"url": "https://shop.example/", "kinds": ["frames.claimed"]}, "kinds"),
        ({"url": "https://shop.example/", "labels": {"a": 5}}, "labels.a"),
        ({"url": "https://shop.example/", "secret": "mine"}, "secret"),
    ],
)
def test_wrong_endpoints_are_refused(api: Api, fields: dict[str, Any], param: str) -> None:
    response = api.client("ann").post("/v1/webhooks", json=fields)
    assert check_problem(response, 422)["error"]["param"] == param


def test_a_tenant_has_a_number_of_endpoints_at_most(api: Api) -> None:
    ann = api.client("ann")
    for number in range(20):
        endpoint(ann, f"https://shop.example/{number}")
    problem = check_problem(ann.post("/v1/webhooks", json={"url": "https://shop.example/"}), 422)
    assert "has 20 webhooks" in problem["detail"]


def test_an_endpoint_that_only_fails_is_disabled(api: Api, receiver: Receiver) -> None:
    ann = api.client("ann")
    made = endpoint(ann, receiver.url)
    ended_job(api, ann)
    make_messages(api.farm)
    sql(api.farm, "UPDATE webhooks SET failures = 40, failing_since = now() - interval '6 days'")
    with api.farm.store.connect() as connection:
        Janitor(api.farm).sweep(connection)
    assert health(ann, made)["state"] == "disabled"
    assert health(ann, made)["disabled_because"].startswith("Every attempt failed since 20")
    assert deliveries(ann, made)[0]["state"] == "dropped"
    assert [each["kind"] for each in told(ann, kind="webhook.*")] == ["webhook.disabled"]


def test_old_deliveries_are_deleted(api: Api, receiver: Receiver) -> None:
    ann = api.client("ann")
    made = endpoint(ann, receiver.url)
    for _ in range(2):
        ended_job(api, ann)
    make_messages(api.farm)
    sql(
        api.farm,
        "UPDATE webhook_deliveries SET created_at = now() - interval '31 days', state = 'dead'"
        " WHERE id = (SELECT min(id) FROM webhook_deliveries)",
    )
    with api.farm.store.connect() as connection:
        Janitor(api.farm).sweep(connection)
    assert len(deliveries(ann, made)) == 1


def test_samples_of_all_kinds_can_be_made() -> None:
    for kind in ("job.succeeded", "frame.dead", "export.failed", "webhook.failing"):
        request = Request("/", {}, sample(kind), 0.0)
        assert (request.kind, request.message["data"]["test"]) == (kind, True)
    assert uuid.UUID(request.message["data"]["id"]).int == 0
