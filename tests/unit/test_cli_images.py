"""`farm images` and `--control`: files and addresses that are read, and requests."""

from __future__ import annotations

import io
import json
import os
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image

from farm.cli.commands.images import read_image
from farm.cli.submission.body import control_word
from farm.errors import FarmError, InvalidRequest, Unavailable
from farm.local.ports import free_port
from tests.support.cli_runner import farm
from tests.unit.test_cli_client import Script, handler, problem

ID, OTHER = "a1" * 32, "b2" * 32
LIMIT = 100_000


def file(kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(buffer, kind)
    return buffer.getvalue()


def uploaded(image_id: str) -> dict[str, Any]:
    return {"id": image_id, "width": 16, "height": 16}


@pytest.fixture
def script() -> Iterator[Script]:
    """Run a server that acts as the farm or as another web server."""
    script = Script()
    with ThreadingHTTPServer(("127.0.0.1", 0), handler(script)) as server:
        script.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield script
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: Script) -> None:
    """Change into an empty folder, with the script as the farm."""
    for name in os.environ:
        if name.startswith("FARM_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("FARM_API_URL", script.url)
    monkeypatch.setenv("FARM_API_KEY", "farm_key")
    monkeypatch.chdir(tmp_path)


# Reading and fetching


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_the_kind_is_told_from_the_content(kind: str) -> None:
    Path("picture.txt").write_bytes(file(kind))
    read = read_image("picture.txt", LIMIT)
    assert (read.content, read.media_type) == (file(kind), f"image/{kind.lower()}")


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF"])
def test_other_files_are_refused_before_anything_is_sent(kind: str, script: Script) -> None:
    Path("picture.png").write_bytes(file(kind))
    for words in (["images", "picture.png"], ["submit", "x", "--control", "picture.png"]):
        outcome = farm(*words)
        assert (outcome.code, outcome.out) == (1, "")
        assert (
            outcome.err
            == "Error: picture.png is not a PNG, JPEG or WebP file. Convert it to one of them.\n"
        )
    assert script.asked == []


def test_files_that_cannot_be_read_are_named() -> None:
    with pytest.raises(InvalidRequest, match=r"nope\.png cannot be read: No such file"):
        read_image("nope.png", LIMIT)
    with pytest.raises(InvalidRequest, match=r"\. cannot be read: Is a directory"):
        read_image(".", LIMIT)


def test_a_file_beyond_the_limit_is_not_read_to_its_end() -> None:
    Path("large.png").write_bytes(file().ljust(LIMIT + 1, b"\0"))
    for source in ("large.png", "/dev/zero"):
        with pytest.raises(InvalidRequest, match=f"{source} is larger than the limit of 100000"):
            read_image(source, LIMIT)
    assert read_image("large.png", LIMIT + 1).media_type == "image/png"


def test_an_address_is_fetched_without_the_key(script: Script) -> None:
    script.tell(302, b"", Location="/there")
    script.tell(200, file(), Content_Type="text/plain")
    read = read_image(f"{script.url}/picture", LIMIT)
    assert (read.content, read.media_type) == (file(), "image/png")
    assert [path for _method, path, _headers, _body in script.asked] == ["/picture", "/there"]
    assert not [asked for asked in script.asked if "Authorization" in asked[2]]


def test_an_address_that_gives_no_image_is_refused(script: Script) -> None:
    script.tell(404, b"nothing")
    with pytest.raises(
        InvalidRequest, match=r"cannot be downloaded: 127\.0\.0\.1 answered 404 Not Found"
    ):
        read_image(f"{script.url}/picture.png", LIMIT)


def test_an_address_of_a_page_is_refused(script: Script) -> None:
    script.tell(200, b"<html>")
    with pytest.raises(InvalidRequest, match="is not a PNG, JPEG or WebP file"):
        read_image(f"{script.url}/picture.png", LIMIT)


def test_an_address_beyond_the_limit_is_not_fetched_to_its_end(script: Script) -> None:
    script.tell(200, file().ljust(LIMIT + 1, b"\0"))
    with pytest.raises(InvalidRequest, match="is larger than the limit of 100000 bytes"):
        read_image(f"{script.url}/picture.png", LIMIT)


def test_an_address_that_sends_too_slowly_is_given_up(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("farm.cli.commands.images.FETCH_SECONDS", -1.0)
    script.tell(200, file())
    with pytest.raises(Unavailable, match="cannot be downloaded within"):
        read_image(f"{script.url}/picture.png", LIMIT)


def test_redirects_end(script: Script) -> None:
    script.tell(302, b"", Location="/again")
    with pytest.raises(FarmError, match="cannot be downloaded: Exceeded maximum allowed redirects"):
        read_image(f"{script.url}/picture.png", LIMIT)


@pytest.mark.parametrize("url", ["http://", "https://[", "http://x:y/"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(FarmError, match=r"is not a valid URL|cannot be downloaded"):
        read_image(url, LIMIT)


def test_nobody_there() -> None:
    with pytest.raises(Unavailable, match=r"cannot be downloaded: .*refused"):
        read_image(f"http://127.0.0.1:{free_port()}/picture.png", LIMIT)


# farm images


def test_each_image_is_uploaded_and_its_id_printed(script: Script) -> None:
    Path("a.png").write_bytes(file())
    Path("b.jpg").write_bytes(file("JPEG"))
    script.tell(201, uploaded(ID))
    script.tell(201, uploaded(OTHER))
    outcome = farm("images", "a.png", "b.jpg")
    assert (outcome.code, outcome.out) == (0, f"{ID}\n{OTHER}\n")
    (method, path, headers, body), second = script.asked
    assert (method, path, headers["Content-Type"], body) == (
        "POST",
        "/v1/images",
        "image/png",
        file(),
    )
    assert headers["Authorization"] == "Bearer farm_key"
    assert second[2]["Content-Type"] == "image/jpeg"
    assert farm("images", "a.png", "--json").json == uploaded(OTHER)


def test_a_refusal_names_the_file(script: Script) -> None:
    Path("a.png").write_bytes(file())
    script.tell(422, problem(422, "invalid_request", "The image is animated."))
    outcome = farm("images", "a.png")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err == "Error: a.png: The image is animated.\n"


def test_the_setting_limits_what_is_read(monkeypatch: pytest.MonkeyPatch, script: Script) -> None:
    Path("a.png").write_bytes(file())
    monkeypatch.setenv("FARM_MAX_IMAGE_BYTES", "20")
    assert farm("images", "a.png").err == (
        "Error: a.png is larger than the limit of 20 bytes (FARM_MAX_IMAGE_BYTES).\n"
    )
    assert script.asked == []


# --control


@pytest.mark.parametrize(
    ("word", "source", "settings"),
    [
        ("pose.png", "pose.png", {}),
        ("pose.png,scale=0.8", "pose.png", {"scale": 0.8}),
        (
            "pose.png,scale=0.8,start=0,end=0.5",
            "pose.png",
            {"scale": 0.8, "start": 0.0, "end": 0.5},
        ),
        ("pose.png, end = 1e-1 , scale=1", "pose.png", {"end": 0.1, "scale": 1.0}),
        ("a,b.png", "a,b.png", {}),
        ("a,scale=1,b.png,scale=2", "a,scale=1,b.png", {"scale": 2.0}),
        ("a.png,scale=1,scale=2", "a.png,scale=1", {"scale": 2.0}),
        ("a.png,scale=much", "a.png,scale=much", {}),
        ("a.png,scale=nan", "a.png,scale=nan", {}),
        ("a.png,scale=", "a.png,scale=", {}),
        ("a.png,strength=1", "a.png,strength=1", {}),
        ("https://x/y?a=1,2,scale=3", "https://x/y?a=1,2", {"scale": 3.0}),
        (f"{ID},start=0.5", ID, {"start": 0.5}),
    ],
)
def test_only_known_numbers_at_the_end_are_settings(
    word: str, source: str, settings: dict[str, float]
) -> None:
    parted = control_word(word)
    assert (parted.source, parted.settings) == (source, settings)


@pytest.mark.parametrize("word", ["", " ", ",scale=1"])
def test_a_control_names_an_image(word: str) -> None:
    with pytest.raises(typer.BadParameter, match="names no image"):
        control_word(word)
    assert farm("submit", "x", "--control", word).code == 2


def test_control_images_are_uploaded_and_named_in_the_job(script: Script) -> None:
    Path("edges, of a house.png").write_bytes(file())
    script.tell(201, uploaded(ID))
    script.tell(202, {"id": "job", "total": 1, "pipeline": "canny", "priority": "normal"})
    outcome = farm(
        *("submit", "a house", "--pipeline", "canny", "--json"),
        *("--control", "edges, of a house.png,scale=0.8", "--control", f"{OTHER},end=0.5"),
        *("--control", "edges, of a house.png"),
    )
    assert outcome.code == 0, outcome.err
    assert [path for _method, path, _headers, _body in script.asked] == ["/v1/images", "/v1/jobs"]
    assert json.loads(script.asked[1][3])["control"] == [
        {"image": ID, "scale": 0.8},
        {"image": OTHER, "end": 0.5},
        {"image": ID},
    ]


def test_nothing_is_sent_unless_every_image_can_be_read(script: Script) -> None:
    Path("a.png").write_bytes(file())
    outcome = farm("submit", "x", "--control", "a.png", "--control", "b.png,scale=2")
    assert outcome.err == "Error: b.png cannot be read: No such file or directory.\n"
    assert script.asked == []


def test_a_job_without_a_prompt_uploads_nothing(script: Script) -> None:
    Path("a.png").write_bytes(file())
    assert farm("submit", "--control", "a.png").code == 2
    assert script.asked == []
