"""Signed addresses of images: bytes without a key, and nothing after their end."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Engine, event

from api import addresses
from api.routes import pictures
from farm.context import Farm
from farm.domain.signed_addresses import SignedFrame, read, sign, until_of
from farm.errors import Unavailable
from farm.storage import Artifacts, artifact_key
from farm.store import signing_secrets
from farm.store.engine import transaction
from farm.store.tenants import remove_tenant
from tests.integration.test_api_refusals import check_problem
from tests.support.api_server import JOB, Api, render, serving
from tests.support.cli_runner import farm as command
from tests.support.store import register_worker, sql
from tests.support.waiting import wait_until

WEEK = 7 * 86_400


@pytest.fixture
def api(farm: Farm) -> Iterator[Api]:
    with serving(farm) as running:
        yield running


def rendered(api: Api, client: httpx.Client, **fields: Any) -> dict[str, Any]:
    """Submit a job of one image, render it, and return its frame."""
    job = api.submit(client, **fields)
    worker = register_worker(api.farm)
    render(worker, worker.must_claim())
    return frame_of(client, job["id"])


def frame_of(client: httpx.Client, job_id: str) -> dict[str, Any]:
    [frame] = client.get(f"/v1/jobs/{job_id}/frames").json()["data"]
    return dict(frame)


@pytest.mark.parametrize(
    ("form", "media_type", "extension"),
    [("png", "image/png", "png"), ("jpeg", "image/jpeg", "jpg"), ("webp", "image/webp", "webp")],
)
def test_an_image_needs_no_key(api: Api, form: str, media_type: str, extension: str) -> None:
    ann = api.client("ann")
    frame = rendered(api, ann, format=form)
    assert frame["signed_url"].startswith(f"{api.url}/p/")
    assert frame["signed_url"].endswith(f".{extension}")
    got = httpx.get(frame["signed_url"])
    assert got.status_code == 200
    assert hashlib.sha256(got.content).hexdigest() == frame["sha256"]
    assert len(got.content) == frame["bytes"] == int(got.headers["content-length"])
    assert got.headers["content-type"] == media_type
    assert got.headers["etag"] == f'"{frame["sha256"]}"'
    assert got.headers["access-control-allow-origin"] == "*"
    assert got.headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in got.headers["content-security-policy"]
    assert got.headers["content-disposition"].endswith(f'-0.{extension}"')
    caching = got.headers["cache-control"]
    left = int(caching.removeprefix("private, max-age=").removesuffix(", immutable"))
    assert WEEK - 60 < left <= WEEK * 9 / 8
    assert frame == ann.get(f"/v1/jobs/{frame_job(api)}/frames/0").json()


def frame_job(api: Api) -> str:
    return str(sql(api.farm, "SELECT id FROM jobs")[0][0])


def test_a_key_that_is_sent_is_not_looked_at(api: Api) -> None:
    """Some clients send their key to each address that they get."""
    frame = rendered(api, api.client("ann"))
    for header in ("Bearer farm_wrong", "Key nothing", "Basic Og=="):
        got = httpx.get(frame["signed_url"], headers={"Authorization": header})
        assert (got.status_code, len(got.content)) == (200, frame["bytes"])


def test_an_image_that_the_client_has_is_not_sent_again(api: Api) -> None:
    frame = rendered(api, api.client("ann"))
    tag = f'"{frame["sha256"]}"'
    for known in (tag, f'"other", W/{tag}', "*"):
        again = httpx.get(frame["signed_url"], headers={"If-None-Match": known})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == tag
    assert httpx.get(frame["signed_url"], headers={"If-None-Match": '"other"'}).status_code == 200
    head = httpx.head(frame["signed_url"])
    assert (head.status_code, head.content) == (200, b"")
    assert int(head.headers["content-length"]) == frame["bytes"]


def test_an_address_is_the_same_for_a_while(api: Api) -> None:
    """So browsers find its image in their caches."""
    ann = api.client("ann")
    frame = rendered(api, ann)
    assert frame_of(ann, frame_job(api))["signed_url"] == frame["signed_url"]


def test_it_tells_nothing_after_its_end(
    farm: Farm, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    farm.settings.signed_url_seconds = 3600
    frame = rendered(api, api.client("ann"))
    now = time.time()
    clock = SimpleNamespace(monotonic=time.monotonic, time=lambda: now + 3599)
    monkeypatch.setattr(addresses, "time", clock)
    assert httpx.get(frame["signed_url"]).status_code == 200
    clock.time = lambda: now + 3600 * 9 / 8 + 1
    problem = check_problem(httpx.get(frame["signed_url"]), 404)
    assert problem["detail"] == "This address is unknown or has ended. Ask the farm for a new one."


@pytest.mark.parametrize("removed", ["job", "tenant", "object"])
def test_it_tells_nothing_after_the_image_is_removed(api: Api, removed: str) -> None:
    frame = rendered(api, api.client("ann"))
    if removed == "job":
        sql(api.farm, "UPDATE jobs SET removed_at = clock_timestamp()")
    elif removed == "tenant":
        [(tenant,)] = sql(api.farm, "SELECT tenant_id FROM jobs")
        with transaction(api.farm.store) as connection:
            remove_tenant(connection, tenant)
    else:
        [(tenant, job)] = sql(api.farm, "SELECT tenant_id, id FROM jobs")
        sha256 = bytes.fromhex(frame["sha256"])
        api.farm.artifacts.delete(artifact_key(tenant, job, 0, sha256, "png"))
    answer = httpx.get(frame["signed_url"])
    check_problem(answer, 404)
    assert frame["sha256"] not in answer.text
    assert "etag" not in answer.headers


def test_a_wrong_address_tells_nothing(api: Api) -> None:
    frame = rendered(api, api.client("ann"))
    token, _, extension = frame["signed_url"].rpartition("/")[2].partition(".")
    turned = token[:-1] + ("A" if token[-1] != "A" else "B")
    minus = token.replace("-", "+", 1) if "-" in token else token + "="
    for name in (
        f"{turned}.{extension}",
        f"{minus}.{extension}",
        f"{token}=.{extension}",
        f"{token}.jpg",
        token,
        f"{token[:-4]}.{extension}",
        f"{'A' * 60}.{extension}",
        "%00.png",
        "é.png",
    ):
        check_problem(httpx.get(f"{api.url}/p/{name}"), 404)
    check_problem(httpx.get(f"{api.url}/p/{'A' * 200}.png"), 422)
    assert httpx.post(frame["signed_url"]).status_code == 405


def test_a_frame_without_an_image_has_no_address(api: Api) -> None:
    ann = api.client("ann")
    job = api.submit(ann)
    assert frame_of(ann, job["id"])["signed_url"] is None
    worker = register_worker(api.farm)
    worker.fail(worker.must_claim(), retryable=False)
    assert frame_of(ann, job["id"])["signed_url"] is None


def test_a_forged_address_of_a_frame_without_an_image(api: Api) -> None:
    """Its secret is right, and its frame has no image."""
    job = uuid.UUID(api.submit(api.client("ann"))["id"])
    with transaction(api.farm.store) as connection:
        secrets = signing_secrets.load(connection)
    for frame in (SignedFrame(job, 0, 2**32 - 1), SignedFrame(uuid.uuid4(), 0, 2**32 - 1)):
        token = sign(frame, 0, secrets[0])
        check_problem(httpx.get(f"{api.url}/p/{token}.png"), 404)


def test_the_public_url_begins_each_address(farm: Farm, api: Api) -> None:
    ann = api.client("ann")
    frame = rendered(api, ann)
    farm.settings.public_url = "https://farm.example/images"
    again = frame_of(ann, frame_job(api))["signed_url"]
    assert again == frame["signed_url"].replace(api.url, "https://farm.example/images")


def test_no_address_is_given_if_their_lifetime_is_0(farm: Farm, api: Api) -> None:
    farm.settings.signed_url_seconds = 0
    assert rendered(api, api.client("ann"))["signed_url"] is None


def test_replaced_secrets_end_all_addresses(
    farm: Farm, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each API process notices it within ten seconds."""
    ann = api.client("ann")
    frame = rendered(api, ann)
    env = {"FARM_DATABASE_URL": farm.settings.database_url.get_secret_value()}
    assert command("keys", "end-addresses", env=env, stdin="n\n").code != 0
    assert command("keys", "end-addresses", "--yes", env=env).code == 0
    assert httpx.get(frame["signed_url"]).status_code == 200
    later = time.monotonic() + addresses.SECRETS_SECONDS
    monkeypatch.setattr(addresses, "time", SimpleNamespace(time=time.time, monotonic=lambda: later))
    assert httpx.get(frame["signed_url"]).status_code == 404
    new = frame_of(ann, frame_job(api))["signed_url"]
    assert new != frame["signed_url"]
    assert httpx.get(new).status_code == 200


def test_several_processes_make_the_first_secret_once(farm: Farm) -> None:
    together = threading.Barrier(4)
    with ThreadPoolExecutor(4) as pool:

        def load(_: int) -> dict[int, bytes]:
            with transaction(farm.store) as connection:
                together.wait(30)
                return signing_secrets.load(connection)

        first, *others = pool.map(load, range(4))
    assert first.keys() == {0}
    assert all(other == first for other in others)
    for _ in range(300):
        with transaction(farm.store) as connection:
            signing_secrets.replace(connection)
    assert sql(farm, "SELECT number FROM signing_secrets") == [(300 % 256,)]


@given(
    number=st.integers(0, 255),
    job=st.uuids(),
    ordinal=st.integers(0, 2**64 - 1),
    until=st.integers(0, 2**32 - 1),
    place=st.integers(0, 59),
    letter=st.sampled_from("ABCxyz019-_+/="),
)
def test_only_the_token_that_was_signed_is_read(
    number: int, job: uuid.UUID, ordinal: int, until: int, place: int, letter: str
) -> None:
    frame, secret = SignedFrame(job, ordinal, until), b"s" * 32
    token = sign(frame, number, secret)
    assert len(token) == 60
    assert read(token, {number: secret}) == frame
    assert read(token, {number: b"t" * 32, (number + 1) % 256: secret}) is None
    other = token[:place] + letter + token[place + 1 :]
    assert other == token or read(other, {number: secret}) is None
    for longer in (token + "=", token + "A", token + "AAAA", token[:-1], ""):
        assert read(longer, {number: secret}) is None


@given(now=st.floats(0, 4e9), seconds=st.integers(1, 10**7))
def test_an_address_lives_as_long_as_promised(now: float, seconds: int) -> None:
    assert now + seconds < until_of(now, seconds) <= now + seconds + max(1, seconds // 8)


# Keys that a process remembers


def test_two_replacements_at_once_leave_one_secret(farm: Farm) -> None:
    with transaction(farm.store) as connection:
        signing_secrets.load(connection)

    def replace() -> None:
        with transaction(farm.store) as two:
            signing_secrets.replace(two)

    with ThreadPoolExecutor(1) as pool:
        with transaction(farm.store) as one:
            signing_secrets.replace(one)
            second = pool.submit(replace)
            waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
            wait_until(lambda: sql(farm, waiting)[0][0], 30, "the second waits")
        second.result(30)
    assert sql(farm, "SELECT number FROM signing_secrets") == [(2,)]


def test_postgres_that_was_never_reached_is_an_outage(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for requests that come before the next try."""
    ann = api.client("ann")
    job = api.submit(ann)
    load = signing_secrets.load

    def fail(_: object) -> dict[int, bytes]:
        raise Unavailable("Postgres does not answer.")

    monkeypatch.setattr(signing_secrets, "load", fail)
    for _ in range(3):
        check_problem(ann.get(f"/v1/jobs/{job['id']}/frames"), 503)
        check_problem(httpx.get(f"{api.url}/p/{'A' * 60}.png"), 503)
    monkeypatch.setattr(signing_secrets, "load", load)
    frames = f"/v1/jobs/{job['id']}/frames"
    wait_until(lambda: ann.get(frames).status_code == 200, 30, "the secrets are read")


def test_pages_of_other_sites_may_show_it(api: Api) -> None:
    """Their browsers ask first if a script sends a key, and see errors too."""
    frame = rendered(api, api.client("ann"))
    asked = httpx.options(
        frame["signed_url"],
        headers={
            "Origin": "https://shop.example",
            "Access-Control-Request-Method": "GET",
            "Access-Control-Request-Headers": "authorization",
        },
    )
    assert asked.status_code == 204
    assert "Authorization" in asked.headers["access-control-allow-headers"]
    gone = httpx.get(f"{api.url}/p/{'A' * 60}.png")
    for answer in (asked, gone, httpx.get(frame["signed_url"])):
        assert answer.headers["access-control-allow-origin"] == "*"
    assert gone.headers["cache-control"] == "no-store"


def test_a_body_that_is_sent_needs_no_key(api: Api) -> None:
    frame = rendered(api, api.client("ann"))
    sent = httpx.request(
        "GET", frame["signed_url"], content=b"x", headers={"Authorization": "Bearer farm_wrong"}
    )
    assert (sent.status_code, len(sent.content)) == (200, frame["bytes"])


def test_a_lowered_lifetime_ends_addresses_that_live_longer(farm: Farm, api: Api) -> None:
    frame = rendered(api, api.client("ann"))
    for seconds, status in ((WEEK // 2, 404), (0, 404), (WEEK, 200)):
        farm.settings.signed_url_seconds = seconds
        assert httpx.get(frame["signed_url"]).status_code == status


def test_an_outage_of_the_storage_tells_no_tenant(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = rendered(api, api.client("ann"))
    [(tenant,)] = sql(api.farm, "SELECT tenant_id FROM jobs")

    def fail(_: Artifacts, key: str) -> bytes:
        raise Unavailable(f"The image storage did not give {key}.")

    monkeypatch.setattr(Artifacts, "get", fail)
    answer = httpx.get(frame["signed_url"])
    check_problem(answer, 503)
    assert str(tenant) not in answer.text


LARGE = 64 * 2**20


@contextmanager
def reading(api: Api, path: str) -> Iterator[socket.socket]:
    """Ask for an image, and read its status line only."""
    host, port = api.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as reader:
        reader.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert reader.recv(12) == b"HTTP/1.1 200"
        yield reader


def test_slow_readers_have_a_number_of_places(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Artifacts, "get", lambda *_: bytes(LARGE))
    monkeypatch.setattr(pictures, "MAX_SENT", 3)
    with serving(farm) as api:
        address = rendered(api, api.client("ann"))["signed_url"]
        path = address.removeprefix(api.url)
        with ExitStack() as stack:
            for _ in range(3):
                stack.enter_context(reading(api, path))
            refused = httpx.head(address)
            assert refused.status_code == 503
            assert refused.headers["retry-after"]
            assert api.client("bob").get("/v1/jobs").status_code == 200
        wait_until(lambda: httpx.head(address).status_code == 200, 30, "their places are free")


def test_a_slow_reader_is_cut_off(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Artifacts, "get", lambda *_: bytes(LARGE))
    monkeypatch.setattr(pictures, "MAX_SENT", 1)
    monkeypatch.setattr(pictures, "FIRST_SECONDS", 0.2)
    monkeypatch.setattr(pictures, "MIN_BYTES_PER_SECOND", 10 * LARGE)
    with serving(farm) as api:
        address = rendered(api, api.client("ann"))["signed_url"]
        with reading(api, address.removeprefix(api.url)) as reader:
            wait_until(lambda: httpx.head(address).status_code == 200, 30, "its place is free")
            received = 0
            try:
                while piece := reader.recv(2**20):
                    received += len(piece)
            except ConnectionResetError:
                pass
        assert received < LARGE


@pytest.fixture
def remembering(farm: Farm) -> Iterator[Api]:
    farm.settings.key_seconds = 60.0
    with serving(farm) as running:
        yield running


def test_a_client_that_polls_costs_one_lookup(remembering: Api) -> None:
    ann = remembering.client("ann")
    statements: list[str] = []

    def note(*given: Any) -> None:
        statements.append(given[2])

    event.listen(Engine, "before_cursor_execute", note)
    try:
        for _ in range(10):
            assert ann.get("/v1/jobs").status_code == 200
            assert ann.post("/v1/jobs", json=JOB).status_code == 202
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    assert len(statements) > 20
    assert sum("FROM keys" in statement for statement in statements) == 1


def test_a_remembered_key_that_is_revoked_ends(farm: Farm) -> None:
    farm.settings.key_seconds = 2.0
    with serving(farm) as api:
        ann, bob = api.client("ann"), api.client("bob")
        assert ann.get("/v1/jobs").status_code == 200
        sql(farm, "UPDATE keys SET revoked_at = clock_timestamp()")
        check_problem(bob.get("/v1/jobs"), 401)
        wait_until(lambda: ann.get("/v1/jobs").status_code == 401, 30, "the key has ended")


def test_an_unknown_key_is_looked_up_each_time(remembering: Api) -> None:
    """A key that was just created works at once."""
    key = "farm_just_created"
    client = remembering.bare(Authorization=f"Bearer {key}")
    check_problem(client.get("/v1/jobs"), 401)
    [(tenant,)] = sql(
        remembering.farm,
        "INSERT INTO tenants (id, name) VALUES (gen_random_uuid(), 'new') RETURNING id",
    )
    sql(
        remembering.farm,
        "INSERT INTO keys (id, tenant_id, role, prefix, digest)"
        " VALUES (gen_random_uuid(), :tenant, 'client', 'farm_', :digest)",
        tenant=tenant,
        digest=hashlib.sha256(key.encode()).digest(),
    )
    assert client.get("/v1/jobs").status_code == 200
