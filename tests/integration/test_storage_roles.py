"""Without keys of S3, a process gets short-lived ones by the role of its pod, and renews them."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pytest

from farm.config import Settings
from farm.errors import Unavailable
from farm.storage import Artifacts

TOKEN = "the pod's token"
XML = """<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">
<AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>{AccessKeyId}</AccessKeyId>
<SecretAccessKey>{SecretAccessKey}</SecretAccessKey><SessionToken>{Token}</SessionToken>
<Expiration>{Expiration}</Expiration></Credentials></AssumeRoleWithWebIdentityResult>
</AssumeRoleWithWebIdentityResponse>"""


@dataclass
class Cloud:
    """A server that gives keys for a minute, and a storage that takes everything.

    The storage of the other tests refuses sessions that it has not given itself.
    """

    url: str = ""
    asked: list[str] = field(default_factory=list)
    """The body of each call for keys, or its Authorization header."""
    stored: list[tuple[str, str]] = field(default_factory=list)
    """The access key and the session of each call of the storage."""

    def keys(self, shown: str) -> dict[str, str]:
        """Give keys, each time others. botocore renews keys that end so soon."""
        self.asked.append(shown)
        number = len(self.asked)
        return {
            "AccessKeyId": f"ROLE{number}",
            "SecretAccessKey": "secret",
            "Token": f"session-{number}",
            "Expiration": f"{datetime.now(UTC) + timedelta(minutes=1):%Y-%m-%dT%H:%M:%SZ}",
        }


@pytest.fixture
def cloud() -> Iterator[Cloud]:
    made = Cloud()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # AWS STS: AssumeRoleWithWebIdentity
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            self._send(XML.format(**made.keys(body)))

        def do_GET(self) -> None:  # the agent of EKS Pod Identity, and of ECS
            self._send(json.dumps(made.keys(self.headers["Authorization"])))

        def do_PUT(self) -> None:  # the storage
            self.rfile.read(int(self.headers["Content-Length"]))
            [key] = re.findall(r"Credential=(\w+)/", self.headers["Authorization"])
            made.stored.append((key, self.headers["X-Amz-Security-Token"]))
            self._send("")

        def _send(self, text: str) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        made.url = f"http://127.0.0.1:{server.server_port}"
        yield made
        server.shutdown()
        thread.join()


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Remove the keys of these tests, and write the token that a cluster mounts into a pod."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it remembers credentials
    path = tmp_path / "token"
    path.write_text(TOKEN)
    return path


def store_twice(settings: Settings, cloud: Cloud) -> None:
    """Store two images. Each call has new keys, since the last ones end soon."""
    artifacts = Artifacts(settings.model_copy(update={"s3_endpoint_url": cloud.url}))
    for key in ("role/a", "role/b"):
        artifacts.put(key, b"x")
    artifacts.close()
    assert len(cloud.stored) == 2
    for key, session in cloud.stored:
        assert session == key.replace("ROLE", "session-")
    assert len({*cloud.stored}) == 2


def test_a_role_of_the_service_account(
    settings: Settings, cloud: Cloud, token: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/farm")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(token))
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", cloud.url)
    store_twice(settings, cloud)
    assert "WebIdentityToken=the+pod%27s+token" in cloud.asked[0]
    assert "RoleArn=arn%3Aaws%3Aiam%3A%3A123456789012%3Arole%2Ffarm" in cloud.asked[0]


def test_a_role_from_an_agent_of_the_node(
    settings: Settings, cloud: Cloud, token: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{cloud.url}/v1/credentials")
    monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", str(token))
    store_twice(settings, cloud)
    assert cloud.asked[0] == TOKEN


def test_without_keys_and_without_a_role_the_error_says_so(
    settings: Settings, token: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(token.parent / "none"))
    artifacts = Artifacts(settings)
    with pytest.raises(Unavailable, match="there are no credentials"):
        artifacts.put("role/a", b"x")
    artifacts.close()
