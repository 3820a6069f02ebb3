"""Verify messages that the farm sent to a webhook, as Standard Webhooks describes it."""

from __future__ import annotations

import base64
import binascii
import hmac
import json
import time
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

from farm.domain.webhook_signatures import PREFIX, SECRET_BYTES, signature
from farm.errors import FarmError, InvalidRequest

TOLERANCE_SECONDS = 300


class Message(TypedDict):
    """A message about an event. docs/webhooks.md describes the data of each type."""

    type: str
    timestamp: str
    data: dict[str, Any]


class InvalidSignature(FarmError):
    """A message is not from the farm, or it was changed, or it is old. Answer with 401."""

    code = "invalid_signature"
    status = 401


def verify_webhook(
    body: bytes | str,
    headers: Mapping[str, str],
    secret: str | Iterable[str],
    *,
    tolerance_seconds: float = TOLERANCE_SECONDS,
) -> Message:
    """Check a message, and return it.

    Args:
        body: the raw body of the request, not parsed.
        headers: its headers, in upper or lower case.
        secret: the webhook's secret, such as `whsec_lGSudUtN…`; or several of them.
        tolerance_seconds: how far the sender's clock may be from yours.

    Raises:
        InvalidSignature: it must not be trusted.
        InvalidRequest: the secret is none.
    """
    found = {name.lower(): value for name, value in headers.items()}
    missing = [name for name in ("id", "timestamp", "signature") if f"webhook-{name}" not in found]
    if missing:
        raise InvalidSignature(f"The header webhook-{missing[0]} is missing.")
    try:
        sent = int(found["webhook-timestamp"])
    except ValueError:
        raise InvalidSignature("webhook-timestamp is not a number.") from None
    if abs(time.time() - sent) > tolerance_seconds:
        raise InvalidSignature(
            f"webhook-timestamp is more than {tolerance_seconds:g} s from this clock."
        )
    raw = body.encode() if isinstance(body, str) else body
    keys = [_key(each) for each in ([secret] if isinstance(secret, str) else secret)]
    right = signature(found["webhook-id"], sent, raw, keys).split()
    given = found["webhook-signature"].split()
    if not any(hmac.compare_digest(a.encode(), b.encode()) for a in right for b in given):
        raise InvalidSignature("No signature in webhook-signature matches the body.")
    message: Message = json.loads(raw)
    return message


def _key(secret: str) -> bytes:
    try:
        key = base64.b64decode(secret.removeprefix(PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) < SECRET_BYTES:  # an empty one would accept anybody's message
        raise InvalidRequest(
            "secret: it is not one of a webhook, which is whsec_ and base64. Example: "
            "whsec_lGSudUtNozNRuDdVVJrYn6/0h0EmPJBa.",
            param="secret",
        )
    return key
