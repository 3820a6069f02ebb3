"""Signatures of webhooks, as Standard Webhooks has them (standardwebhooks.com, version 1).

A signature is `v1,` and the base64 of the HMAC-SHA256 of `ID.TIME.BODY`. The secret is shown as
`whsec_` and the base64 of its bytes.
"""

from __future__ import annotations

import base64
import hmac
import secrets
from collections.abc import Iterable

SECRET_BYTES = 24
PREFIX = "whsec_"


def new_secret() -> bytes:
    """Return a new secret."""
    return secrets.token_bytes(SECRET_BYTES)


def shown(secret: bytes) -> str:
    """Return a secret as its owner gets it. Standard base64: some verifiers read no other."""
    return PREFIX + base64.b64encode(secret).decode()


def signature(message_id: str, seconds: int, body: bytes, keys: Iterable[bytes]) -> str:
    """Return the header `webhook-signature`: one signature for each valid secret."""
    content = f"{message_id}.{seconds}.".encode() + body
    signed = (hmac.digest(key, content, "sha256") for key in keys)
    return " ".join("v1," + base64.b64encode(each).decode() for each in signed)


def signed_headers(
    message_id: str, seconds: int, body: bytes, keys: Iterable[bytes]
) -> dict[str, str]:
    """Return the headers of an attempt. `seconds` is its Unix time."""
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(seconds),
        "webhook-signature": signature(message_id, seconds, body, keys),
        "content-type": "application/json",
    }
