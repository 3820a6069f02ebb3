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
from farm.storage import Artifacts
from tests.integration.test_storages import front_of

TOKEN = "the pod's token"  # noqa: S105
XML = """<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">
<AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>{AccessKeyId}</AccessKeyId>
<SecretAccessKey>{SecretAccessKey}</SecretAccessKey><SessionToken>{Token}</SessionToken>
<Expiration>{Expiration}</Expiration></Credentials></AssumeRoleWithWebIdentityResult>
</AssumeRoleWithWebIdentityResponse>"""


@dataclass
class Issuer:
    """A server that gives short-lived keys, as a cloud does. Each of its keys is another."""

    url: str = ""
    asked: list[str] = field(default_factory=list)
    """What each caller showed: the body of its call, or its Authorization header."""

    def keys(self, shown: str) -> dict[str, str]:
        """Give keys for a minute. botocore renews keys that end so soon."""
        self.asked.append(shown)
        number = len(self.asked)
        return {
            "AccessKeyId": f"ROLE{number}",
            "SecretAccessKey": "secret",
            "Token": f"session-{number}",
            "Expiration": f"{datetime.now(UTC) + timedelta(minutes=1):%Y-%m-%dT%H:%M:%SZ}",
        }


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    made = Issuer()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # AWS STS: AssumeRoleWithWebIdentity
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            self._send(XML.format(**made.keys(body)))

        def do_GET(self) -> None:  # the agent of EKS Pod Identity, and of ECS
            self._send(json.dumps(made.keys(self.headers["Authorization"])))

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


def stored_twice(settings: Settings) -> list[str]:
    """Store two objects. Return the access key that signed each call."""
    assert settings.s3_endpoint_url is not None
    with front_of(settings.s3_endpoint_url) as front:
        artifacts = Artifacts(settings.model_copy(update={"s3_endpoint_url": front.url}))
        for key in ("role/a", "role/b"):
            artifacts.put(key, b"x")
        artifacts.delete_all(["role/a", "role/b"])
        artifacts.close()
    keys = []
    for headers in front.headers:
        [key] = re.findall(r"Credential=(\w+)/", headers["Authorization"])
        assert headers["X-Amz-Security-Token"] == key.replace("ROLE", "session-")
        keys.append(key)
    return keys


def test_a_role_of_the_service_account(
    settings: Settings, issuer: Issuer, token: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/farm")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(token))
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", issuer.url)
    keys = stored_twice(settings)
    assert len({*keys}) == len(keys) == 3  # renewed before each call, since they end soon
    assert "WebIdentityToken=the+pod%27s+token" in issuer.asked[0]
    assert "RoleArn=arn%3Aaws%3Aiam%3A%3A123456789012%3Arole%2Ffarm" in issuer.asked[0]


def test_a_role_from_an_agent_of_the_node(
    settings: Settings, issuer: Issuer, token: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{issuer.url}/v1/credentials")
    monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", str(token))
    keys = stored_twice(settings)
    assert len({*keys}) == len(keys) == 3
    assert issuer.asked[0] == TOKEN


def test_without_keys_and_without_a_role_the_error_says_so(
    settings: Settings, token: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(token.parent / "none"))
    artifacts = Artifacts(settings)
    with pytest.raises(Exception, match="Unable to locate credentials"):
        artifacts.put("role/a", b"x")
    artifacts.close()
