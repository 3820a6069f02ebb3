"""Pictures on the page: thumbnails made once, their signed addresses, and pages of pictures."""

from __future__ import annotations

import hashlib
import html
import io
import re
import time
import uuid
from collections.abc import Iterator

import httpx
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from sqlalchemy import event

from api.addresses import THUMBNAIL_SECONDS
from api.dashboard.pictures import MADE_PER_TENANT
from farm.context import Farm
from farm.domain import signed_addresses
from farm.domain.image_formats import FORMATS
from farm.domain.signed_addresses import SignedThumbnail, read_thumbnail, sign_thumbnail
from farm.errors import Unavailable
from farm.services import thumbnails
from farm.storage import THUMBNAIL, ArtifactName, parse_key
from farm.store import frames
from farm.store.engine import transaction
from farm.store.frames import CompletedFrame
from tests.integration.test_api_access import signed_in
from tests.integration.test_api_refusals import check_problem
from tests.integration.test_attention import opened
from tests.support.api_server import Api, render, serving
from tests.support.store import fence, new_tenant, register_worker, sql, stored_keys
from tests.support.waiting import wait_until
from workers.janitor.storage_cleaner import StorageCleaner

IMAGE = SignedThumbnail(uuid.uuid4(), uuid.uuid4(), 12, b"\x07" * 32, "webp", True, 1_800_000_000)


@pytest.fixture(autouse=True)
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pictures of more than 128 pixels be large: the catalog of the tests allows 256."""
    monkeypatch.setattr(thumbnails, "PIXELS", 128)


@pytest.fixture
def api(farm: Farm) -> Iterator[Api]:
    with serving(farm) as running:
        yield running


@pytest.fixture
def visitor(api: Api) -> httpx.Client:
    return signed_in(api, api.key())


def rendered(api: Api, tenant: str = "ann", images: int = 1, **fields: object) -> str:
    """Submit and render a job of 64 x 64 pixels. Return its ID."""
    job = api.submit(api.client(tenant), images_per_prompt=images, bucket=images, **fields)
    render(register_worker(api.farm, uuid.uuid4().hex[:8]), register_worker(api.farm).must_claim())
    return str(job["id"])


def large_png(width: int = 1024, height: int = 512) -> bytes:
    texts = PngInfo()
    texts.add_text("parameters", "a secret prompt")
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(
        buffer, "PNG", pnginfo=texts
    )
    return buffer.getvalue()


def stored_large(api: Api, tenant: str = "ann") -> ArtifactName:
    """Let a frame succeed with a large picture. Return its name."""
    job = api.submit(api.client(tenant), width=256, height=256)
    lease = register_worker(api.farm).must_claim()
    content = large_png()
    digest = hashlib.sha256(content).digest()
    owner = sql(api.farm, "SELECT tenant_id FROM jobs WHERE id = :id", id=job["id"])[0][0]
    name = ArtifactName(owner, uuid.UUID(job["id"]), 0, digest, "png")
    api.farm.artifacts.put(name.key, content)
    with transaction(api.farm.store) as connection:
        done = [CompletedFrame(fence(lease.frames[0]), digest, len(content), 0)]
        assert frames.complete(connection, lease.id, done)
    return name


def keys_of(api: Api, *jobs: object) -> list[str]:
    """List the keys of the objects of some jobs: other tests use the same storage."""
    return [key for key in stored_keys(api.farm) if any(str(job) in key for job in jobs)]


def thumbnail_addresses(page: str) -> list[str]:
    return re.findall(r'<img src="(/pictures/[\w=-]+)"', page)


# Tokens


def test_a_token_has_all_that_the_key_has() -> None:
    token = sign_thumbnail(IMAGE, 3, b"secret")
    assert len(token) == signed_addresses.THUMBNAIL_CHARS
    assert read_thumbnail(token, {3: b"secret"}) == IMAGE
    for secrets in ({3: b"other"}, {2: b"secret"}, {}):
        assert read_thumbnail(token, secrets) is None


def test_a_token_of_each_format_is_read_and_of_an_unknown_one_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert set(signed_addresses.CODES) == set(FORMATS)
    for form in FORMATS:
        image = IMAGE._replace(form=form)
        token = sign_thumbnail(image, 3, b"secret")
        assert read_thumbnail(token, {3: b"secret"}) == image
    monkeypatch.delitem(signed_addresses.FORMS, signed_addresses.CODES[form])
    assert read_thumbnail(token, {3: b"secret"}) is None


def test_a_token_of_another_purpose_is_none() -> None:
    frame = signed_addresses.SignedFrame(IMAGE.job_id, 12, IMAGE.until)
    assert read_thumbnail(signed_addresses.sign(frame, 3, b"secret"), {3: b"secret"}) is None
    assert signed_addresses.read(sign_thumbnail(IMAGE, 3, b"secret"), {3: b"secret"}) is None


def test_no_changed_token_is_read() -> None:
    token = sign_thumbnail(IMAGE, 3, b"secret")
    for at in range(len(token)):
        other = "A" if token[at] != "A" else "B"
        changed = token[:at] + other + token[at + 1 :]
        assert read_thumbnail(changed, {3: b"secret"}) is None, at


# Thumbnails


def test_a_thumbnail_is_made_once_and_holds_no_text(
    api: Api, visitor: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = stored_large(api)
    [address] = thumbnail_addresses(opened(visitor, f"/jobs/{name.job_id}"))
    made: list[int] = []
    small_webp = thumbnails.small_webp

    def counted(content: bytes) -> bytes:
        made.append(1)
        return small_webp(content)

    monkeypatch.setattr(thumbnails, "small_webp", counted)
    first, second = (api.bare().get(address) for _ in range(2))
    assert first.status_code == 200, first.text
    assert first.content == second.content
    assert len(made) == 1
    assert first.headers["content-type"] == "image/webp"
    with Image.open(io.BytesIO(first.content)) as image:
        assert (image.format, image.size) == ("WEBP", (128, 64))
        assert not {"exif", "xmp", "icc_profile"} & set(image.info)
    assert b"secret" not in first.content
    assert first.headers["cache-control"].startswith("private, max-age=")
    assert keys_of(api, name.job_id) == sorted([name.key, name.key + THUMBNAIL])


def test_only_the_first_look_at_a_thumbnail_costs_a_query(api: Api, visitor: httpx.Client) -> None:
    name = stored_large(api)
    [address] = thumbnail_addresses(opened(visitor, f"/jobs/{name.job_id}"))
    asked: list[str] = []

    def note(*args: object) -> None:
        asked.append(str(args[2]))

    store = api.app.state.farm.store
    event.listen(store, "before_cursor_execute", note)
    try:
        assert api.bare().get(address).status_code == 200
        made = len([each for each in asked if "FROM frames" in each])
        asked.clear()
        for _ in range(3):
            assert api.bare().get(address).status_code == 200
    finally:
        event.remove(store, "before_cursor_execute", note)
    assert (made, asked) == (1, [])


def test_the_thumbnail_of_a_small_picture_is_not_stored(api: Api, visitor: httpx.Client) -> None:
    job = rendered(api)
    [address] = thumbnail_addresses(opened(visitor, f"/jobs/{job}"))
    answer = api.bare().get(address)
    assert answer.headers["content-type"] == "image/webp"
    with Image.open(io.BytesIO(answer.content)) as image:
        assert (image.format, image.size) == ("WEBP", (64, 64))
    assert len(keys_of(api, job)) == 1


def test_nothing_is_made_of_a_removed_job(api: Api, visitor: httpx.Client) -> None:
    name = stored_large(api)
    [address] = thumbnail_addresses(opened(visitor, f"/jobs/{name.job_id}"))
    assert api.client().delete(f"/v1/jobs/{name.job_id}").status_code == 204
    check_problem(api.bare().get(address), 404)
    assert keys_of(api, name.job_id) == [name.key]


def test_thumbnails_of_one_tenant_leave_room_for_others(api: Api, visitor: httpx.Client) -> None:
    name, bobs = stored_large(api), stored_large(api, "bob")
    [address] = thumbnail_addresses(opened(visitor, f"/jobs/{name.job_id}"))
    [of_bob] = thumbnail_addresses(opened(signed_in(api, api.key("bob")), f"/jobs/{bobs.job_id}"))
    waiting = [
        api.app.state.made.take(str(name.tenant_id), "thumbnails") for _ in range(MADE_PER_TENANT)
    ]
    refused = api.bare().get(address)
    assert "Too many thumbnails" in check_problem(refused, 503)["detail"]
    assert int(refused.headers["retry-after"]) > 0
    assert api.bare().get(of_bob).status_code == 200
    for place in waiting:
        place.give_back()
    assert api.bare().get(address).status_code == 200


def test_a_thumbnail_that_cannot_be_stored_is_shown(
    api: Api, visitor: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = stored_large(api)
    [address] = thumbnail_addresses(opened(visitor, f"/jobs/{name.job_id}"))

    def refuse(_key: str, _content: bytes) -> None:
        raise Unavailable("It is full.")

    monkeypatch.setattr(api.app.state.farm.artifacts, "put", refuse)
    assert api.bare().get(address).status_code == 200
    assert len(keys_of(api, name.job_id)) == 1
    monkeypatch.undo()
    assert api.bare().get(address).status_code == 200
    assert len(keys_of(api, name.job_id)) == 2


@pytest.mark.parametrize("content", [b"", b"no picture", large_png()[:2000]])
def test_a_picture_that_cannot_be_read_has_no_thumbnail(
    api: Api, visitor: httpx.Client, content: bytes
) -> None:
    name = stored_large(api)
    api.farm.artifacts.put(name.key, content)
    [address] = thumbnail_addresses(opened(visitor, f"/jobs/{name.job_id}"))
    assert "cannot be read" in check_problem(api.bare().get(address), 404)["detail"]
    assert keys_of(api, name.job_id) == [name.key]


def test_removed_pictures_have_no_thumbnail(api: Api, visitor: httpx.Client) -> None:
    name, job = stored_large(api), rendered(api)
    addresses = [
        thumbnail_addresses(opened(visitor, f"/jobs/{each}"))[0] for each in (name.job_id, job)
    ]
    api.farm.artifacts.delete_all(keys_of(api, name.job_id, job))
    for address in addresses:
        check_problem(api.bare().get(address), 404)


def test_addresses_end(api: Api, monkeypatch: pytest.MonkeyPatch, visitor: httpx.Client) -> None:
    name = stored_large(api)
    [address] = thumbnail_addresses(opened(visitor, f"/jobs/{name.job_id}"))
    assert api.bare().get(address).status_code == 200
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + THUMBNAIL_SECONDS * 9 / 8 + 1)
    check_problem(api.bare().get(address), 404)
    monkeypatch.setattr(time, "time", lambda: now)
    assert api.bare().get(address).status_code == 200
    check_problem(api.bare().get("/pictures/none"), 404)
    check_problem(api.bare().get("/pictures/" + "A" * 500), 422)


def test_a_removed_job_takes_its_thumbnails_along(api: Api, visitor: httpx.Client) -> None:
    name = stored_large(api)
    [address] = thumbnail_addresses(opened(visitor, f"/jobs/{name.job_id}"))
    api.bare().get(address)
    assert len(keys_of(api, name.job_id)) == 2
    assert api.client().delete(f"/v1/jobs/{name.job_id}").status_code == 204
    sql(api.farm, "DELETE FROM frames")
    cleaner = StorageCleaner(api.farm)
    cleaner.step()
    assert keys_of(api, name.job_id) == []


def test_a_thumbnail_without_its_frame_is_an_orphan(api: Api) -> None:
    """It was stored after the objects of its removed job were deleted."""
    name = stored_large(api)
    gone = name._replace(job_id=uuid.uuid4())
    for each in (name, gone):
        api.farm.artifacts.put(each.thumbnail.key, b"small")
    settings = api.farm.settings.model_copy(update={"orphan_seconds": 0.0})
    api.farm.settings = settings
    cleaner = StorageCleaner(api.farm)

    def found() -> list[ArtifactName | None]:
        cleaner.step()  # it looks through a page of the storage, which has objects of other tests
        return [parse_key(key) for key in keys_of(api, name.job_id, gone.job_id)]

    wait_until(lambda: gone.thumbnail not in found(), 60, "the orphan is deleted")
    assert found() == [name, name.thumbnail]


# Pages of pictures


def frames_on(page: str) -> list[tuple[str, int]]:
    found = re.findall(r'<li id="picture-([0-9a-f-]{36})-(\d+)">', page)
    return [(job, int(ordinal)) for job, ordinal in found]


def test_pages_have_each_picture_once(
    api: Api, visitor: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    from api.dashboard import gallery_page

    jobs = [rendered(api, images=images) for images in (3, 1, 5)]
    rendered(api, "bob")
    wanted = [(jobs[2], n) for n in range(5)] + [(jobs[1], 0)] + [(jobs[0], n) for n in range(3)]
    assert frames_on(opened(visitor, "/pictures")) == wanted
    for size in (1, 2, 4):
        monkeypatch.setattr(gallery_page, "SHOWN", size)
        seen, path = [], "/pictures"
        while path:
            page = visitor.get(path, headers={"Accept": "text/html"}).text
            found = frames_on(page)
            assert len(found) <= size
            assert len(thumbnail_addresses(page)) == len(found)
            seen += found
            links = re.findall(r'<a href="([^"]*)" rel="next">older</a>', page)
            path = html.unescape(links[0]) if links else ""
        assert seen == wanted, size


def test_pictures_are_filtered_as_jobs_are(api: Api, visitor: httpx.Client) -> None:
    star = rendered(api, prompts=["a red star"], labels={"set": "spring"})
    moon = rendered(api, prompts=["a moon"], priority="bulk")
    bob = rendered(api, "bob", prompts=["a star of bob"])
    for query, found in {
        "q=star": [star],
        "q=STAR&label=set%3Dspring": [star],
        "priority=bulk": [moon],
        f"q={moon[:8]}": [moon],
        "status=failed": [],
        "q=nothing": [],
    }.items():
        page = opened(visitor, f"/pictures?{query}")
        assert [job for job, _ in frames_on(page)] == found, query
    assert "No picture matches." in opened(visitor, "/pictures?q=nothing")
    check_problem(visitor.get("/pictures?tenant=bob"), 403)
    operator = signed_in(api, api.key("ops", "operator"))
    assert [job for job, _ in frames_on(opened(operator, "/pictures?q=star"))] == [bob, star]
    assert [job for job, _ in frames_on(opened(operator, "/pictures?tenant=bob"))] == [bob]


def test_a_page_after_another_tenants_job_shows_nothing_of_it(
    api: Api, visitor: httpx.Client
) -> None:
    mine = rendered(api)
    bobs = rendered(api, "bob", images=2)
    for job in (bobs, uuid.uuid4()):  # neither is looked up
        for more in ("&of=2100-01-01T00:00:00Z", ""):
            assert frames_on(opened(visitor, f"/pictures?after={job}{more}")) == [(mine, 0)]
        assert frames_on(opened(visitor, f"/pictures?after={job}&of=2000-01-01T00:00:00Z")) == []
    check_problem(visitor.get("/pictures?at=-2"), 422)


def test_new_tenants_have_no_pictures(api: Api) -> None:
    new_tenant(api.farm, "eve")
    assert "No pictures yet." in opened(signed_in(api, api.key("eve")), "/pictures")
