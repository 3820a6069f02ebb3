"""Absolute addresses of this farm, and signed addresses of images, which need no key."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable

from fastapi import Request

from farm.context import Farm
from farm.domain.image_formats import FORMATS, Format
from farm.domain.signed_addresses import SignedFrame, read, sign, until_of
from farm.errors import NotFound
from farm.store import signing_secrets
from farm.store.engine import transaction

SECRETS_SECONDS = 60.0
"""Time for which the secrets are kept in memory, in seconds. Replaced ones end after it."""
UNKNOWN = "This address is unknown or has ended. Ask the farm for a new one."

Address = Callable[[uuid.UUID, int, Format], str | None]
"""Returns the signed address of a frame's image. None: the farm gives none."""


class SignedAddresses:
    """Signs addresses of images, and reads them. Several threads share it."""

    def __init__(self, farm: Farm) -> None:
        self._farm = farm
        self._secrets: dict[int, bytes] = {}
        self._fresh_until = 0.0
        self._lock = threading.Lock()

    def of_request(self, request: Request) -> Address:
        """Return the function that gives addresses for the response to a request.

        Raises:
            Unavailable: Postgres does not answer.
        """
        seconds = self._farm.settings.signed_url_seconds
        if not seconds:
            return lambda *_: None
        number, secret = max(self._current().items())
        base, until = public_url(request), until_of(time.time(), seconds)

        def address(job_id: uuid.UUID, ordinal: int, form: Format) -> str:
            token = sign(SignedFrame(job_id, ordinal, until), number, secret)
            return f"{base}/p/{token}.{FORMATS[form].extension}"

        return address

    def frame_of(self, token: str) -> SignedFrame:
        """Return the frame of a token.

        Raises:
            NotFound: It is no token, or its time is over.
            Unavailable: Postgres does not answer.
        """
        frame = read(token, self._current())
        if frame is None or frame.until <= time.time():
            raise NotFound(UNKNOWN)
        return frame

    def _current(self) -> dict[int, bytes]:
        with self._lock:
            if time.monotonic() >= self._fresh_until:
                with transaction(self._farm.store) as connection:
                    self._secrets = signing_secrets.load(connection)
                self._fresh_until = time.monotonic() + SECRETS_SECONDS
            return self._secrets


def public_url(request: Request) -> str:
    """Return the address at which clients reach the API, without a slash at its end."""
    settings = request.app.state.farm.settings
    return settings.public_url or str(request.base_url).rstrip("/")
