"""Operators, and viewers of every tenant: what they see and steer of others; the log of actions."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute, iter_route_contexts

from api import tenancy
from api.dashboard.changes_page import KINDS
from farm.config import Settings
from farm.context import Farm
from farm.domain import verbs
from farm.errors import InvalidRequest
from farm.store import keys
from farm.store.actions import Actor, record
from farm.store.engine import transaction
from farm.store.frames import FailedAttempt, fail
from tests.integration.test_api_access import signed_in
from tests.integration.test_api_images import file, send
from tests.integration.test_api_refusals import check_problem
from tests.support.api_server import Api, render, serving
from tests.support.cli_runner import farm as command
from tests.support.store import fence, register_worker, sql
from tests.support.streams import streamed
from workers.janitor.janitor import Janitor

LISTS = ("jobs", "exports", "inputs")


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"webhook_networks": "127.0.0.0/8", "retry_seconds": 0.0})


@pytest.fixture
def api(farm: Farm) -> Iterator[Api]:
    with serving(farm) as running:
        yield running


@pytest.fixture
def operator(api: Api) -> httpx.Client:
    return api.client("ops", "operator")


@pytest.fixture
def wall(api: Api) -> httpx.Client:
    """Return a viewer that sees every tenant, such as a screen on a wall."""
    return api.client("ops", "viewer", everywhere=True)


@dataclass(frozen=True)
class Owned:
    """Things of a tenant: one of each kind."""

    tenant: str
    client: httpx.Client
    ids: dict[str, str]

    def path(self, template: str) -> str:
        return template.format(**self.ids)


def settle(api: Api, name: str) -> Owned:
    """Let a tenant own something of every kind. Its job has a picture and a dead frame."""
    client = api.client(name)
    job = api.submit(client, images_per_prompt=3, bucket=3, max_attempts=1)
    worker = register_worker(api.farm, f"worker-{name}")
    lease = worker.must_claim()
    render(worker, lease, 0)
    broken = FailedAttempt(fence(lease.frames[1]), "render_error", "broken", log="a log")
    with transaction(api.farm.store) as connection:
        fail(connection, lease.id, [broken], 0.0)
    made = client.post("/v1/webhooks", json={"url": "http://127.0.0.1:9/hook?secret=1"})
    export = client.post(f"/v1/jobs/{job['id']}/exports", json={"to": "webdataset"})
    stored = client.post("/v1/inputs", content=b'{"prompt": "of %s"}\n' % name.encode())
    ids = {
        "job": job["id"],
        "webhook": made.json()["id"],
        "export": export.json()["id"],
        "input": stored.json()["id"],
        "image": send(client, file()).json()["id"],
        "worker": str(worker.id),
        "worker_name": f"worker-{name}",
        "delivery": str(
            sql(
                api.farm,
                "INSERT INTO webhook_deliveries (webhook_id, message_id, kind, body, state) "
                "VALUES (:id, 'msg_1', 'job.failed', '{}', 'dead') RETURNING id",
                id=made.json()["id"],
            )[0][0]
        ),
    }
    return Owned(name, client, ids)


@pytest.fixture
def ann(api: Api) -> Owned:
    return settle(api, "ann")


@pytest.fixture
def bob(api: Api) -> Owned:
    return settle(api, "bob")


# What is seen


def test_a_list_is_of_one_tenant_or_of_all(
    operator: httpx.Client, wall: httpx.Client, ann: Owned, bob: Owned, subtests: pytest.Subtests
) -> None:
    asked_and_shown: list[tuple[dict[str, str], list[Owned]]] = [
        ({}, []),
        ({"tenant": "ops"}, []),
        ({"tenant": "ann"}, [ann]),
        ({"tenant": "*"}, [ann, bob]),
    ]
    for what in LISTS:
        kind = what.removesuffix("s")
        for caller in (operator, wall):
            for asked, shown in asked_and_shown:
                with subtests.test(what, asked=asked):
                    found = caller.get(f"/v1/{what}", params=asked).json()["data"]
                    assert {(each["id"], each["tenant"]) for each in found} == {
                        (each.ids[kind], each.tenant) for each in shown
                    }
        own = ann.client.get(f"/v1/{what}").json()["data"]
        assert [each["tenant"] for each in own] == ["ann"]


def test_pages_go_on_across_tenants(
    operator: httpx.Client, ann: Owned, bob: Owned, subtests: pytest.Subtests
) -> None:
    for what in LISTS:
        with subtests.test(what):
            first = operator.get(f"/v1/{what}", params={"tenant": "*", "limit": 1}).json()
            assert [each["tenant"] for each in first["data"]] == ["bob"]
            asked = {"tenant": "*", "limit": 1, "after": first["next"]}
            second = operator.get(f"/v1/{what}", params=asked).json()
            assert ([each["tenant"] for each in second["data"]], second["next"]) == (["ann"], None)
            foreign = {"tenant": "ann", "after": bob.ids[what.removesuffix("s")]}
            problem = check_problem(operator.get(f"/v1/{what}", params=foreign), 422)
            assert problem["error"]["param"] == "after"


def test_a_list_of_all_jobs_takes_the_same_filters(
    api: Api, operator: httpx.Client, ann: Owned
) -> None:
    labelled = api.submit(api.client("bob"), labels={"set": "x"})

    def found(**params: str) -> set[str]:
        jobs = operator.get("/v1/jobs", params={"tenant": "*", **params}).json()["data"]
        return {job["id"] for job in jobs}

    assert found(status="queued") == {labelled["id"]}
    assert found(**{"label.set": "x"}) == {labelled["id"]}
    assert found(pipeline="demo") == {labelled["id"], ann.ids["job"]}
    assert found(pipeline="null") == set()


READS = (
    "/v1/jobs/{job}",
    "/v1/jobs/{job}/frames",
    "/v1/jobs/{job}/frames/0",
    "/v1/jobs/{job}/events",
    "/v1/jobs/{job}/deliveries",
    "/v1/exports/{export}",
    "/v1/exports/{export}/shards",
    "/v1/inputs/{input}",
    "/v1/webhooks?tenant=ann",
    "/v1/webhooks/{webhook}",
    "/v1/webhooks/{webhook}/deliveries",
    "/v1/deliveries/{delivery}",
    "/v1/images/{image}?tenant=ann",
    "/v1/images?tenant=ann",
    "/v1/events?tenant=ann",
)


def test_an_id_is_found_in_every_tenant(
    operator: httpx.Client, wall: httpx.Client, ann: Owned, subtests: pytest.Subtests
) -> None:
    for path in READS:
        own = ann.client.get(ann.path(path).partition("?")[0]).json()
        for caller in (operator, wall):
            with subtests.test(path):
                answer = caller.get(ann.path(path))
                assert answer.status_code == 200, answer.text
                assert set(answer.json()) == set(own)


def test_other_keys_find_nothing_of_other_tenants(
    api: Api, ann: Owned, subtests: pytest.Subtests
) -> None:
    for role in ("client", "viewer"):
        stranger = api.client("bob", role)
        for path in READS:
            with subtests.test(path, role=role):
                named = "?" in path
                problem = check_problem(stranger.get(ann.path(path)), 403 if named else 404)
                assert problem["error"]["param"] == ("tenant" if named else None)
                assert "ann" not in problem["detail"]


def test_an_image_of_another_tenant_is_downloaded(operator: httpx.Client, ann: Owned) -> None:
    path = ann.path("/v1/jobs/{job}/frames/0/image")
    address = operator.get(path).headers["location"]
    assert httpx.get(address).content.startswith(b"\x89PNG")


def test_a_stream_of_another_tenant_is_read(operator: httpx.Client, ann: Owned) -> None:
    for path in (ann.path("/v1/jobs/{job}/events"), "/v1/events?tenant=ann"):
        with streamed(operator, path) as sent:
            assert next(sent).kind == "state"
            ann.client.post(ann.path("/v1/jobs/{job}/pause"))
            assert next(each.kind for each in sent if each.kind != "progress") == "job.paused"
        ann.client.post(ann.path("/v1/jobs/{job}/resume"))


def test_logs_and_hosts_are_for_operators(
    operator: httpx.Client, wall: httpx.Client, ann: Owned
) -> None:
    path = ann.path("/v1/jobs/{job}/frames/1")
    logs = [
        caller.get(path).json()["attempts"][0]["log"] for caller in (operator, wall, ann.client)
    ]
    assert logs == ["a log", None, None]
    hosts = [
        caller.get("/v1/workers").json()["data"][0]["host"]
        for caller in (operator, wall, ann.client)
    ]
    assert hosts == ["here", None, None]


def test_an_unknown_tenant_is_named(operator: httpx.Client) -> None:
    for path in ("/v1/jobs", "/v1/images", "/v1/events", "/v1/destinations"):
        problem = check_problem(operator.get(path, params={"tenant": "nobody"}), 422)
        assert problem["error"]["param"] == "tenant"
        assert "'nobody'" in problem["detail"]


def test_what_is_about_one_tenant_refuses_all(operator: httpx.Client) -> None:
    for path in ("/v1/images", "/v1/events", "/v1/webhooks"):
        problem = check_problem(operator.get(path, params={"tenant": "*"}), 422)
        assert problem["error"]["param"] == "tenant"


def test_a_job_of_another_tenant_than_the_named_one_is_not_found(
    api: Api, operator: httpx.Client, ann: Owned
) -> None:
    api.client("bob")
    path = ann.path("/v1/jobs/{job}")
    assert operator.get(path, params={"tenant": "ann"}).status_code == 200
    assert operator.get(path, params={"tenant": "*"}).status_code == 200
    check_problem(operator.get(path, params={"tenant": "bob"}), 404)


def test_an_id_that_nobody_owns_is_refused(
    operator: httpx.Client, subtests: pytest.Subtests
) -> None:
    for word in ("x", "1", str(2**70), str(uuid.UUID(int=7))):
        for kind in ("jobs", "exports", "inputs", "webhooks", "deliveries"):
            with subtests.test(word, kind=kind):
                assert operator.get(f"/v1/{kind}/{word}").status_code in (404, 422)


def test_of_the_address_of_anothers_webhook_only_the_server_is_shown(
    operator: httpx.Client, wall: httpx.Client, ann: Owned
) -> None:
    path = ann.path("/v1/webhooks/{webhook}")
    assert ann.client.get(path).json()["url"] == "http://127.0.0.1:9/hook?secret=1"
    for caller in (operator, wall):
        assert caller.get(path).json()["url"] == "http://127.0.0.1:9/…"
        told = caller.get(ann.path("/v1/deliveries/{delivery}"))
        assert "/hook" not in told.text
    for address in ("http://127.0.0.1:9?token=1", "http://127.0.0.1:9/?token=1"):
        assert ann.client.patch(path, json={"url": address}).status_code == 200
        for caller in (operator, wall):
            assert caller.get(path).json()["url"] == "http://127.0.0.1:9/…"


def test_workers_show_the_jobs_of_every_tenant(
    api: Api, operator: httpx.Client, wall: httpx.Client, ann: Owned
) -> None:
    api.submit(ann.client, images_per_prompt=2, bucket=2)
    assert register_worker(api.farm, "busy").claim()
    for caller, sees in ((operator, True), (wall, True), (api.client("bob"), False)):
        batches = [each["batch"] for each in caller.get("/v1/workers").json()["data"]]
        assert any(batch["jobs"] for batch in batches if batch) == sees


# What is refused

CREATES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/jobs", {"pipeline": "demo", "prompts": ["a"]}),
    ("/v1/jobs/batch", {"jobs": []}),
    ("/v1/exports", {"to": "webdataset", "labels": {"a": "b"}}),
    ("/v1/webhooks", {"url": "http://127.0.0.1:9/"}),
    ("/v1/webhooks/secret/rotate", {}),
    ("/openai/v1/images/generations", {"prompt": "a"}),
)


def test_nothing_is_created_in_the_name_of_another_tenant(
    farm: Farm, operator: httpx.Client, ann: Owned, subtests: pytest.Subtests
) -> None:
    before = everything(farm)
    for path, body in CREATES:
        with subtests.test(path):
            answer = operator.post(path, json=body, params={"tenant": "ann"})
            assert answer.status_code == 403
            assert "tenant: this call acts for the tenant of the key, ops." in answer.text
    assert everything(farm) == before


def test_no_secret_of_another_tenant_is_given(operator: httpx.Client, ann: Owned) -> None:
    check_problem(operator.get("/v1/webhooks/secret", params={"tenant": "ann"}), 403)
    check_problem(operator.post(ann.path("/v1/webhooks/{webhook}/rotate"), json={}), 403)
    check_problem(operator.post(ann.path("/v1/jobs/{job}/tokens"), json={}), 403)
    export = operator.post(ann.path("/v1/jobs/{job}/exports"), json={"to": "parquet"})
    assert "acts for the tenant of the key, ops." in check_problem(export, 403)["detail"]


def test_no_operator_turns_a_webhook_to_another_server(operator: httpx.Client, ann: Owned) -> None:
    path = ann.path("/v1/webhooks/{webhook}")
    changes: tuple[dict[str, Any], ...] = (
        {"url": "http://127.0.0.1:1/mine"},
        {"kinds": ["job.*"]},
        {"labels": {}},
    )
    for fields in changes:
        problem = check_problem(operator.patch(path, json=fields), 403)
        assert problem["error"]["param"] == next(iter(fields))
    assert operator.patch(path, json={"state": "paused"}).status_code == 200
    assert ann.client.get(path).json()["url"] == "http://127.0.0.1:9/hook?secret=1"


def test_the_holder_of_a_token_is_told_no_tenant(api: Api, ann: Owned) -> None:
    made = ann.client.post(ann.path("/v1/jobs/{job}/tokens"), json={}).json()
    with streamed(api.bare(), made["url"].removeprefix(api.url)) as sent:
        state = next(sent)
    assert (state.kind, state.data["tenant"]) == ("state", "")


Verb = tuple[str, str, dict[str, Any] | None, str]
"""Method, path, body and target."""
HOOK, WORKER = "webhook {webhook}", "worker {worker_name}"

VERBS: dict[str, Verb] = {
    "job.pause": ("POST", "/v1/jobs/{job}/pause", None, "job {job}"),
    "job.resume": ("POST", "/v1/jobs/{job}/resume", None, "job {job}"),
    "job.retry": ("POST", "/v1/jobs/{job}/retry", None, "job {job}"),
    "job.change": ("PATCH", "/v1/jobs/{job}", {"labels": {"team": "x"}}, "job {job}"),
    "job.cancel": ("POST", "/v1/jobs/{job}/cancel", None, "job {job}"),
    "export.delete": ("DELETE", "/v1/exports/{export}", None, "export {export}"),
    "input.delete": ("DELETE", "/v1/inputs/{input}", None, "input {input}"),
    "image.delete": ("DELETE", "/v1/images/{image}?tenant=ann", None, "image {image}"),
    "webhook.change": (
        "PATCH",
        "/v1/webhooks/{webhook}",
        {"description": "x"},
        HOOK,
    ),
    "webhook.test": ("POST", "/v1/webhooks/{webhook}/test", {}, HOOK),
    "webhook.replay": (
        "POST",
        "/v1/webhooks/{webhook}/replay",
        {"since": "2026-01-01T00:00:00Z"},
        HOOK,
    ),
    "delivery.redeliver": (
        "POST",
        "/v1/deliveries/{delivery}/redeliver",
        None,
        "delivery {delivery}",
    ),
    "webhook.delete": ("DELETE", "/v1/webhooks/{webhook}", None, HOOK),
    "job.remove": ("DELETE", "/v1/jobs/{job}", None, "job {job}"),
}
"""Verbs on what tenants own. Each has an effect after those before it."""

OPERATING: dict[str, Verb] = {
    "tenant.set": ("PATCH", "/v1/tenants/ann", {"weight": 2}, "tenant ann"),
    "destination.grant": (
        "POST",
        "/v1/destinations",
        {"tenant": "ann", "dest": "s3://abc/x"},
        "tenant ann",
    ),
    "key.create": ("POST", "/v1/keys", {"tenant": "ann"}, "key {key}"),
    "worker.give_back": ("POST", "/v1/workers/{worker}/give-back", None, WORKER),
    "worker.drain": ("POST", "/v1/workers/{worker}/drain", None, WORKER),
    "worker.undrain": ("POST", "/v1/workers/{worker}/undrain", None, WORKER),
    "lane.hold": ("POST", "/v1/lanes/demo/hold", {}, "lane demo"),
    "lane.release": ("POST", "/v1/lanes/demo/release", None, "lane demo"),
    "tenant.delete": ("DELETE", "/v1/tenants/ann", None, "tenant ann"),
}
OWN: dict[str, Verb] = {
    "webhook.rotate": ("POST", "/v1/webhooks/{webhook}/rotate", {}, HOOK),
    "secret.rotate": ("POST", "/v1/webhooks/secret/rotate", {}, "secret of jobs' webhooks"),
}
"""Verbs on the key's own tenant alone."""


def act(caller: httpx.Client, owned: Owned, verb: str, **params: str) -> httpx.Response:
    method, path, body, _ = {**VERBS, **OPERATING, **OWN}[verb]
    url = httpx.URL(str(caller.base_url) + owned.path(path)).copy_merge_params(params)
    return caller.request(method, url, json=body)


def test_an_operator_steers_every_tenant_and_it_is_logged(
    operator: httpx.Client, ann: Owned, subtests: pytest.Subtests
) -> None:
    for verb in VERBS:
        with subtests.test(verb):
            answer = act(operator, ann, verb, why="ticket 7")
            assert answer.is_success, answer.text
            [action] = operator.get("/v1/actions", params={"limit": 1}).json()["data"]
            names = ("verb", "who", "role", "tenant", "via", "owner", "why", "target")
            assert {name: action[name] for name in names} == {
                "verb": verb,
                "who": "operator",
                "role": "operator",
                "tenant": "ops",
                "via": "api",
                "owner": "ann",
                "why": "ticket 7",
                "target": ann.path(VERBS[verb][3]),
            }
            assert action["outcome"]


def test_what_only_operators_do_is_logged(
    operator: httpx.Client, ann: Owned, subtests: pytest.Subtests
) -> None:
    for verb in OPERATING:
        with subtests.test(verb):
            answer = act(operator, ann, verb, why="ticket 7")
            assert answer.is_success, answer.text
            if verb == "key.create":
                ann.ids["key"] = answer.json()["id"]
            [action] = operator.get("/v1/actions", params={"limit": 1}).json()["data"]
            assert (action["verb"], action["target"]) == (verb, ann.path(OPERATING[verb][3]))
            of_the_farm = verb.startswith(("worker.", "lane."))
            assert action["owner"] == (None if of_the_farm else "ann")
            assert action["why"] == "ticket 7"


def test_what_a_client_does_to_its_own_is_logged(
    operator: httpx.Client, ann: Owned, subtests: pytest.Subtests
) -> None:
    # Its webhook and its export were logged when they were made.
    verbs = [*OWN, *VERBS]
    for verb in verbs:
        with subtests.test(verb):
            answer = act(ann.client, ann, verb)
            assert answer.is_success, answer.text
    found = operator.get("/v1/actions", params={"tenant": "ann"}).json()["data"]
    assert [each["verb"] for each in reversed(found)] == ["webhook.create", "export.create", *verbs]
    assert {(each["tenant"], each["role"], each["owner"]) for each in found} == {
        ("ann", "client", "ann")
    }


def test_a_key_that_sees_every_tenant_steers_none(
    farm: Farm, wall: httpx.Client, ann: Owned, subtests: pytest.Subtests
) -> None:
    before = everything(farm)
    for verb in (*VERBS, *OPERATING):
        with subtests.test(verb):
            problem = check_problem(act(wall, ann, verb), 403)
            assert problem["error"]["code"] == "forbidden"
            assert everything(farm) == before


def test_a_client_of_another_tenant_steers_nothing(
    api: Api, farm: Farm, ann: Owned, subtests: pytest.Subtests
) -> None:
    stranger = api.client("bob")
    before = everything(farm)
    for verb in VERBS:
        with subtests.test(verb):
            assert act(stranger, ann, verb).status_code in (403, 404)
            assert everything(farm) == before


CHANGED = (
    "jobs",
    "frames",
    "requeued_frames",
    "exports",
    "inputs",
    "control_images",
    "webhooks",
    "webhook_deliveries",
    "events",
    "tenants",
    "destinations",
    "actions",
    "lanes",
    "leases",
)


def everything(farm: Farm) -> dict[str, Any]:
    """Return all rows that the verbs change, and whether workers are drained."""
    tables = {name: sql(farm, f"SELECT * FROM {name} ORDER BY 1, 2") for name in CHANGED}
    tables["actions"] = sql(farm, "SELECT * FROM actions WHERE verb <> 'call.refused' ORDER BY id")
    return {**tables, "drained": sql(farm, "SELECT id, draining FROM workers ORDER BY id")}


# The log


def test_an_action_that_cannot_be_logged_does_not_happen(
    farm: Farm, operator: httpx.Client, ann: Owned, subtests: pytest.Subtests
) -> None:
    sql(
        farm,
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE 'no log'; END $$",
    )
    sql(
        farm,
        "CREATE TRIGGER refuse BEFORE INSERT ON actions FOR EACH ROW EXECUTE FUNCTION refuse()",
    )
    for verb in (*VERBS, *OPERATING, *OWN):
        prepare(farm, verb)
        before = everything(farm)
        with subtests.test(verb):
            caller = ann.client if verb in OWN else operator
            assert act(caller, ann, verb, why="x").status_code == 500
            assert everything(farm) == before


def prepare(farm: Farm, verb: str) -> None:
    """Let a verb have something to do."""
    sql(farm, "UPDATE jobs SET paused = :paused", paused=verb == "job.resume")
    sql(farm, "UPDATE workers SET draining = :draining", draining=verb == "worker.undrain")
    if verb == "job.remove":
        sql(farm, "UPDATE jobs SET status = 'partial', finished_at = clock_timestamp()")
        sql(farm, "UPDATE exports SET state = 'failed'")
    if verb == "lane.release":
        sql(farm, "INSERT INTO lanes (pipeline, owed, held_from) VALUES ('demo', '{0,0}', 0)")


def test_every_call_that_changes_something_is_logged(api: Api) -> None:
    creates = {
        "/v1/jobs",
        "/v1/jobs/batch",
        "/v1/inputs",
        "/v1/images",
        "/openai/v1/images/generations",
    }
    """Calls that create something, which then says itself whose it is."""
    log = {tenancy.acting, tenancy.operating, tenancy.own_acting, tenancy.acting_on_many}
    changing = [
        (str(context.path), set(_calls(route.dependant)))
        for context in iter_route_contexts(api.app.routes)
        if isinstance(route := context.route, APIRoute)
        if set(route.methods or ()) - {"GET", "HEAD", "OPTIONS"}
        if str(context.path).startswith(("/v1", "/openai"))
    ]
    assert len(changing) > 25
    assert {path for path, calls in changing if not log & calls} == creates


def _calls(dependant: Dependant) -> Iterator[Callable[..., Any] | None]:
    yield dependant.call
    for each in dependant.dependencies:
        yield from _calls(each)


def test_what_changes_nothing_is_not_logged(operator: httpx.Client, ann: Owned) -> None:
    for _ in range(2):
        assert act(operator, ann, "job.pause").is_success
    assert len(operator.get("/v1/actions", params={"verb": "job.pause"}).json()["data"]) == 1
    for _ in range(2):
        assert act(operator, ann, "job.cancel").is_success
    assert len(operator.get("/v1/actions", params={"verb": "job.cancel"}).json()["data"]) == 1
    check_problem(act(operator, ann, "job.pause"), 409)
    assert len(operator.get("/v1/actions", params={"verb": "job.pause"}).json()["data"]) == 1
    for _ in range(2):
        assert act(operator, ann, "worker.drain").is_success
        assert act(ann.client, ann, "webhook.change").is_success
        assert ann.client.patch(ann.path("/v1/webhooks/{webhook}"), json={}).is_success
    for verb in ("worker.drain", "webhook.change"):
        assert len(operator.get("/v1/actions", params={"verb": verb}).json()["data"]) == 1


def test_a_retry_of_many_frames_is_one_action(
    farm: Farm, operator: httpx.Client, ann: Owned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("farm.store.job_commands.RETRY_SLICE", 1)
    sql(farm, "UPDATE jobs SET priority = 0, running = running - 1, dead = dead + 1")
    sql(farm, "UPDATE frames SET state = 'dead' WHERE ordinal = 2")
    assert act(operator, ann, "job.retry").is_success
    [action] = operator.get("/v1/actions", params={"verb": "job.retry"}).json()["data"]
    assert action["outcome"] == "2 dead frames are requeued"


RECORDS = r"""record\(\s*connection,.{1,120}?"([a-z]+[.][a-z_]+)\""""
CHOSEN = {"fault.new", "fault.return"}
"""Verbs that a call of `record` chooses from."""


def test_the_page_of_the_api_names_every_verb() -> None:
    root = Path(__file__).parents[2]
    found = {f"job.{verb}" for verb in verbs.Verb} | CHOSEN
    for folder in ("api", "farm", "workers"):
        for source in (root / folder).rglob("*.py"):
            calls = re.findall(RECORDS, source.read_text(), re.DOTALL)
            found |= set(calls)
    assert set(VERBS) | set(OPERATING) | set(OWN) <= found
    page = (root / "docs" / "api.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith("| `verb` |"))
    assert set(re.findall(r"`([a-z]+[.][a-z_]+)`", row)) == found
    assert {verb for kind in KINDS.values() for verb in kind} == found


def test_every_form_of_the_page_is_refused_to_other_sites(api: Api, ann: Owned) -> None:
    foreign = signed_in(api, api.key())
    foreign.headers["Origin"] = "https://evil.example"
    paths = {
        context.path
        for context in iter_route_contexts(api.app.routes)
        if isinstance(context.route, APIRoute)
        if "POST" in (context.route.methods or ())
        if not str(context.path).startswith(("/v1", "/openai"))
    }
    assert len(paths) >= 5
    for path in paths:
        named = str(path).format(
            job_id=ann.ids["job"],
            action="pause",
            operation_id=uuid.uuid4(),
            worker_id=uuid.uuid4(),
            pipeline="demo",
            verb="drain",
            fault="0" * 16,
            key_id=uuid.uuid4(),
        )
        assert foreign.post(named, data={"key": "x"}).status_code == 403, path


def test_the_log_is_filtered(operator: httpx.Client, ann: Owned, bob: Owned) -> None:
    act(operator, ann, "job.pause")
    act(operator, bob, "job.cancel")
    act(ann.client, ann, "job.cancel")

    def found(**params: str) -> list[tuple[str, str]]:
        data = operator.get("/v1/actions", params=params).json()["data"]
        return [(each["verb"], each["owner"]) for each in data if each["verb"][:3] == "job"]

    assert found() == [("job.cancel", "ann"), ("job.cancel", "bob"), ("job.pause", "ann")]
    assert found(tenant="*") == found()
    assert found(tenant="bob") == [("job.cancel", "bob")]
    assert found(verb="job.pause") == [("job.pause", "ann")]
    assert found(who="client") == [("job.cancel", "ann")]
    assert found(target=ann.path("job {job}")) == [("job.cancel", "ann"), ("job.pause", "ann")]
    assert found(since="2100-01-01T00:00:00Z") == []
    assert found(until="2000-01-01T00:00:00Z") == []
    assert found(since="2000-01-01T00:00:00Z", until="2100-01-01T00:00:00Z") == found()
    for name, value in {"since": "today", "who": "\x00"}.items():
        problem = check_problem(operator.get("/v1/actions", params={name: value}), 422)
        assert problem["error"]["param"] == name


def test_the_log_ends_after_its_days(farm: Farm, operator: httpx.Client, ann: Owned) -> None:
    act(operator, ann, "job.pause")
    sql(farm, "UPDATE actions SET at = at - interval '401 days' WHERE verb = 'job.pause'")
    with farm.store.connect() as connection:
        Janitor(farm).sweep(connection)
    log = operator.get("/v1/actions").json()["data"]
    verbs = [each["verb"] for each in log if each["via"] != "farm"]
    assert verbs == ["export.create", "webhook.create"]


def test_a_log_without_an_end_is_kept(farm: Farm) -> None:
    actor = Actor(uuid.uuid4(), "x", "client", "ann", "api", "")
    with transaction(farm.store) as connection:
        record(connection, actor, "job.pause", "job x", "paused")
    sql(farm, "UPDATE actions SET at = at - interval '4000 days'")
    endless = farm.settings.model_copy(update={"actions_days": 0.0})
    farm_of_them = Farm.__new__(Farm)
    farm_of_them.__dict__.update({**vars(farm), "settings": endless})
    with farm.store.connect() as connection:
        Janitor(farm_of_them).sweep(connection)
    assert sql(farm, "SELECT count(*) FROM actions") == [(1,)]


# The command line


def test_commands_reach_every_tenant(api: Api, ann: Owned) -> None:
    env = {"FARM_API_URL": api.url, "FARM_API_KEY": api.key("ops", "operator")}
    assert ann.ids["job"][:8] not in command("jobs", env=env).out
    for words in (["--all-tenants"], ["--tenant", "ann"]):
        [job] = command("jobs", *words, "--json", env=env).json["data"]
        assert job["id"] == ann.ids["job"]
    assert "ann" in command("jobs", "--all-tenants", env=env).out
    assert "--tenant" in command("jobs", "--all-tenants", "--tenant", "ann", env=env).err
    done = command("cancel", ann.ids["job"][:8], "--why", "ticket 7", env=env)
    assert "is cancelled" in done.out, done.err
    drained = command("workers", "drain", "worker-ann", "--why", "new driver", env=env)
    assert drained.code == 0, drained.err
    [drain, cancel, *_] = command("actions", "--json", env=env).json
    assert (drain["why"], cancel["why"]) == ("new driver", "ticket 7")
    shown = command("actions", "--verb", "job.cancel", "--tenant", "ann", env=env).out
    assert "ticket 7" in shown
    assert "new driver" not in shown
    mine = {**env, "FARM_API_KEY": api.key("bob")}
    assert "None of the last 1,000" in command("cancel", ann.ids["job"][:8], env=mine).err


def test_what_is_done_to_keys_at_a_shell_is_logged(
    farm: Farm, api: Api, operator: httpx.Client
) -> None:
    env = {"FARM_DATABASE_URL": farm.settings.database_url.get_secret_value()}
    words = ("--tenant", "shop", "--role", "viewer", "--everywhere", "--name", "wall")
    made = command("keys", "create", *words, "--why", "a screen", "--json", env=env).json
    assert "viewer of every tenant" in command("keys", "list", env=env).out
    for _ in range(2):  # the second one changes nothing
        assert command("keys", "revoke", made["id"], env=env).code == 0
    assert command("keys", "end-addresses", "--yes", env=env).code == 0
    [ended, revoked, created] = operator.get("/v1/actions").json()["data"]
    assert (created["verb"], created["owner"], created["why"]) == ("key.create", "shop", "a screen")
    assert created["outcome"] == "viewer of every tenant"
    assert (revoked["verb"], revoked["target"]) == ("key.revoke", f"key {made['id']}")
    assert ended["verb"] == "addresses.end"
    for each in (ended, revoked, created):
        assert (each["via"], each["key_id"], each["role"]) == ("shell", None, "")
        assert each["who"]
        assert each["address"]
    assert made["key"] not in operator.get("/v1/actions").text


@pytest.mark.parametrize("role", ["client", "operator"])
def test_only_a_viewers_key_is_marked_to_look_everywhere(farm: Farm, role: str) -> None:
    with (
        pytest.raises(InvalidRequest, match="only a viewer's key takes it"),
        transaction(farm.store) as connection,
    ):
        keys.create_key(connection, "ann", role, everywhere=True)
    assert sql(farm, "SELECT count(*) FROM keys") == [(0,)]


# The page


def page_of(visitor: httpx.Client, path: str = "/") -> str:
    answer = visitor.get(path, headers={"accept": "text/html"})
    assert answer.status_code == 200, answer.text
    return answer.text


def test_the_page_shows_every_tenant_to_operators(api: Api, ann: Owned, bob: Owned) -> None:
    for role, everywhere in (("operator", False), ("viewer", True)):
        visitor = signed_in(api, api.key("ops", role, everywhere=everywhere))
        whole = page_of(visitor, "/jobs")
        assert [f'id="job-{each.ids["job"]}"' in whole for each in (ann, bob)] == [True, True]
        assert "/jobs?tenant=ann" in whole
        assert f'id="picture-{ann.ids["job"]}-0"' in whole
        assert ("/cancel" in whole) == (role == "operator")
        part = page_of(visitor, "/jobs?tenant=ann")
        assert [f'id="job-{each.ids["job"]}"' in part for each in (ann, bob)] == [True, False]
        assert "status=queued&amp;tenant=ann" in part or "tenant=ann&amp;status=queued" in part
        picture = visitor.get(f"/pictures/{ann.ids['job']}/0")
        assert picture.headers["content-type"] in ("image/png", "image/webp")


def test_the_page_shows_one_tenant_to_its_own_keys(api: Api, ann: Owned, bob: Owned) -> None:
    visitor = signed_in(api, api.key("ann"))
    whole = page_of(visitor)
    assert [f'id="job-{each.ids["job"]}"' in whole for each in (ann, bob)] == [True, False]
    assert "/jobs?tenant=" not in whole
    assert visitor.get("/?tenant=bob").status_code == 403
    assert visitor.get(f"/pictures/{bob.ids['job']}/0").status_code == 404


def test_a_list_at_its_old_address_leads_to_the_new_one(api: Api) -> None:
    operator = signed_in(api, api.key("ops", "operator"))
    answer = operator.get("/?status=failed&q=a+star", headers={"accept": "text/html"})
    assert (answer.status_code, answer.headers["location"]) == (307, "/jobs?status=failed&q=a+star")
    assert "Attention" in page_of(operator)


def test_a_button_of_the_page_is_logged(api: Api, operator: httpx.Client, ann: Owned) -> None:
    visitor = signed_in(api, api.key("ops", "operator"))
    for action in ("pause", "resume", "retry", "cancel"):
        done = visitor.post(f"/jobs/{ann.ids['job']}/{action}")
        assert done.status_code == 204, done.text
    found = operator.get("/v1/actions", params={"tenant": "ann"}).json()["data"]
    verbs = [(each["verb"], each["via"], each["tenant"]) for each in found[:4]]
    names = ("job.cancel", "job.retry", "job.resume", "job.pause")
    assert verbs == [(name, "page", "ops") for name in names]
    looking = signed_in(api, api.key("ops", "viewer", everywhere=True))
    assert looking.post(f"/jobs/{ann.ids['job']}/pause").status_code == 403
