"""Signed addresses: their tokens name a frame or a job and an end, and need no key.

A token of a frame is base64 (RFC 4648, section 5) of 45 bytes: the number of the secret (1), the
job's ID (16), the ordinal (8) and the end in Unix seconds (4), in network byte order, and the first
16 bytes of their HMAC-SHA256. A token of a job has no ordinal. It lets its holder watch the job.
A token of a thumbnail has all that the key of its object has, so that it is found without a query.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import struct
import uuid
from collections.abc import Mapping
from typing import Any, NamedTuple

from farm.domain.image_formats import Format

PAYLOAD = struct.Struct(">B16sQI")
OF_JOB = struct.Struct(">B16sI")
OF_THUMBNAIL = struct.Struct(">B16s16sQ32sBBI")
MAC_BYTES = 16
TOKEN_CHARS = (PAYLOAD.size + MAC_BYTES) * 4 // 3
THUMBNAIL_CHARS = (OF_THUMBNAIL.size + MAC_BYTES + 2) // 3 * 4
CODES: dict[Format, int] = {"png": 0, "jpeg": 1, "webp": 2}
"""Number of each format in a token. It never changes: tokens live for hours."""
FORMS = {code: form for form, code in CODES.items()}
PURPOSE, WATCHING, SEEING = b"farm picture 1 ", b"farm watch 1 ", b"farm thumbnail 1 "
"""Texts before each payload, so that a secret signs nothing else in the same way."""


class SignedFrame(NamedTuple):
    """A frame whose image a token gives."""

    job_id: uuid.UUID
    ordinal: int
    until: int
    """End of the address, in Unix seconds."""


def until_of(now: float, seconds: int, shift: int = 0) -> int:
    """Choose the end of an address that is made now, in Unix seconds.

    It lives for `seconds` at least, and for an eighth of it more at most. Within such an eighth all
    addresses of an image are the same, so that browsers find it in their caches. Those of images
    with another `shift` change at another time.
    """
    step = max(1, seconds // 8)
    shift %= step
    return ((int(now) - shift) // step + 1) * step + shift + seconds


class SignedJob(NamedTuple):
    """A job that a token lets its holder watch."""

    job_id: uuid.UUID
    until: int
    """End of the token, in Unix seconds."""


class SignedThumbnail(NamedTuple):
    """An image whose thumbnail a token gives."""

    tenant_id: uuid.UUID
    job_id: uuid.UUID
    ordinal: int
    sha256: bytes
    form: Format
    is_small: bool
    """True if its thumbnail is made each time."""
    until: int
    """End of the address, in Unix seconds."""


def sign(frame: SignedFrame, number: int, secret: bytes) -> str:
    """Return the token of a frame, signed with the secret of this number, 0 to 255."""
    payload = PAYLOAD.pack(number, frame.job_id.bytes, frame.ordinal, frame.until)
    return _text(payload + _mac(PURPOSE, secret, payload))


def sign_job(job: SignedJob, number: int, secret: bytes) -> str:
    """Return the token of a job, signed with the secret of this number, 0 to 255."""
    payload = OF_JOB.pack(number, job.job_id.bytes, job.until)
    return _text(payload + _mac(WATCHING, secret, payload))


def sign_thumbnail(image: SignedThumbnail, number: int, secret: bytes) -> str:
    """Return the token of a thumbnail, signed with the secret of this number, 0 to 255."""
    payload = OF_THUMBNAIL.pack(
        number,
        image.tenant_id.bytes,
        image.job_id.bytes,
        image.ordinal,
        image.sha256,
        CODES[image.form],
        image.is_small,
        image.until,
    )
    return _text(payload + _mac(SEEING, secret, payload))


def read(token: str, secrets: Mapping[int, bytes]) -> SignedFrame | None:
    """Return the frame of a token. None: it is no token, or none of these secrets signed it."""
    found = _signed(token, PAYLOAD, PURPOSE, secrets)
    return None if found is None else SignedFrame(uuid.UUID(bytes=found[1]), found[2], found[3])


def read_job(token: str, secrets: Mapping[int, bytes]) -> SignedJob | None:
    """Return the job of a token. None: it is no token, or none of these secrets signed it."""
    found = _signed(token, OF_JOB, WATCHING, secrets)
    return None if found is None else SignedJob(uuid.UUID(bytes=found[1]), found[2])


def read_thumbnail(token: str, secrets: Mapping[int, bytes]) -> SignedThumbnail | None:
    """Return the image of a token. None: it is no token, or none of these secrets signed it."""
    found = _signed(token, OF_THUMBNAIL, SEEING, secrets)
    if found is None:
        return None
    _, tenant, job, ordinal, sha256, form, small, until = found
    if form not in FORMS:  # a newer version signed it
        return None
    tenant_id, job_id = uuid.UUID(bytes=tenant), uuid.UUID(bytes=job)
    return SignedThumbnail(tenant_id, job_id, ordinal, sha256, FORMS[form], bool(small), until)


def _signed(
    token: str, form: struct.Struct, purpose: bytes, secrets: Mapping[int, bytes]
) -> tuple[Any, ...] | None:
    """Return the parts of a token, the number of its secret first."""
    try:
        raw = base64.b64decode(token.encode("ascii"), b"-_", validate=True)
        payload, mac = raw[: form.size], raw[form.size :]
        parts = form.unpack(payload)
    except (UnicodeEncodeError, binascii.Error, struct.error):
        return None
    secret = secrets.get(parts[0])
    if _text(raw) != token:  # one frame, one end: one address
        return None
    if secret is None or not hmac.compare_digest(mac, _mac(purpose, secret, payload)):
        return None
    return parts


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode()


def _mac(purpose: bytes, secret: bytes, payload: bytes) -> bytes:
    return hmac.digest(secret, purpose + payload, "sha256")[:MAC_BYTES]
