"""Absolute addresses of this farm, and signed addresses of images, which need no key."""

from __future__ import annotations

import math
import threading
import time
import uuid
from collections.abc import Callable

from fastapi import Request

from farm.context import Farm
from farm.domain.image_formats import FORMATS, Format
from farm.domain.signed_addresses import (
    SignedFrame,
    SignedJob,
    SignedThumbnail,
    read,
    read_job,
    read_thumbnail,
    sign,
    sign_thumbnail,
    until_of,
)
from farm.errors import NotFound, Unauthenticated, Unavailable
from farm.services import thumbnails
from farm.storage import ArtifactName
from farm.store import signing_secrets
from farm.store.engine import transaction

SECRETS_SECONDS, RETRY_SECONDS = 10.0, 1.0
"""Time after which the secrets are read again, and after a failure. Seconds.

Replaced secrets end after it, unless Postgres does not answer: then no image is sent either.
"""
THUMBNAIL_SECONDS = 8 * 3600
"""Time for which addresses of thumbnails live, in seconds. Pages that update themselves have newer
ones each hour."""
CLOCKS_SECONDS = 60
"""Largest difference between the clocks of two API processes that is allowed for, in seconds."""
UNKNOWN = "This address is unknown or has ended. Ask the farm for a new one."

Address = Callable[[uuid.UUID, int, Format], str | None]
"""Returns the signed address of a frame's image. None: the farm gives none."""
ThumbnailAddress = Callable[[ArtifactName, int, int], str]
"""Returns the signed address of the thumbnail of an image, from its width and height in pixels."""


class SignedAddresses:
    """Signs addresses of images, and reads them. Several threads share it."""

    def __init__(self, farm: Farm) -> None:
        self._farm = farm
        self._secrets: dict[int, bytes] = {}
        self._due_at = -math.inf
        self._lock = threading.Lock()

    @property
    def are_due(self) -> bool:
        """True if `refresh` has something to do: it may take a query."""
        return not self._secrets or time.monotonic() >= self._due_at

    def refresh(self) -> None:
        """Read the secrets if they are due. Others use the earlier ones until then.

        Raises:
            Unavailable: Postgres does not answer, and none were ever read.
        """
        if not self.are_due or not self._lock.acquire(blocking=not self._secrets):
            return
        try:
            if time.monotonic() >= self._due_at:
                self._due_at = time.monotonic() + RETRY_SECONDS
                with transaction(self._farm.store) as connection:
                    self._secrets = signing_secrets.load(connection)
                self._due_at = time.monotonic() + SECRETS_SECONDS
        except Unavailable:
            if not self._secrets:
                raise
        finally:
            self._lock.release()
        if not self._secrets:
            raise Unavailable("Postgres does not answer.")

    def of_request(self, request: Request) -> Address:
        """Return the function that gives addresses for the response to a request.

        Raises:
            Unavailable: Postgres does not answer.
        """
        if self._farm.settings.signed_url_seconds:
            self.refresh()
        return self.at(public_url(request))

    def at(self, base: str) -> Address:
        """Return the function that gives addresses that begin with `base`.

        It asks nobody: `refresh` must have been called.
        """
        seconds = self._farm.settings.signed_url_seconds
        if not seconds:
            return lambda *_: None
        number, secret = self.newest_secret
        until = until_of(time.time(), seconds)

        def address(job_id: uuid.UUID, ordinal: int, form: Format) -> str:
            token = sign(SignedFrame(job_id, ordinal, until), number, secret)
            return f"{base}/p/{token}.{FORMATS[form].extension}"

        return address

    @property
    def newest_secret(self) -> tuple[int, bytes]:
        """Number and value of the secret that signs. `refresh` must have been called."""
        return max(self._secrets.items())

    def watched_job(self, token: str) -> SignedJob:
        """Return the job that a token lets its holder watch. It asks nobody.

        Raises:
            Unauthenticated: It is no token, or its time is over.
        """
        job = read_job(token, self._secrets)
        if job is None or job.until <= time.time():
            raise Unauthenticated("token: unknown or expired. Get a new one from your backend.")
        return job

    def frame_of(self, token: str) -> SignedFrame:
        """Return the frame of a token. It asks nobody.

        Raises:
            NotFound: It is no token, its time is over, or it lives longer than the farm allows now.
        """
        frame = read(token, self._secrets)
        now, seconds = time.time(), self._farm.settings.signed_url_seconds
        latest = until_of(now + CLOCKS_SECONDS, seconds) if seconds else 0
        if frame is None or not now < frame.until <= latest:
            raise NotFound(UNKNOWN)
        return frame

    def thumbnails(self) -> ThumbnailAddress:
        """Return the function that gives addresses of thumbnails, for a page of this server.

        Raises:
            Unavailable: Postgres does not answer.
        """
        self.refresh()
        number, secret = self.newest_secret
        now = time.time()

        def address(name: ArtifactName, width: int, height: int) -> str:
            small = thumbnails.is_small(width, height)
            # Otherwise all thumbnails of all pages would be fetched again at the same second.
            until = until_of(now, THUMBNAIL_SECONDS, name.job_id.int)
            image = SignedThumbnail(*name[:5], small, until)
            return f"/pictures/{sign_thumbnail(image, number, secret)}"

        return address

    def thumbnail_of(self, token: str) -> SignedThumbnail:
        """Return the image whose thumbnail a token gives. It asks nobody.

        Raises:
            NotFound: It is no token, or its time is over.
        """
        image = read_thumbnail(token, self._secrets)
        now = time.time()
        latest = now + CLOCKS_SECONDS + THUMBNAIL_SECONDS * 9 / 8
        if image is None or not now < image.until <= latest:
            raise NotFound(UNKNOWN)
        return image


def public_url(request: Request) -> str:
    """Return the address at which clients reach the API, without a slash at its end."""
    settings = request.app.state.farm.settings
    return settings.public_url or str(request.base_url).rstrip("/")
