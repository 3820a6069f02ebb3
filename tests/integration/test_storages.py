"""Storages that require S3's older headers, and proxy variables that must be ignored."""

from __future__ import annotations

import base64
import hashlib
import http.client
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import httpx
import pytest

from farm.config import Settings
from farm.services.doctor import _s3
from farm.storage import Artifacts, artifact_key, is_loopback

MISSING = (
    b'<?xml version="1.0"?><Error><Code>MissingContentMD5</Code>'
    b"<Message>Missing required header for this request: Content-Md5.</Message></Error>"
)


@dataclass
class Front:
    """A proxy before an S3 server, as clients or the farm see it."""

    url: str = ""
    methods: list[str] = field(default_factory=list)


@contextmanager
def front_of(endpoint: str, *, wants_md5: bool = False) -> Iterator[Front]:
    """Run a proxy that keeps the name it was called by. It may refuse deletions without an MD5."""
    place, front = urlsplit(endpoint).netloc, Front()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            front.methods.append(self.command)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            digest = base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()
            deletes = self.command == "POST" and "delete" in urlsplit(self.path).query
            if wants_md5 and deletes and self.headers.get("Content-MD5") != digest:
                self._send(400, MISSING)
                return
            server = http.client.HTTPConnection(place)
            server.request(self.command, self.path, body, dict(self.headers))
            answer = server.getresponse()
            self._send(answer.status, answer.read())
            server.close()

        def _send(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer  # noqa: N815 - http.server's

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        front.url = f"http://127.0.0.1:{server.server_port}"
        yield front
        server.shutdown()
        thread.join()


def test_objects_are_deleted_where_content_md5_is_wanted(settings: Settings) -> None:
    assert settings.s3_endpoint_url is not None
    with front_of(settings.s3_endpoint_url, wants_md5=True) as front:
        through = settings.model_copy(update={"s3_endpoint_url": front.url})
        artifacts = Artifacts(through)
        for key in ("md5/a", "md5/b"):
            artifacts.put(key, b"x")
        artifacts.delete_all(["md5/a", "md5/b"])
        artifacts.close()
        assert "can be written, read and deleted from" in _s3(through)
    assert not Artifacts(settings).list_page(prefix="md5/").objects


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_a_server_of_this_machine_is_reached_without_a_proxy(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert "can be written, read and deleted from" in _s3(settings)


@pytest.mark.parametrize(
    ("url", "here"),
    [
        ("http://127.0.0.1:9000", True),
        ("http://localhost:9000", True),
        ("http://[::1]:9000", True),
        ("http://s3.localhost", True),
        ("https://s3.eu-central-1.amazonaws.com", False),
        ("http://10.0.0.1:9000", False),
        ("http://localhost.example.org", False),
    ],
)
def test_an_address_of_this_machine_is_known(url: str, here: bool) -> None:
    assert is_loopback(url) is here


def test_clients_download_from_the_public_address(settings: Settings) -> None:
    """The farm itself uses the inner one, which is not reachable for a client."""
    with front_of(settings.s3_endpoint_url or "") as public:
        artifacts = Artifacts(settings.model_copy(update={"s3_public_url": public.url}))
        key = artifact_key(uuid.UUID(int=1), uuid.UUID(int=2), 3, bytes(32))
        artifacts.put(key, b"bytes")
        assert public.methods == []
        address = artifacts.presigned(key)
        assert address.startswith(f"{public.url}/{settings.s3_bucket}/")
        assert httpx.get(address).content == b"bytes"
        assert httpx.head(artifacts.presigned(key, head=True)).status_code == 200
        assert public.methods == ["GET", "HEAD"]
        artifacts.close()


@pytest.mark.parametrize(
    "url", ["images.example", "ftp://images.example", "https://images.example/farm", "https://"]
)
def test_a_public_address_is_a_scheme_and_a_host(url: str) -> None:
    with pytest.raises(ValueError, match=r"Example: https://images\.example"):
        Settings(s3_public_url=url)


@pytest.mark.parametrize(
    ("addressing", "beginning"),
    [
        ("path", "https://images.example/farm/some/key?"),
        ("virtual", "https://farm.images.example/some/key?"),
    ],
)
@pytest.mark.parametrize("setting", ["s3_public_url", "s3_endpoint_url"])
def test_the_bucket_stands_where_the_storage_wants_it(
    settings: Settings, setting: str, addressing: str, beginning: str
) -> None:
    own = {"s3_addressing": addressing, "s3_bucket": "farm", setting: "https://images.example"}
    artifacts = Artifacts(settings.model_copy(update=own))
    assert artifacts.presigned("some/key").startswith(beginning)
    artifacts.close()
