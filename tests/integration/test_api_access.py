"""Access: keys, roles, and tenants that see nothing of each other."""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Iterator

import httpx
import pytest

from farm.context import Farm
from farm.store import keys, leases, workers
from farm.store.engine import transaction
from tests.integration.test_api_refusals import check_problem
from tests.support.api_server import JOB, Api, render, serving
from tests.support.cli_runner import farm as command
from tests.support.store import register_worker, sql, submit


@pytest.fixture
def api(farm: Farm) -> Iterator[Api]:
    with serving(farm) as running:
        yield running


def test_a_call_needs_a_key(api: Api) -> None:
    paths = ("/v1/jobs", "/v1/pipelines", "/v1/workers", "/v1/jobs/x/frames")
    wrong = ("Bearer farm_nonesuch", "Bearer \xff\xfe", "Basic YTpi", "Bearer", "nonsense")
    for path in paths:
        for value in (None, *wrong):
            headers = [] if value is None else [(b"Authorization", value.encode("latin-1"))]
            response = httpx.get(api.url + path, headers=headers)
            problem = check_problem(response, 401)
            assert problem["error"]["type"] == "authentication_error"
            assert response.headers["www-authenticate"].startswith("Bearer")
    check_problem(httpx.post(f"{api.url}/v1/jobs", json=JOB), 401)
    assert api.jobs_stored() == 0


def test_a_revoked_key_is_unknown(api: Api) -> None:
    with transaction(api.farm.store) as connection:
        key_id, key = keys.create_key(connection, "ann", "client")
    client = api.bare(Authorization=f"Bearer {key}")
    assert client.get("/v1/jobs").status_code == 200
    with transaction(api.farm.store) as connection:
        assert keys.revoke_key(connection, key_id)
    check_problem(client.get("/v1/jobs"), 401)


def signed_in(api: Api, key: str) -> httpx.Client:
    """Return a browser that is signed in with a key."""
    visitor = api.bare(Origin=api.url)
    assert visitor.post("/login", data={"key": key}).status_code == 204
    return visitor


def test_the_cookie_holds_a_session_and_no_key(api: Api) -> None:
    key = api.key()
    visitor, other = signed_in(api, key), signed_in(api, key)
    [session] = visitor.cookies.values()
    [another] = other.cookies.values()
    assert session != another
    assert key not in (session, another)
    kept = sql(api.farm, "SELECT digest FROM sessions ORDER BY digest")
    assert [bytes(row.digest) for row in kept] == sorted(
        hashlib.sha256(secret.encode()).digest() for secret in (session, another)
    )
    for stolen in (session, key):
        check_problem(api.bare(Authorization=f"Bearer {stolen}x").get("/v1/jobs"), 401)
    check_problem(api.bare(Authorization=f"Bearer {session}").get("/v1/jobs"), 401)
    [name] = visitor.cookies
    assert (
        api.bare(Cookie=f"{name}={key}").get("/", headers={"HX-Request": "true"}).status_code == 401
    )


def test_signing_out_ends_this_session_alone(api: Api) -> None:
    key = api.key()
    visitor, other = signed_in(api, key), signed_in(api, key)
    [(name, session)] = visitor.cookies.items()
    assert visitor.post("/logout").status_code == 204
    assert (
        api.bare(Cookie=f"{name}={session}").get("/", headers={"HX-Request": "true"}).status_code
        == 401
    )
    assert other.get("/", headers={"HX-Request": "true"}).status_code == 200


@pytest.mark.parametrize("ending", ["its days have passed", "its key is revoked"])
def test_a_session_has_an_end(api: Api, ending: str) -> None:
    visitor = signed_in(api, api.key())
    assert visitor.get("/", headers={"HX-Request": "true"}).status_code == 200
    if ending == "its days have passed":
        past = "SET ends_at = clock_timestamp()"
        assert sql(api.farm, f"UPDATE sessions {past} RETURNING created_at, ends_at")
    else:
        sql(api.farm, "UPDATE keys SET revoked_at = clock_timestamp() RETURNING id")
    refused = visitor.get("/", headers={"HX-Request": "true"})
    assert refused.status_code == 401
    assert "session has ended" in refused.text


def test_a_session_lasts_as_long_as_the_settings_say(farm: Farm) -> None:
    settings = farm.settings.model_copy(update={"session_days": 0.5})
    with serving(farm, settings) as api:
        response = api.bare(Origin=api.url).post("/login", data={"key": api.key()})
        assert "Max-Age=43200" in response.headers["set-cookie"]
        [row] = sql(api.farm, "SELECT extract(epoch FROM ends_at - created_at) AS s FROM sessions")
        assert float(row.s) == pytest.approx(43_200, abs=5)


@pytest.mark.parametrize(("proxies", "secure"), [("127.0.0.0/8", True), ("192.0.2.7", False)])
def test_a_trusted_proxy_says_whether_the_cookie_is_secure(
    farm: Farm, proxies: str, secure: bool
) -> None:
    settings = farm.settings.model_copy(update={"trusted_proxies": proxies})
    with serving(farm, settings) as api:
        visitor = api.bare(Origin=api.url, **{"X-Forwarded-Proto": "https"})
        cookie = visitor.post("/login", data={"key": api.key()}).headers["set-cookie"]
    assert ("Secure" in cookie) is secure


def test_some_calls_need_no_key(api: Api) -> None:
    for path in ("/healthz", "/readyz", "/docs", "/openapi.json", "/metrics", "/"):
        assert httpx.get(api.url + path).status_code == 200, path


def test_another_tenants_job_is_not_there(api: Api) -> None:
    ann, bob = api.client("ann"), api.client("bob")
    job = api.submit(ann, images_per_prompt=2, bucket=2)
    worker = register_worker(api.farm)
    render(worker, worker.must_claim())
    path = f"/v1/jobs/{job['id']}"
    for suffix in ("", "/frames", "/frames/0", "/frames/0/image"):
        assert ann.get(path + suffix).status_code in (200, 307)
        problem = check_problem(bob.get(path + suffix), 404)
        assert problem["detail"] == f"There is no job {job['id']}."
    for action in ("cancel", "pause", "resume", "retry"):
        check_problem(bob.post(f"{path}/{action}"), 404)
    assert bob.get("/v1/jobs").json() == {"data": [], "next": None}
    problem = check_problem(bob.get("/v1/jobs", params={"after": job["id"]}), 422)
    assert problem["error"]["param"] == "after"
    assert ann.get(path).json()["status"] == "succeeded"


def test_workers_show_a_caller_the_jobs_that_it_sees(api: Api) -> None:
    ann, bob = api.client("ann"), api.client("bob")
    boss = api.client("bob", role="operator")
    mine, theirs = api.submit(ann, bucket=2), api.submit(bob, bucket=2)
    hand = register_worker(api.farm, "hand")
    lease = hand.must_claim()
    assert len(lease.frames) == 2
    with transaction(api.farm.store) as connection:
        workers.set_state(connection, hand.id, "rendering", device="cpu")
        leases.report_step(connection, lease.id, 12, 25)
    for client, seen in ((ann, [mine]), (bob, [theirs]), (boss, [mine, theirs])):
        [worker] = client.get("/v1/workers").json()["data"]
        ids = sorted(job["id"] for job in seen)
        assert worker["batch"] == {"frames": 2, "step": 12, "steps": 25, "jobs": ids}
        assert (worker["name"], worker["state"], worker["device"]) == ("hand", "rendering", "cpu")
        assert (worker["host"], worker["pid"]) == (("here", 1) if client is boss else (None, None))


def test_workers_tell_how_busy_their_device_was(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, fresh = register_worker(api.farm, "hand"), register_worker(api.farm, "fresh")
    with transaction(api.farm.store) as connection:
        for denoise_seconds in (1.0, 2.88):
            batch = workers.Account(denoise_seconds=denoise_seconds, work_seconds=2.0)
            workers.account(connection, worker.id, batch)
    client = api.client()
    told = {each["name"]: each["busy"] for each in client.get("/v1/workers").json()["data"]}
    assert told == {worker.name: pytest.approx(3.88 / 4.0), fresh.name: None}
    page = signed_in(api, api.key()).get("/").text
    cards = re.findall(r"<article class=\"panel worker\".*?</article>", page, re.DOTALL)
    assert len(cards) == 2
    for name, share in (("hand", "97% busy"), ("fresh", "— busy")):
        [card] = [card for card in cards if f"<bdi>{name}</bdi>" in card]
        assert share in card
    monkeypatch.setenv("FARM_API_URL", api.url)
    monkeypatch.setenv("FARM_API_KEY", client.headers["Authorization"].split()[1])
    lines = {words[0]: words for words in map(str.split, command("workers").out.splitlines())}
    assert "busy" in lines["worker"]
    assert "97%" in lines["hand"]
    assert "—" in lines["fresh"]
    job = api.submit(client)
    assert client.post(f"/v1/jobs/{job['id']}/cancel").status_code == 200
    assert "  busy: hand 97%\n" in command("watch", job["id"]).err


def test_a_viewer_looks_and_changes_nothing(api: Api) -> None:
    client, viewer = api.client(), api.client(role="viewer")
    job = api.submit(client)
    path = f"/v1/jobs/{job['id']}"
    for get in (path, f"{path}/frames", "/v1/jobs", "/v1/pipelines", "/v1/workers"):
        assert viewer.get(get).status_code == 200
    for post in (
        "/v1/jobs",
        *(f"{path}/{verb}" for verb in ("cancel", "pause", "resume", "retry")),
    ):
        problem = check_problem(viewer.post(post, json=JOB), 403)
        assert problem["error"]["type"] == "permission_error"
    assert api.jobs_stored() == 1
    assert client.get(path).json()["status"] == "queued"


def test_metrics_name_no_tenant(api: Api) -> None:
    job = api.submit(api.client("ann"), prompts=["a secret prompt"], images_per_prompt=3)
    text = httpx.get(f"{api.url}/metrics").text
    assert 'farm_queue_frames{pipeline="demo",priority="normal"} 3.0' in text
    for secret in ("ann", "secret", job["id"]):
        assert secret not in text


def test_only_an_operator_drains_a_worker(api: Api, tenant: uuid.UUID) -> None:
    worker = register_worker(api.farm)
    submit(api.farm, tenant, images_per_prompt=8)
    path = f"/v1/workers/{worker.id}/drain"
    for role in ("client", "viewer"):
        refused = api.client(role=role).post(path)
        assert refused.status_code == 403
        assert refused.json()["error"]["code"] == "forbidden"
    operator = api.client(role="operator")
    drained = operator.post(path)
    assert (drained.status_code, drained.json()["draining"]) == (202, True)
    assert worker.claim() is None
    assert operator.post(path).status_code == 202  # a second request changes nothing
    unknown = operator.post(f"/v1/workers/{uuid.uuid4()}/drain")
    assert unknown.status_code == 404
    assert operator.post("/v1/workers/x/drain").json()["error"]["param"] == "worker_id"
