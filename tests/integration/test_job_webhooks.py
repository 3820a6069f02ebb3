"""Addresses that jobs name: each is told of its job, and of no other."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from farm.context import Farm
from farm.domain.event_kinds import is_in
from farm.domain.webhook_addresses import parse_target
from farm.errors import InvalidRequest
from farm.services.webhooks import of_jobs
from farm.store import webhooks as stored
from farm.store.engine import transaction
from tests.integration.test_api_refusals import check_problem
from tests.integration.test_webhooks import (
    couriering,
    deliveries,
    ended_job,
    endpoint,
)
from tests.support.api_server import JOB, Api, serving
from tests.support.receiver import Receiver, receiving
from tests.support.store import sql
from tests.support.waiting import wait_until
from workers.courier import Courier


@pytest.fixture
def api(farm: Farm) -> Iterator[Api]:
    farm.settings.webhook_networks = "127.0.0.0/8"
    farm.settings.webhook_pace = 0.0002
    with serving(farm) as running:
        yield running


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as running:
        yield running


@pytest.fixture
def courier(api: Api) -> Iterator[Courier]:
    with couriering(api.farm) as running:
        yield running


def secret_of(client: httpx.Client) -> str:
    response = client.get("/v1/webhooks/secret")
    assert response.status_code == 200, response.text
    return str(response.json()["secret"])


def servers(client: httpx.Client) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.get("/v1/webhooks").json()["data"]
    return [each for each in found if each["named_by_jobs"]]


def idle(api: Api) -> bool:
    """Tell whether every message is made, and none waits."""
    [[waiting]] = sql(
        api.farm,
        "SELECT (SELECT count(*) FROM webhook_events) + (SELECT count(*) FROM webhook_deliveries "
        "WHERE state IN ('pending', 'retrying'))",
    )
    return not waiting


def test_a_jobs_address_is_told_how_it_ended(api: Api, receiver: Receiver, courier: object) -> None:
    ann = api.client("ann")
    job = ended_job(api, ann, webhook={"url": receiver.url + "?order=7&key=s3"})
    ended_job(api, ann)
    [request] = wait_until(lambda: receiver.requests, 10, "it arrives")
    wait_until(lambda: idle(api), 10, "all are sent")
    assert len(receiver.requests) == 1, "the other job named none"
    assert request.path == "/hook?order=7&key=s3"
    assert request.is_signed_by(secret_of(ann))
    assert request.kind == "job.succeeded"
    assert request.message["data"]["id"] == job["id"]
    assert request.message["data"]["frames"][0]["sha256"]


def test_a_job_says_which_kinds_its_address_is_told(
    api: Api, receiver: Receiver, courier: object
) -> None:
    ann = api.client("ann")
    webhook = {"url": receiver.url, "kinds": ["job.running", "frames.succeeded"]}
    ended_job(api, ann, webhook=webhook)
    wait_until(lambda: len(receiver.requests) == 2 and idle(api), 10, "both arrive")
    assert sorted(receiver.kinds()) == ["frames.succeeded", "job.running"]


def test_an_endpoint_and_a_jobs_address_get_the_same_message(
    api: Api, receiver: Receiver, courier: object
) -> None:
    ann = api.client("ann")
    made = endpoint(ann, receiver.url)
    ended_job(api, ann, webhook={"url": receiver.url})
    wait_until(lambda: len(receiver.requests) == 2, 10, "both arrive")
    first, second = receiver.requests
    assert (first.id, first.body) == (second.id, second.body)
    secrets = {made["secret"], secret_of(ann)}
    assert len(secrets) == 2
    for request in (first, second):
        assert sum(request.is_signed_by(secret) for secret in secrets) == 1
    wait_until(lambda: idle(api), 10, "both are recorded")
    sql(api.farm, "DELETE FROM webhook_deliveries")
    since = (datetime.now(UTC) - timedelta(hours=1)).isoformat()
    replayed = ann.post(f"/v1/webhooks/{made['id']}/replay", json={"since": since}).json()
    assert replayed["queued"] == 1, "the endpoint's, and not the job's"


def test_a_dead_server_is_parked_whichever_address_a_job_names(
    api: Api, receiver: Receiver
) -> None:
    api.farm.settings.webhook_pace = 1.0
    receiver.answer = lambda _: 500
    ann = api.client("ann")
    for number in range(8):
        job = api.submit(ann, webhook={"url": f"{receiver.url}/{number}"})
        ann.post(f"/v1/jobs/{job['id']}/cancel")
    with couriering(api.farm):
        wait_until(lambda: servers(ann)[0]["health"]["parked_until"], 20, "the server is parked")
        wait_until(lambda: not sql(api.farm, "SELECT FROM webhook_events"), 10, "all are made")
    [server] = servers(ann)
    assert server["url"] == receiver.url.removesuffix("/hook")
    assert {each["url"] for each in deliveries(ann, server)} == {
        f"{receiver.url}/{number}" for number in range(8)
    }
    assert len(receiver.requests) <= 12, "what waits for a parked server uses up no attempts"


def test_410_at_one_address_leaves_the_others_of_its_server(
    api: Api, receiver: Receiver, courier: object
) -> None:
    receiver.answer = lambda request: 410 if request.path == "/hook/old" else 200
    ann = api.client("ann")
    for name in ("old", "new"):
        ended_job(api, ann, webhook={"url": f"{receiver.url}/{name}"})
    wait_until(lambda: len(receiver.requests) == 2 and idle(api), 10, "both are sent")
    ended_job(api, ann, webhook={"url": f"{receiver.url}/old"})
    wait_until(lambda: len(receiver.requests) == 3 and idle(api), 10, "the old one again, alone")
    [server] = servers(ann)
    assert (server["state"], server["health"]["failures"]) == ("enabled", 0)
    assert server["health"]["failing_since"] is None, "it is not disabled five days later"
    states = {each["url"]: each["state"] for each in deliveries(ann, server)}
    assert states == {f"{receiver.url}/old": "dropped", f"{receiver.url}/new": "succeeded"}


def test_a_disabled_server_is_enabled_when_a_job_names_it_again(
    api: Api, receiver: Receiver, courier: object
) -> None:
    ann = api.client("ann")
    ended_job(api, ann, webhook={"url": receiver.url})
    wait_until(lambda: receiver.requests and idle(api), 10, "it arrives")
    sql(
        api.farm,
        "UPDATE webhooks SET failures = 9, failing_since = now() - interval '6 days'",
    )
    with transaction(api.farm.store) as connection:
        assert len(stored.disable_failing(connection)) == 1
    assert servers(ann)[0]["state"] == "disabled"
    ended_job(api, ann, webhook={"url": receiver.url})
    wait_until(lambda: len(receiver.requests) == 2, 10, "the second arrives")
    [server] = servers(ann)
    assert server["state"] == "enabled"
    assert server["health"]["disabled_because"] is None


def test_a_paused_server_keeps_its_messages_and_a_deleted_one_does_not(
    api: Api, receiver: Receiver, courier: object
) -> None:
    ann = api.client("ann")
    webhook = {"url": receiver.url}
    job = ended_job(api, ann, webhook=webhook)
    wait_until(lambda: receiver.requests, 10, "the first arrives")
    path = f"/v1/webhooks/{servers(ann)[0]['id']}"
    assert ann.patch(path, json={"state": "paused"}).status_code == 200
    ended_job(api, ann, webhook=webhook)
    wait_until(lambda: not sql(api.farm, "SELECT FROM webhook_events"), 10, "it is made")
    assert ann.get(path).json()["state"] == "paused", "naming it again does not enable it"
    assert ann.patch(path, json={"state": "enabled"}).status_code == 200
    wait_until(lambda: len(receiver.requests) == 2 and idle(api), 10, "the second arrives")
    since = (datetime.now(UTC) - timedelta(hours=1)).isoformat()
    assert ann.post(path + "/replay", json={"since": since}).json()["queued"] == 0
    sql(api.farm, "DELETE FROM webhook_deliveries WHERE job_id = :id", id=job["id"])
    assert ann.post(path + "/replay", json={"since": since}).json()["queued"] == 1
    wait_until(lambda: len(receiver.requests) == 3 and idle(api), 10, "it is sent again")
    later = api.submit(ann, webhook=webhook)
    assert ann.delete(path).status_code == 204
    assert ann.post(f"/v1/jobs/{later['id']}/cancel").status_code == 200
    wait_until(lambda: idle(api), 10, "all are sent")
    assert len(receiver.requests) == 3


def test_the_secret_is_the_tenants_and_can_be_replaced(
    api: Api, receiver: Receiver, courier: object
) -> None:
    ann, bob = api.client("ann"), api.client("bob")
    first = secret_of(ann)
    row = "SELECT xmin::text FROM tenants WHERE name = 'ann'"
    before = sql(api.farm, row)
    assert secret_of(ann) == first != secret_of(bob)
    assert sql(api.farm, row) == before, "reading it writes nothing"
    ended_job(api, ann, webhook={"url": receiver.url})
    wait_until(lambda: receiver.requests, 10, "the first arrives")
    rotated = ann.post("/v1/webhooks/secret/rotate", json={"keep_seconds": 3600}).json()
    assert rotated["secret"] == secret_of(ann) != first
    assert rotated["previous_until"]
    ended_job(api, ann, webhook={"url": receiver.url})
    with receiving() as other:  # a server that is named first after the change
        ended_job(api, ann, webhook={"url": other.url})
        wait_until(lambda: len(receiver.requests) == 2 and other.requests, 10, "they arrive")
        for request in (receiver.requests[-1], other.requests[0]):
            assert request.is_signed_by(first)
            assert request.is_signed_by(rotated["secret"])
    assert not receiver.requests[0].is_signed_by(rotated["secret"])
    ann.post("/v1/webhooks/secret/rotate", json={"keep_seconds": 0})
    ended_job(api, ann, webhook={"url": receiver.url})
    wait_until(lambda: len(receiver.requests) == 3, 10, "it arrives")
    assert receiver.requests[-1].is_signed_by(secret_of(ann))
    assert not receiver.requests[-1].is_signed_by(rotated["secret"])
    viewer = api.client("ann", "viewer")
    for refused in (
        viewer.get("/v1/webhooks/secret"),
        viewer.post("/v1/webhooks/secret/rotate", json={}),
    ):
        check_problem(refused, 403)


def test_nobody_sees_an_address_in_a_job_and_strangers_see_nothing(
    api: Api, receiver: Receiver, courier: object
) -> None:
    ann, bob, viewer = api.client("ann"), api.client("bob"), api.client("ann", "viewer")
    job = ended_job(api, ann, webhook={"url": receiver.url + "?key=s3cret"})
    wait_until(lambda: receiver.requests and idle(api), 10, "it arrives")
    path = f"/v1/jobs/{job['id']}"
    assert "s3cret" not in ann.get(path).text + ann.get(path + "/frames").text
    [[spec]] = sql(api.farm, "SELECT spec FROM jobs")
    assert "webhook" not in spec
    assert ann.get(path + "/deliveries").json()["data"][0]["url"].endswith("?key=s3cret")
    assert viewer.get(path + "/deliveries").json()["data"][0]["url"] == receiver.url
    check_problem(bob.get(path + "/deliveries"), 404)
    assert servers(bob) == []


def test_jobs_of_a_batch_name_their_own(
    api: Api, receiver: Receiver, courier: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    find = of_jobs._server

    def counted(farm: Farm, tenant_id: uuid.UUID, origin: str) -> uuid.UUID:
        looked.append(origin)
        return find(farm, tenant_id, origin)

    monkeypatch.setattr(of_jobs, "_server", counted)
    ann = api.client("ann")
    jobs = [{**JOB, "webhook": {"url": f"{receiver.url}/{number}"}} for number in range(3)]
    jobs.append({**JOB, "webhook": {"url": "https://10.0.0.1/"}})
    answers = ann.post("/v1/jobs/batch", json={"jobs": jobs}).json()["data"]
    assert [each.get("status") for each in answers] == [202, 202, 202, 422]
    assert len(looked) == 1, "their server is looked for once"
    for answer in answers[:3]:
        ann.post(f"/v1/jobs/{answer['job']['id']}/cancel")
    wait_until(lambda: len(receiver.requests) == 3, 10, "they arrive")
    assert {each.path for each in receiver.requests} == {"/hook/0", "/hook/1", "/hook/2"}
    for request in receiver.requests:
        number = int(request.path.removeprefix("/hook/"))
        assert request.message["data"]["id"] == answers[number]["job"]["id"]


def test_the_same_submission_is_told_once_and_another_address_is_another_body(
    api: Api, receiver: Receiver, courier: object
) -> None:
    ann = api.client("ann")
    key = {"Idempotency-Key": "order-7"}
    body = {**JOB, "webhook": {"url": receiver.url}}
    first, again = (ann.post("/v1/jobs", json=body, headers=key) for _ in range(2))
    assert first.json()["id"] == again.json()["id"]
    other = {**JOB, "webhook": {"url": receiver.url + "/other"}}
    assert ann.post("/v1/jobs", json=other, headers=key).status_code >= 400
    ann.post(f"/v1/jobs/{first.json()['id']}/cancel")
    wait_until(lambda: receiver.requests and idle(api), 10, "it arrives")
    assert [each.path for each in receiver.requests] == ["/hook"]


@pytest.mark.parametrize(
    ("webhook", "param"),
    [
        ("https://shop.example/hook", "webhook"),
        ({}, "webhook.url"),
        ({"url": "shop.example"}, "webhook.url"),
        ({"url": "https://10.0.0.1/hook"}, "webhook.url"),
        ({"url": "https://ann:pw@shop.example/"}, "webhook.url"),
        ({"url": "https://shop.example/", "kinds": ["export.succeeded"]}, "webhook.kinds"),
        ({"url": "https://shop.example/", "kinds": ["job.queued"]}, "webhook.kinds"),
        ({"url": "https://shop.example/", "kinds": []}, "webhook.kinds"),
        ({"url": "https://shop.example/", "labels": {}}, "webhook.labels"),
    ],
)
def test_wrong_addresses_are_refused_before_anything_is_stored(
    api: Api, webhook: object, param: str
) -> None:
    ann = api.client("ann")
    for query in ("", "?dry_run=true"):
        response = ann.post(f"/v1/jobs{query}", json={**JOB, "webhook": webhook})
        error = check_problem(response, 422)["error"]
        assert error["param"] == param
        assert error["message"].startswith(param)
    assert api.jobs_stored() == 0
    assert servers(ann) == []


def test_a_courier_of_an_earlier_version_sends_nothing_to_a_server(api: Api) -> None:
    """It knows no addresses of jobs: it would send to the address of the row."""
    api.submit(api.client(), webhook={"url": "https://shop.example/hook"})
    [[url, kinds]] = sql(api.farm, "SELECT url, kinds FROM webhooks")
    assert not is_in("job.succeeded", kinds)
    with pytest.raises(InvalidRequest):
        parse_target(url, [])


def test_a_dry_run_stores_no_server(api: Api, receiver: Receiver) -> None:
    ann = api.client("ann")
    body = {**JOB, "webhook": {"url": receiver.url}}
    assert ann.post("/v1/jobs?dry_run=true", json=body).status_code == 200
    assert servers(ann) == []


def test_a_tenants_jobs_name_a_number_of_servers_at_most(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_jobs, "MAX_SERVERS", 2)
    ann = api.client("ann")
    for name in ("a", "b", "a"):
        api.submit(ann, webhook={"url": f"https://{name}.example/{uuid.uuid4()}"})
    refused = ann.post("/v1/jobs", json={**JOB, "webhook": {"url": "https://c.example/"}})
    assert check_problem(refused, 422)["error"]["param"] == "webhook.url"
    api.submit(api.client("bob"), webhook={"url": "https://c.example/"})
    ann.delete(f"/v1/webhooks/{servers(ann)[0]['id']}")
    api.submit(ann, webhook={"url": "https://c.example/"})


@pytest.mark.parametrize("fields", [{"url": "https://other.example/"}, {"kinds": ["job.*"]}])
def test_a_server_that_jobs_name_is_not_another_endpoint(api: Api, fields: dict[str, Any]) -> None:
    ann = api.client("ann")
    api.submit(ann, webhook={"url": "https://shop.example/hook"})
    path = f"/v1/webhooks/{servers(ann)[0]['id']}"
    check_problem(ann.patch(path, json=fields), 422)
    check_problem(ann.post(path + "/test", json={}), 422)
    check_problem(ann.post(path + "/rotate", json={}), 422)
    assert ann.patch(path, json={"description": "the shop"}).json()["description"] == "the shop"


def test_openapi_describes_the_field(api: Api) -> None:
    ann = api.client("ann")
    schemas = ann.get("/openapi.json").json()["components"]["schemas"]
    text = json.dumps(schemas["JobSpec"]["properties"]["webhook"])
    assert "kinds" in text
    assert "$ref" not in text
