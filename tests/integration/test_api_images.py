"""Control images over HTTP: uploaded once and visible only to their tenant.

Refused uploads leave nothing behind.
"""

from __future__ import annotations

import hashlib
import io
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from api.routes.images import MAX_CONCURRENT_DECODINGS, MAX_WAITING
from farm.config import Settings
from farm.context import Farm
from farm.errors import RenderError, Unavailable
from farm.imaging import uploads
from farm.services import control_images
from farm.storage import Artifacts
from farm.store.engine import transaction
from tests.integration.test_api_health import without
from tests.integration.test_api_refusals import check_problem
from tests.support.api_server import Api, serving
from tests.support.cli_runner import farm as command
from tests.support.store import new_tenant, sql
from tests.support.waiting import wait_until
from workers.janitor.storage_cleaner import StorageCleaner

UNKNOWN = "0" * 64
MAX_BYTES, MAX_PIXELS = 50_000, 256 * 128


@pytest.fixture
def settings(settings: Settings) -> Settings:
    limits = {"max_image_bytes": MAX_BYTES, "max_image_pixels": MAX_PIXELS}
    # A separate bucket, so that its objects can be counted.
    return settings.model_copy(update={**limits, "s3_bucket": f"images-{uuid.uuid4().hex}"})


@pytest.fixture
def farm(farm: Farm) -> Farm:
    farm.artifacts._s3.create_bucket(Bucket=farm.settings.s3_bucket)
    return farm


@pytest.fixture
def api(farm: Farm) -> Iterator[Api]:
    with serving(farm) as running:
        yield running


def picture(size: tuple[int, int] = (32, 24)) -> Image.Image:
    return Image.radial_gradient("L").resize(size).convert("RGB")


def file(kind: str = "PNG", size: tuple[int, int] = (32, 24), **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture(size).save(buffer, kind, **options)
    return buffer.getvalue()


def send(client: httpx.Client, content: bytes, kind: str = "image/png") -> httpx.Response:
    return client.post("/v1/images", content=content, headers={"Content-Type": kind})


def stored(farm: Farm) -> tuple[int, int]:
    """Count the images: rows, and objects in the bucket."""
    objects = farm.artifacts._s3.list_objects_v2(Bucket=farm.settings.s3_bucket)
    kept = sql(farm, "SELECT count(*) FROM control_images WHERE state = 'stored'")
    return kept[0][0], objects["KeyCount"]


def tenant_of(farm: Farm, name: str = "ann") -> uuid.UUID:
    return new_tenant(farm, name)


def test_an_image_as_uploaded_and_as_returned(api: Api) -> None:
    client = api.client()
    response = send(client, file())
    assert response.status_code == 201, response.text
    image = response.json()
    assert set(image) == {"id", "width", "height", "bytes", "content_type", "created_at"}
    assert (image["width"], image["height"], image["content_type"]) == (32, 24, "image/png")
    path = f"/v1/images/{image['id']}"
    assert response.headers["location"] == path
    assert client.get(path).json() == image

    pointer = client.get(f"{path}/content")
    assert (pointer.status_code, pointer.headers["cache-control"]) == (307, "no-store")
    content = httpx.get(pointer.headers["location"])  # without the key
    assert content.headers["content-type"] == "image/png"
    assert len(content.content) == image["bytes"]
    assert hashlib.sha256(content.content).hexdigest() == image["id"]
    shown = Image.open(io.BytesIO(content.content))
    assert (shown.mode, shown.info) == ("RGB", {})
    assert shown.tobytes() == picture().tobytes()


def test_the_same_content_has_the_same_id(api: Api) -> None:
    client = api.client()
    first = send(client, file()).json()
    for content, kind in (
        (file(), "image/png"),
        (file(dpi=(300, 300), compress_level=9), "image/png"),
        (file("WEBP", lossless=True), "image/webp"),
    ):
        again = send(client, content, kind)
        assert (again.status_code, again.json()) == (201, first)
    assert stored(api.farm) == (1, 1)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: send(client, file("JPEG"), "image/jpeg"), range(16)))
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.text for answer in answers}) == 1
    assert stored(api.farm) == (2, 2)


def test_an_object_that_was_lost_is_back_after_another_upload(api: Api) -> None:
    client = api.client()
    image = send(client, file()).json()
    key = control_images.image_key(tenant_of(api.farm), image["id"])
    api.farm.artifacts.delete(key)
    assert stored(api.farm) == (1, 0)
    assert send(client, file()).json() == image
    assert stored(api.farm) == (1, 1)


def test_another_tenants_image_is_not_there(api: Api) -> None:
    ann, bob = api.client("ann"), api.client("bob")
    image = send(ann, file()).json()
    path = f"/v1/images/{image['id']}"
    for suffix in ("", "/content"):
        assert ann.get(path + suffix).status_code in (200, 307)
        problem = check_problem(bob.get(path + suffix), 404)
        assert problem["detail"] == f"There is no image {image['id']}."
        check_problem(ann.get(f"/v1/images/{UNKNOWN}{suffix}"), 404)
    assert send(bob, file()).json()["id"] == image["id"]
    assert bob.get(path).status_code == 200
    assert stored(api.farm) == (2, 2)


def test_who_may_upload(api: Api) -> None:
    client, viewer = api.client(), api.client(role="viewer")
    assert check_problem(send(viewer, file()), 403)["error"]["type"] == "permission_error"
    check_problem(send(api.bare(), file()), 401)
    assert stored(api.farm) == (0, 0)
    image = send(client, file()).json()
    for suffix in ("", "/content"):
        path = f"/v1/images/{image['id']}{suffix}"
        assert viewer.get(path).status_code in (200, 307)
        check_problem(api.bare().get(path), 401)
    assert send(api.client(role="operator"), file()).status_code == 201


@pytest.mark.parametrize("word", ["x", UNKNOWN[:-1], UNKNOWN + "0", "A" * 64, "%00" * 64])
def test_what_is_no_id_is_refused(api: Api, word: str) -> None:
    for suffix in ("", "/content"):
        problem = check_problem(api.client().get(f"/v1/images/{word}{suffix}"), 422)
        assert problem["error"]["param"] == "image_id"


def frames() -> bytes:
    return file(save_all=True, append_images=[picture().rotate(90)])


def deep() -> bytes:
    buffer = io.BytesIO()
    Image.new("I;16", (32, 24), 40_000).save(buffer, "PNG")
    return buffer.getvalue()


REFUSED: dict[str, tuple[bytes, str, int, str]] = {
    "no body": (b"", "image/png", 422, "is not image/png, image/jpeg or image/webp"),
    "not an image": (b"{}", "image/png", 422, "is not image/png, image/jpeg or image/webp"),
    "a GIF said to be a PNG": (file("GIF"), "image/png", 422, "is not image/png"),
    "a JPEG said to be a PNG": (file("JPEG"), "image/png", 422, "the image is image/jpeg"),
    "a type that is not taken": (file("GIF"), "image/gif", 415, "as image/png, image/jpeg"),
    "no type": (file(), "", 415, "as image/png"),
    "a form": (file(), "multipart/form-data; boundary=x", 415, "as image/png"),
    "half a PNG": (file()[:-20], "image/png", 422, "damaged, cut short"),
    "half a JPEG": (file("JPEG")[:-20], "image/jpeg", 422, "damaged, cut short"),
    "half a WebP": (file("WEBP")[:-20], "image/webp", 422, "damaged, cut short"),
    "an animation": (frames(), "image/png", 422, "animated"),
    "16 bits a channel": (deep(), "image/png", 422, "convert it to 8 bits first"),
    "a small side": (file(size=(7, 90)), "image/png", 422, "each side must have at least 8"),
    "too many pixels": (file(size=(256, 129)), "image/png", 422, f"the limit is {MAX_PIXELS}"),
    "too many bytes": (bytes(MAX_BYTES + 1), "image/png", 413, f"limit of {MAX_BYTES} bytes"),
}


def test_what_is_refused_leaves_nothing_behind(api: Api) -> None:
    client = api.client()
    for case, (content, kind, status, words) in REFUSED.items():
        problem = check_problem(send(client, content, kind), status)
        assert words in problem["detail"], (case, problem)
        assert len(problem["detail"]) < 300, case
    assert stored(api.farm) == (0, 0)
    assert send(client, file(size=(256, 128))).status_code == 201


def test_a_body_without_a_length_is_limited_too(api: Api) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(MAX_BYTES // 1_000 + 1):
            yield bytes(1_000)

    headers = {"Content-Type": "image/png"}
    response = api.client().post("/v1/images", content=chunks(), headers=headers)
    assert check_problem(response, 413)["error"]["code"] == "body_too_large"
    assert stored(api.farm) == (0, 0)


def test_decoding_holds_up_nobody_else(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    healthy = []
    load = uploads._png

    def slow(image: Image.Image) -> bytes:
        healthy.append(httpx.get(f"{api.url}/healthz").status_code)
        healthy.append(api.client().get("/v1/jobs").status_code)
        return load(image)

    monkeypatch.setattr(uploads, "_png", slow)
    assert send(api.client(), file()).status_code == 201
    assert healthy == [200, 200]


def test_without_the_storage_nothing_is_noted(farm: Farm) -> None:
    with serving(farm, without(farm.settings, "s3")) as api:
        response = send(api.client(), file())
        problem = check_problem(response, 503)
        assert problem["error"]["code"] == "unavailable"
        assert int(response.headers["retry-after"]) > 0
    assert stored(farm) == (0, 0)


def test_without_postgres_nothing_is_taken(farm: Farm) -> None:
    with serving(farm, without(farm.settings, "postgres")) as api:
        check_problem(send(api.client(), file()), 503)
    assert stored(farm) == (0, 0)


def test_openapi_tells_what_is_taken(api: Api) -> None:
    document = httpx.get(f"{api.url}/openapi.json").json()
    call = document["paths"]["/v1/images"]["post"]
    assert set(call["requestBody"]["content"]) == {"image/png", "image/jpeg", "image/webp"}
    assert set(call["responses"]) == {"201", "400", "401", "403", "413", "415", "429", "422", "503"}
    for status, response in call["responses"].items():
        media = "application/json" if status == "201" else "application/problem+json"
        assert list(response["content"]) == [media]
    assert "/v1/images" in httpx.get(f"{api.url}/docs").text


def test_the_commands_agree_with_the_api(
    api: Api, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("FARM_DATA", raising=False)
    monkeypatch.setenv("FARM_API_URL", api.url)
    monkeypatch.setenv("FARM_API_KEY", api.key())
    path = tmp_path / "edges.png"
    path.write_bytes(file())
    printed = command("images", str(path), str(path))
    image_id = send(api.client(), file()).json()["id"]
    assert (printed.code, printed.out) == (0, f"{image_id}\n" * 2), printed.err
    assert command("images", str(path), "--json").json["id"] == image_id
    path.write_bytes(frames())
    assert command("images", str(path)).err == (
        f"Error: {path}: The image is animated; send a single picture.\n"
    )
    shown = command("submit", "--fields")
    assert "\nsteps               number of denoising steps\n" in shown.out, shown.err
    [demo] = api.client().get("/v1/pipelines").json()["data"]
    assert command("submit", "--fields", "--json").json == demo


# Requests by workers and jobs


def test_a_worker_loads_the_picture_itself(farm: Farm, tenant: uuid.UUID) -> None:
    image = control_images.upload(farm, tenant, file("JPEG", quality=95), "image/jpeg")
    loaded = control_images.load_image(farm.artifacts, tenant, image.id)
    assert (loaded.mode, loaded.size) == ("RGB", (32, 24))
    assert loaded.tobytes() == Image.open(io.BytesIO(file("JPEG", quality=95))).tobytes()


def test_a_lost_or_changed_object_is_no_use_to_try_again(farm: Farm, tenant: uuid.UUID) -> None:
    image = control_images.upload(farm, tenant, file(), "image/png")
    with pytest.raises(RenderError, match=f"holds no image {UNKNOWN}") as missing:
        control_images.load_image(farm.artifacts, tenant, UNKNOWN)
    with pytest.raises(RenderError, match="holds no image"):
        control_images.load_image(farm.artifacts, tenant_of(farm), image.id)
    farm.artifacts.put(control_images.image_key(tenant, image.id), file(size=(8, 8)))
    with pytest.raises(RenderError, match="has other content") as changed:
        control_images.load_image(farm.artifacts, tenant, image.id)
    assert not missing.value.retryable
    assert not changed.value.retryable


def test_a_storage_that_is_away_may_be_asked_again(farm: Farm, tenant: uuid.UUID) -> None:
    image = control_images.upload(farm, tenant, file(), "image/png")
    nowhere = Artifacts(without(farm.settings, "s3"))
    with pytest.raises(Unavailable, match="did not return"):
        control_images.load_image(nowhere, tenant, image.id)
    nowhere.close()


def test_missing_images_are_told(farm: Farm, tenant: uuid.UUID) -> None:
    mine = control_images.upload(farm, tenant, file(), "image/png").id
    theirs = control_images.upload(farm, tenant_of(farm), file(size=(8, 8)), "image/png").id
    asked = [mine, mine, theirs, UNKNOWN, "", "x", mine.upper(), mine + "\n", "é" * 64]
    with transaction(farm.store) as connection:
        assert control_images.missing_images(connection, tenant, asked) == set(asked) - {mine}
        assert control_images.missing_images(connection, tenant, {mine}) == set()
        assert control_images.missing_images(connection, tenant, ()) == set()


def test_a_crowd_of_uploads_holds_up_nobody(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two are decoded at a time. Others wait without a thread, and excess uploads are refused."""
    counting, go_on = threading.Lock(), threading.Event()
    inside, most = 0, 0

    def slow(*_given: object) -> Image.Image:
        nonlocal inside, most
        with counting:
            inside += 1
            most = max(most, inside)
        go_on.wait(120)
        with counting:
            inside -= 1
        return picture()

    monkeypatch.setattr("farm.imaging.uploads._picture", slow)
    client, content = api.client(), file()
    crowd = MAX_CONCURRENT_DECODINGS + MAX_WAITING + 5
    limits = httpx.Limits(max_connections=crowd + 1)
    headers = {**client.headers, "Content-Type": "image/png"}
    with (
        httpx.Client(base_url=api.url, headers=headers, timeout=150, limits=limits) as sender,
        ThreadPoolExecutor(crowd) as threads,
    ):
        sent = [threads.submit(sender.post, "/v1/images", content=content) for _ in range(crowd)]
        wait_until(lambda: sum(one.done() for one in sent) >= 5, 60, "the last five are sent away")
        assert client.get("/v1/images/" + UNKNOWN).status_code == 404
        assert client.get("/v1/jobs").status_code == 200
        go_on.set()
        codes = [one.result().status_code for one in sent]
    assert set(codes) == {201, 503}
    # The connection pool may refuse more of them, if all ask for one at the same moment.
    assert codes.count(201) <= MAX_CONCURRENT_DECODINGS + MAX_WAITING
    assert most == MAX_CONCURRENT_DECODINGS


# Deleting


def test_a_deleted_image_is_gone_at_once_and_its_object_soon(api: Api, farm: Farm) -> None:
    client, bob = api.client(), api.client("bob")
    image, other = send(client, file()).json(), send(client, file(size=(24, 32))).json()
    path = f"/v1/images/{image['id']}"
    assert [each["id"] for each in client.get("/v1/images").json()["data"]] == sorted(
        [image["id"], other["id"]]
    )
    check_problem(bob.delete(path), 404)
    check_problem(api.client(role="viewer").delete(path), 403)
    assert client.delete(path).status_code == 204
    check_problem(client.get(path), 404)
    check_problem(client.get(f"{path}/content"), 404)
    check_problem(client.delete(path), 404)
    assert [each["id"] for each in client.get("/v1/images").json()["data"]] == [other["id"]]
    check_problem(send(client, file()), 503)
    StorageCleaner(farm).step()
    assert stored(farm) == (1, 1)
    assert send(client, file()).json()["id"] == image["id"]
    assert stored(farm) == (2, 2)


def test_an_image_is_named_in_a_job_only_while_it_is_there(api: Api, farm: Farm) -> None:
    tenant = tenant_of(farm)
    client = api.client()
    image = send(client, file()).json()["id"]
    for removed in (False, True):
        if removed:
            assert client.delete(f"/v1/images/{image}").status_code == 204
        with transaction(farm.store) as connection:
            assert control_images.missing_images(connection, tenant, [image]) == (
                {image} if removed else set()
            )


def test_an_upload_that_is_cut_off_between_row_and_object_is_no_image(
    api: Api, farm: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = api.client()

    def away(_artifacts: Artifacts, _key: str, _content: bytes) -> None:
        raise Unavailable("The image storage is away.")

    with monkeypatch.context() as patch:
        patch.setattr(Artifacts, "put", away)
        check_problem(send(client, file()), 503)
    assert client.get("/v1/images").json()["data"] == []
    image = send(client, file()).json()
    assert client.get(f"/v1/images/{image['id']}").json() == image


def test_images_are_listed_by_pages(api: Api) -> None:
    client = api.client()
    ids = sorted(send(client, file(size=(8, 8 + number))).json()["id"] for number in range(3))
    first = client.get("/v1/images", params={"limit": 2}).json()
    assert [each["id"] for each in first["data"]] == ids[:2]
    rest = client.get("/v1/images", params={"limit": 2, "after": first["next"]}).json()
    assert ([each["id"] for each in rest["data"]], rest["next"]) == (ids[2:], None)
