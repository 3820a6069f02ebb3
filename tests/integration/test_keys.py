"""API keys: operators create, list and revoke them, by the API and on the page."""

from __future__ import annotations

import re
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from api.app import THREADS
from api.dashboard import system_page
from farm.context import Farm
from farm.services import doctor
from tests.integration.test_api_access import signed_in
from tests.integration.test_api_refusals import check_problem
from tests.integration.test_attention import opened
from tests.support.api_server import Api, serving
from tests.support.store import new_tenant, sql
from tests.support.waiting import wait_until

ASKED = {"Accept": "text/html"}


@pytest.fixture
def api(farm: Farm) -> Iterator[Api]:
    with serving(farm) as running:
        yield running


@pytest.fixture
def operator(api: Api) -> httpx.Client:
    return api.client("ops", "operator")


@pytest.fixture
def visitor(api: Api) -> httpx.Client:
    return signed_in(api, api.key("ops", "operator"))


def actions(operator: httpx.Client) -> list[tuple[str, str, str, str]]:
    data = operator.get("/v1/actions").json()["data"]
    names = ("verb", "owner", "outcome", "why")
    return [tuple(each[name] for name in names) for each in reversed(data)]


def test_a_key_is_shown_once_and_works(api: Api, operator: httpx.Client) -> None:
    asked = {"tenant": "shop", "name": "backend", "why": "ticket 7", "metadata": "none"}
    answer = operator.post("/v1/keys", json=asked)
    assert answer.status_code == 201, answer.text
    assert answer.headers["cache-control"] == "no-store"
    made = answer.json()
    key = made.pop("key")
    assert (made["tenant"], made["role"], made["everywhere"]) == ("shop", "client", False)
    assert key.startswith(made["prefix"])
    listed = operator.get("/v1/keys", params={"tenant": "shop"})
    assert listed.json()["data"] == [made]
    assert key not in listed.text
    shop = api.bare(Authorization=f"Bearer {key}")
    job = api.submit(shop)
    assert job["tenant"] == "shop"
    assert job["spec"]["metadata"] == "none"
    assert actions(operator) == [("key.create", "shop", "client", "ticket 7")]

    for _ in range(2):  # the second one changes nothing
        path = f"/v1/keys/{made['id']}"
        assert operator.delete(path, params={"why": "it leaked"}).status_code == 204
    check_problem(shop.get("/v1/jobs"), 401)
    assert actions(operator)[1:] == [("key.revoke", "shop", "revoked: backend", "it leaked")]
    [row] = operator.get("/v1/keys", params={"tenant": "shop"}).json()["data"]
    assert row["revoked_at"] is not None


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "tenant"),
        ({"tenant": ""}, "tenant"),
        ({"tenant": " "}, "tenant"),
        ({"tenant": "*"}, "tenant"),
        ({"tenant": "a\x00"}, "tenant"),
        ({"tenant": "x" * 201}, "tenant"),
        ({"tenant": "shop", "role": "king"}, "role"),
        ({"tenant": "shop", "everywhere": True}, "everywhere"),
        ({"tenant": "shop", "role": "operator", "everywhere": True}, "everywhere"),
        ({"tenant": "shop", "metadata": "some"}, "metadata"),
        ({"tenant": "shop", "colour": "red"}, "colour"),
        ({"tenant": "sh\x1b[31mop"}, "tenant"),
        ({"tenant": "shop\u200b"}, "tenant"),
        ({"tenant": str(uuid.uuid5(uuid.NAMESPACE_DNS, "shop"))}, "tenant"),
    ],
)
def test_a_wrong_key_is_refused(
    farm: Farm, operator: httpx.Client, body: dict[str, Any], param: str
) -> None:
    problem = check_problem(operator.post("/v1/keys", json=body), 422)
    assert problem["error"]["param"] == param
    assert sql(farm, "SELECT count(*) FROM keys") == [(1,)]
    assert sql(farm, "SELECT count(*) FROM tenants WHERE name <> 'ops'") == [(0,)]


def test_a_name_is_stored_without_spaces_around_it(farm: Farm, operator: httpx.Client) -> None:
    for name in ("shop", " shop "):
        assert operator.post("/v1/keys", json={"tenant": name}).json()["tenant"] == "shop"


def test_a_tenant_that_is_there_keeps_its_name(farm: Farm, operator: httpx.Client) -> None:
    """An older version took any name."""
    new_tenant(farm, "old")
    sql(farm, "UPDATE tenants SET name = E'old\\n1' WHERE name = 'old'")
    assert operator.post("/v1/keys", json={"tenant": "old\n1"}).status_code == 201


def test_a_key_that_is_not_there_cannot_be_revoked(operator: httpx.Client) -> None:
    check_problem(operator.delete(f"/v1/keys/{uuid.uuid4()}"), 404)
    check_problem(operator.delete("/v1/keys/none"), 422)


@pytest.mark.parametrize(("role", "everywhere"), [("client", False), ("viewer", True)])
def test_only_operators_see_or_change_keys(api: Api, role: str, everywhere: bool) -> None:
    key = api.key("ann", role, everywhere=everywhere)
    caller, visitor = api.bare(Authorization=f"Bearer {key}"), signed_in(api, key)
    path = f"/v1/keys/{uuid.uuid4()}"
    for answer in (
        caller.get("/v1/keys"),
        caller.post("/v1/keys", json={"tenant": "ann"}),
        caller.delete(path),
        visitor.get("/system/keys"),
        visitor.get("/system/checks"),
        visitor.get(f"/system/keys/{uuid.uuid4()}/revoke"),
        visitor.post("/system/keys", data={"tenant": "ann", "kind": "client"}),
        visitor.post(f"/system/keys/{uuid.uuid4()}/revoke"),
    ):
        check_problem(answer, 403)
    assert sql(api.farm, "SELECT count(*) FROM keys") == [(1,)]


# The pages


def test_the_page_creates_a_key_and_revokes_it(
    api: Api, operator: httpx.Client, visitor: httpx.Client
) -> None:
    fields = {"tenant": "<shop>", "kind": "viewer of every tenant", "name": "wall", "why": "x"}
    answer = visitor.post("/system/keys", data=fields, headers=ASKED)
    assert answer.status_code == 200, answer.text
    assert answer.headers["cache-control"] == "no-store"
    assert "hx-get" not in answer.text  # an update would take the key away
    [key] = re.findall(r'value="(farm_[^"]+)"', answer.text)
    assert api.bare(Authorization=f"Bearer {key}").get("/v1/lanes").status_code == 200
    page = opened(visitor, "/system/keys?tenant=%3Cshop%3E")
    assert key not in page
    assert "viewer of every tenant" in page
    [path] = re.findall(r'href="(/system/keys/[0-9a-f-]+/revoke)"', page)
    asked = opened(visitor, path)
    assert "This cannot be undone." in asked
    assert "You are signed in with this key." not in asked
    gone = visitor.post(path, data={"why": "lost"}, headers=ASKED)
    assert (gone.status_code, gone.headers["location"]) == (303, "/system/keys")
    check_problem(api.bare(Authorization=f"Bearer {key}").get("/v1/lanes"), 401)
    assert visitor.get(path, headers=ASKED).status_code == 303
    assert [each[0] for each in actions(operator)] == ["key.create", "key.revoke"]
    assert {each[3] for each in actions(operator)} == {"x", "lost"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tenant": "shop"}, "kind"),
        ({"tenant": "shop", "kind": "king"}, "kind"),
        ({"tenant": "", "kind": "client"}, "tenant"),
        ({"tenant": "x" * 201, "kind": "client"}, "tenant"),
        ({"tenant": "shop", "kind": "client", "name": "x" * 201}, "name"),
    ],
)
def test_a_wrong_form_is_refused(
    farm: Farm, visitor: httpx.Client, fields: dict[str, str], param: str
) -> None:
    problem = check_problem(visitor.post("/system/keys", data=fields), 422)
    assert problem["error"]["param"] == param
    assert sql(farm, "SELECT count(*) FROM keys") == [(1,)]


def test_the_page_says_that_the_key_is_the_visitors_own(farm: Farm, visitor: httpx.Client) -> None:
    key_id = sql(farm, "SELECT id FROM keys")[0][0]
    assert "You are signed in with this key." in opened(visitor, f"/system/keys/{key_id}/revoke")


def test_the_page_says_which_keys_stay_valid(api: Api, visitor: httpx.Client) -> None:
    made = api.client("ops", "operator").post(
        "/v1/keys", json={"tenant": "eve", "role": "operator"}
    )
    eve = api.bare(Authorization=f"Bearer {made.json()['key']}")
    last = eve.post("/v1/keys", json={"tenant": "mallory"}).json()
    gone = eve.post("/v1/keys", json={"tenant": "trent"}).json()
    eve.delete(f"/v1/keys/{gone['id']}")
    page = opened(visitor, f"/system/keys/{made.json()['id']}/revoke")
    assert f"Keys that were created with it stay valid: {last['prefix']}… of mallory." in page
    [first] = sql(api.farm, "SELECT key_id FROM actions WHERE outcome = 'operator'")
    page = opened(visitor, f"/system/keys/{first.key_id}/revoke")
    assert f"{made.json()['prefix']}… of eve, {last['prefix']}… of mallory." in page
    assert "stay valid" not in opened(visitor, f"/system/keys/{last['id']}/revoke")


def test_a_silent_server_that_is_checked_holds_up_nobody(
    api: Api, visitor: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = threading.Event()

    def silent(_settings: object) -> str:
        assert answers.wait(60)
        return "answers"

    asking: list[object] = []
    made = system_page.Checks.made

    def counted(checks: system_page.Checks) -> Any:
        asking.append(checks)
        return made(checks)

    monkeypatch.setattr(doctor, "_s3", silent)
    monkeypatch.setattr(system_page.Checks, "made", counted)
    asked = 3 * THREADS
    with ThreadPoolExecutor(asked) as pool:
        pages = [pool.submit(opened, visitor, "/system/checks") for _ in range(asked)]
        wait_until(lambda: len(asking) == asked, 60, "all wait")
        assert api.client().get("/v1/jobs").status_code == 200
        assert not any(page.done() for page in pages)
        answers.set()
        assert len({page.result() for page in pages}) == 1


def test_the_page_of_checks_says_what_to_do(
    farm: Farm, visitor: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = opened(visitor, "/system/checks")
    rows = dict(re.findall(r"<bdi>([\w ]+)</bdi></th><td><span class=\"chip \w*\">(\w+)<", page))
    assert rows == {
        "postgres": "ok",
        "schema": "ok",
        "clock": "ok",
        "redis": "ok",
        "s3": "ok",
        "janitor": "failed",
        "courier": "ok",
        "workers demo": "failed",
    }
    assert "Start one: `farm janitor`." in page
    assert "No worker for pipeline demo is alive." in page
    assert "2 of 8 checks failed" in page

    def broken(_store: object) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr(doctor, "_postgres", broken)
    monkeypatch.setattr(system_page, "CHECKED_SECONDS", 0.0)
    farm_page = opened(visitor, "/system/checks?again")
    assert "no route to host" in farm_page
    assert "skipped: it needs postgres" in farm_page
