"""Storages that require S3's older headers, and proxy variables that must be ignored."""

from __future__ import annotations

import base64
import hashlib
import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

from farm.cli.commands.doctor_checks import _s3
from farm.config import Settings
from farm.storage import Artifacts, is_loopback

MISSING = (
    b'<?xml version="1.0"?><Error><Code>MissingContentMD5</Code>'
    b"<Message>Missing required header for this request: Content-Md5.</Message></Error>"
)


@contextmanager
def wanting_md5(endpoint: str) -> Iterator[str]:
    """Run a proxy before an S3 server. It refuses deletions without a correct Content-MD5."""
    place = urlsplit(endpoint).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            digest = base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()
            deletes = self.command == "POST" and "delete" in urlsplit(self.path).query
            if deletes and self.headers.get("Content-MD5") != digest:
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

        do_GET = do_PUT = do_POST = do_DELETE = _answer  # noqa: N815 - http.server's names

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_objects_are_deleted_where_content_md5_is_wanted(settings: Settings) -> None:
    assert settings.s3_endpoint_url is not None
    with wanting_md5(settings.s3_endpoint_url) as endpoint:
        through = settings.model_copy(update={"s3_endpoint_url": endpoint})
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
