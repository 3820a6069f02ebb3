"""Signed addresses of images: their tokens name a frame and an end, and need no key.

A token is base64 (RFC 4648, section 5) of 45 bytes: the number of the secret (1), the job's ID
(16), the ordinal (8) and the end in Unix seconds (4), in network byte order, and the first 16 bytes
of their HMAC-SHA256.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import struct
import uuid
from collections.abc import Mapping
from typing import NamedTuple

PAYLOAD = struct.Struct(">B16sQI")
MAC_BYTES = 16
TOKEN_CHARS = (PAYLOAD.size + MAC_BYTES) * 4 // 3
PURPOSE = b"farm picture 1 "
"""Text before each payload, so that a secret signs nothing else in the same way."""


class SignedFrame(NamedTuple):
    """A frame whose image a token gives."""

    job_id: uuid.UUID
    ordinal: int
    until: int
    """End of the address, in Unix seconds."""


def until_of(now: float, seconds: int) -> int:
    """Choose the end of an address that is made now, in Unix seconds.

    It lives for `seconds` at least, and for an eighth of it more at most. Within such an eighth all
    addresses of an image are the same, so that browsers find it in their caches.
    """
    step = max(1, seconds // 8)
    return (int(now) // step + 1) * step + seconds


def sign(frame: SignedFrame, number: int, secret: bytes) -> str:
    """Return the token of a frame, signed with the secret of this number, 0 to 255."""
    payload = PAYLOAD.pack(number, frame.job_id.bytes, frame.ordinal, frame.until)
    return base64.urlsafe_b64encode(payload + _mac(secret, payload)).decode()


def read(token: str, secrets: Mapping[int, bytes]) -> SignedFrame | None:
    """Return the frame of a token. None: it is no token, or none of these secrets signed it."""
    try:
        raw = base64.b64decode(token.encode("ascii"), b"-_", validate=True)
        payload, mac = raw[: PAYLOAD.size], raw[PAYLOAD.size :]
        number, job_id, ordinal, until = PAYLOAD.unpack(payload)
    except (UnicodeEncodeError, binascii.Error, struct.error):
        return None
    secret = secrets.get(number)
    if base64.urlsafe_b64encode(raw).decode() != token:  # one frame, one end: one address
        return None
    if secret is None or not hmac.compare_digest(mac, _mac(secret, payload)):
        return None
    return SignedFrame(uuid.UUID(bytes=job_id), ordinal, until)


def _mac(secret: bytes, payload: bytes) -> bytes:
    return hmac.digest(secret, PURPOSE + payload, "sha256")[:MAC_BYTES]
