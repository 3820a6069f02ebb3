"""Deleted tenants: gone at once, later with everything they own; and the record of who did it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from farm.config import Settings
from farm.context import Farm
from farm.store import keys, tenants
from farm.store.engine import transaction
from farm.store.schema import metadata
from tests.integration.test_api_images import file, send
from tests.integration.test_api_refusals import check_problem
from tests.support.api_server import Api, render, serving
from tests.support.cli_runner import Outcome
from tests.support.cli_runner import farm as command
from tests.support.store import register_worker, sql, stored_keys
from workers.exporter import Exporter
from workers.janitor.janitor import Janitor
from workers.janitor.storage_cleaner import StorageCleaner

OWNING = [each.name for each in metadata.sorted_tables if "tenant_id" in each.c]


@pytest.fixture
def settings(settings: Settings) -> Settings:
    # A separate bucket, so that all of its objects can be listed.
    return settings.model_copy(update={"s3_bucket": f"tenants-{uuid.uuid4().hex}"})


@pytest.fixture
def api(farm: Farm) -> Iterator[Api]:
    farm.artifacts._s3.create_bucket(Bucket=farm.settings.s3_bucket)
    with serving(farm) as running:
        yield running


@pytest.fixture
def operator(api: Api) -> httpx.Client:
    return api.client("ops", role="operator")


def settle(api: Api, name: str) -> httpx.Client:
    """Create a tenant with some data of every kind. Return its client."""
    client = api.client(name)
    send(client, file())
    content = b'{"prompt": "a star"}\n{"prompt": "a ring"}\n'
    source = client.post("/v1/inputs", content=content).json()["id"]
    body = {"pipeline": "demo", "steps": 2, "bucket": 2}
    done = client.post("/v1/jobs", json={**body, "input": source}).json()["id"]
    worker = register_worker(api.farm)
    render(worker, worker.must_claim())
    client.post(f"/v1/jobs/{done}/exports", json={"to": "webdataset"})
    Exporter(api.farm, "exporter").answer()
    running = api.submit(client, images_per_prompt=2, bucket=2)
    assert {str(frame.job_id) for frame in worker.must_claim().frames} == {running["id"]}
    paused = api.submit(client, images_per_prompt=4, bucket=2)
    client.post(f"/v1/jobs/{paused['id']}/pause")
    begun = {"verb": "resume", "filter": {"pipeline": "demo"}}
    assert client.post("/v1/operations", json=begun).status_code == 202
    api.bare(Origin=api.url).post("/login", data={"key": api.key(name)})
    return client


def owned(farm: Farm, tenant_id: str) -> dict[str, int]:
    """Count a tenant's rows in each table, and its objects. Zeros are left out."""
    rows = {
        table: sql(farm, f"SELECT count(*) FROM {table} WHERE tenant_id = :id", id=tenant_id)[0][0]
        for table in OWNING
    }
    rows["objects"] = sum(tenant_id in key for key in stored_keys(farm))
    return {name: count for name, count in rows.items() if count}


def id_of(farm: Farm, name: str) -> str:
    return str(sql(farm, "SELECT id FROM tenants WHERE name = :name", name=name)[0][0])


def clean_up(farm: Farm) -> None:
    """Run all the janitor's work until nothing is left."""
    work = StorageCleaner(farm)
    for _ in range(4):
        with farm.store.connect() as connection:
            Janitor(farm).sweep(connection)
        work.step()


def test_a_deleted_tenant_is_gone_with_everything_it_owned(
    farm: Farm, api: Api, operator: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann, bob = settle(api, "ann"), settle(api, "bob")
    ids = {name: id_of(farm, name) for name in ("ann", "bob")}
    clean_up(farm)  # it notes the usage
    before = owned(farm, ids["bob"])
    assert before == owned(farm, ids["ann"])
    assert before["objects"] >= 2 + 1 + 4

    answer = operator.delete("/v1/tenants/ann", params={"why": "it asked us to"})
    assert answer.status_code == 202
    gone = answer.json()
    assert (gone["id"], gone["name"], gone["emptied_at"]) == (ids["ann"], None, None)
    check_problem(ann.get("/v1/jobs"), 401)
    check_problem(operator.get("/v1/tenants/ann"), 404)

    clean_up(farm)
    left = operator.get(f"/v1/tenants/{ids['ann']}").json()
    assert left["emptied_at"] is None, "what had begun before may still store something"
    monkeypatch.setattr(tenants, "LATE_SECONDS", 0.0)
    clean_up(farm)
    assert owned(farm, ids["ann"]) == {}
    left = operator.get(f"/v1/tenants/{ids['ann']}").json()
    assert left["emptied_at"] is not None
    assert set(left["owns"].values()) == {0}
    assert owned(farm, ids["bob"]) == before
    assert bob.get("/v1/jobs").status_code == 200
    assert [each["name"] for each in operator.get("/v1/tenants").json()["data"]] == ["bob", "ops"]


def test_what_a_late_worker_stores_for_a_deleted_tenant_goes_too(
    farm: Farm, api: Api, operator: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tenants, "LATE_SECONDS", 0.0)
    farm.settings.orphan_seconds = 0.0
    api.client("ann")
    tenant = id_of(farm, "ann")
    operator.delete("/v1/tenants/ann")
    clean_up(farm)
    late = [f"{tenant}/{uuid.uuid4()}/000000000-{'0' * 64}.png", f"images/{tenant}/{'0' * 64}.png"]
    for key in late:
        farm.artifacts.put(key, b"late")
    clean_up(farm)
    assert owned(farm, tenant) == {}


def test_a_name_is_free_again_at_once(farm: Farm, api: Api, operator: httpx.Client) -> None:
    api.client("ann")
    before = id_of(farm, "ann")
    operator.delete("/v1/tenants/ann")
    assert api.client("ann").get("/v1/jobs").json() == {"data": [], "next": None}
    assert id_of(farm, "ann") != before
    done = command("keys", "create", "--tenant", before, env={"FARM_DATABASE_URL": url(farm)})
    assert "has the form of an ID" in done.err


def url(farm: Farm) -> str:
    return farm.settings.database_url.get_secret_value()


def test_an_operator_sets_a_weight(farm: Farm, api: Api, operator: httpx.Client) -> None:
    api.client("ann")
    assert operator.get("/v1/tenants/ann").json()["weight"] == 1
    for _ in range(2):  # the second one changes nothing
        answer = operator.patch("/v1/tenants/ann", json={"weight": 2.5, "why": "ticket 7"})
        assert (answer.status_code, answer.json()["weight"]) == (200, 2.5)
    [action] = operator.get("/v1/actions").json()["data"]
    assert (action["verb"], action["target"], action["why"]) == (
        "tenant.set",
        "tenant ann",
        "ticket 7",
    )
    assert action["outcome"] == "weight 1 before, 2.5 now"
    assert sql(farm, "SELECT name, weight FROM tenants ORDER BY name") == [("ann", 2.5), ("ops", 1)]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"weight": 0}, "weight"),
        ({"weight": 101}, "weight"),
        ({"weight": None}, "weight"),
        ({"wait": 3}, "wait"),
        ({"max_open_jobs": -1}, "max_open_jobs"),
        ({"max_open_jobs": "many"}, "max_open_jobs"),
        ({"max_waiting_frames": 10**15}, "max_waiting_frames"),
        ({"max_input_bytes": 0.5}, "max_input_bytes"),
        ({"priorities": []}, "priorities"),
        ({"priorities": ["soon"]}, "priorities.0"),
    ],
)
def test_a_wrong_weight_or_limit_names_the_field(
    farm: Farm, operator: httpx.Client, body: dict[str, object], param: str
) -> None:
    problem = check_problem(operator.patch("/v1/tenants/ops", json=body), 422)
    assert problem["error"]["param"] == param
    limits = "priorities, max_open_jobs, max_waiting_frames, max_input_bytes"
    unset = f"weight = 1 AND num_nonnulls({limits}) = 0"
    assert sql(farm, f"SELECT {unset} FROM tenants") == [(True,)]


def test_limits_that_are_left_out_stay(farm: Farm, api: Api, operator: httpx.Client) -> None:
    api.client("ann")
    limits = {"priorities": ["bulk", "normal"], "max_open_jobs": 7, "max_waiting_frames": 10**14}
    first = operator.patch("/v1/tenants/ann", json=limits).json()
    assert {name: first[name] for name in limits} == {**limits, "priorities": ["normal", "bulk"]}
    second = operator.patch("/v1/tenants/ann", json={"max_open_jobs": None}).json()
    assert second == {**first, "max_open_jobs": None}
    told = [each["outcome"] for each in operator.get("/v1/actions").json()["data"]]
    assert told == [
        "max_open_jobs 7 before, unlimited now",
        "priorities unlimited before, normal+bulk now; max_open_jobs unlimited before, 7 now; "
        "max_waiting_frames unlimited before, 100000000000000 now",
    ]


def test_the_command_line_sets_and_shows_limits(api: Api, operator: httpx.Client) -> None:
    api.client("ann")
    env = {"FARM_API_URL": api.url, "FARM_API_KEY": api.key("ops", "operator")}

    def run(*words: str) -> Outcome:
        return command("tenants", *words, env=env)

    done = run(
        "set", "ann", "--weight", "2.5", "--max-open-jobs", "5", "--priorities", "bulk, normal"
    )
    assert done.code == 0, done.err
    assert "Tenant ann has weight 2.5, and owns 1 key" in done.out
    assert "Priorities: normal, bulk." in done.out
    assert "Open jobs: 0, of at most 5." in done.out
    assert "Waiting frames: 0, without a limit." in done.out
    run("set", "ann", "--max-open-jobs", "none", "--priorities", "all")
    found = operator.get("/v1/tenants/ann").json()
    assert (found["weight"], found["max_open_jobs"], found["priorities"]) == (2.5, None, None)
    for option, value in {
        "--weight": "nan",
        "--max-open-jobs": "many",
        "--max-waiting-frames": "-1",
    }.items():
        refused = run("set", "ann", f"{option}={value}")
        assert (refused.code, option in refused.err) == (1, True), refused.err
    assert "priorities" in run("set", "ann", "--priorities", "soon").err
    assert "Nothing to set" in run("set", "ann").err
    assert operator.get("/v1/tenants/ann").json() == found


def test_a_deleted_tenant_has_no_weight_to_set(
    farm: Farm, api: Api, operator: httpx.Client
) -> None:
    api.client("ann")
    tenant = id_of(farm, "ann")
    operator.delete("/v1/tenants/ann")
    for word in ("ann", tenant):
        check_problem(operator.patch(f"/v1/tenants/{word}", json={"weight": 2}), 404)


def test_an_operator_does_not_delete_their_own_tenant(farm: Farm, operator: httpx.Client) -> None:
    check_problem(operator.delete("/v1/tenants/ops"), 409)
    assert operator.get("/v1/tenants/ops").status_code == 200


@pytest.mark.parametrize("role", ["client", "viewer"])
def test_only_operators_see_tenants_and_actions(api: Api, role: str) -> None:
    client = api.client("ann", role=role)
    for path in ("/v1/tenants", "/v1/tenants/ann", "/v1/actions"):
        check_problem(client.get(path), 403)
    check_problem(client.delete("/v1/tenants/bob"), 403)
    check_problem(client.patch("/v1/tenants/ann", json={"weight": 100}), 403)
    check_problem(
        client.post("/v1/destinations", json={"tenant": "ann", "dest": "s3://abc/x"}), 403
    )
    assert client.get("/v1/destinations").json()["data"] == []


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tenant": "nobody", "dest": "s3://abc/x"}, "tenant"),
        ({"tenant": "ops", "dest": "/tmp/x"}, "dest"),
        ({"tenant": "ops", "dest": "s3://abc/x", "why": "\x00"}, "why"),
        ({"tenant": "ops"}, "dest"),
    ],
)
def test_a_wrong_destination_is_refused_and_recorded_nowhere(
    operator: httpx.Client, body: dict[str, Any], param: str
) -> None:
    problem = check_problem(operator.post("/v1/destinations", json=body), 422)
    assert problem["error"]["param"] == param
    assert operator.get("/v1/actions").json()["data"] == []


def test_actions_are_recorded_with_who_what_and_why(farm: Farm, api: Api) -> None:
    with transaction(farm.store) as connection:
        key_id, key = keys.create_key(connection, "ops", "operator", "Grace")
    operator = api.bare(Authorization=f"Bearer {key}")
    api.client("ann")
    asked = {"tenant": "ann", "dest": "s3://datasets/ann", "why": "ticket 7"}
    for _ in range(2):
        assert operator.post("/v1/destinations", json=asked).status_code == 201
    worker = register_worker(farm, "hand")
    assert operator.post(f"/v1/workers/{worker.id}/drain").status_code == 202
    newest = operator.get("/v1/actions", params={"limit": 2}).json()
    oldest = operator.get("/v1/actions", params={"after": newest["next"]}).json()
    [drain, start, *grants] = newest["data"] + oldest["data"]
    assert (start["verb"], start["who"], start["lane"]) == ("worker.start", "farm", "demo")
    assert (drain["verb"], drain["target"], drain["why"]) == ("worker.drain", "worker hand", "")
    for each in grants:
        assert each | {"id": 0, "at": ""} == {
            "id": 0,
            "at": "",
            "key_id": str(key_id),
            "who": "Grace",
            "role": "operator",
            "tenant": "ops",
            "via": "api",
            "owner": "ann",
            "address": "127.0.0.1",
            "verb": "destination.grant",
            "target": "tenant ann",
            "why": "ticket 7",
            "outcome": "s3://datasets/ann/",
            "operation": None,
            "lane": None,
        }
    assert len(grants) == 2
    assert oldest["next"] is None


def test_an_operators_commands(api: Api) -> None:
    api.client("ann")
    env = {"FARM_API_URL": api.url, "FARM_API_KEY": api.key("ops", "operator")}

    def told(*words: str, code: int = 0) -> Outcome:
        done = command(*words, env=env)
        assert done.code == code, done.err
        return done

    granted = told("destinations", "grant", "ann", "s3://datasets/ann", "--why", "ticket 7")
    assert "Tenant ann may export to s3://datasets/ann/." in granted.out
    [listed] = told("destinations", "--json").json["data"]
    assert listed["dest"] in told("destinations").out
    told("destinations", "revoke", listed["id"])
    assert "ann" in told("tenants").out
    assert "owns 1 key, 0 jobs" in told("tenants", "show", "ann").out
    told("tenants", "delete", "ann", code=1)  # the prompt gets no answer
    deleted = told("tenants", "delete", "ann", "--yes", "--why", "it asked us to", "--json").json
    assert deleted["removed_at"] is not None
    assert "is being deleted" in told("tenants", "show", deleted["id"]).out
    assert "There is no tenant 'ann'." in told("tenants", "show", "ann", code=1).err
    verbs = [each["verb"] for each in [told("actions", "--json").json][0]]
    assert verbs == ["tenant.delete", "destination.revoke", "destination.grant"]
    assert "it asked us to" in told("actions").out
