"""The front door: limits on a request's body, checked before anything else reads the request.

A body has a maximum size, a minimum pace, and a place while it arrives. A caller with a valid key
uses the places of its tenant. Without a key only `/login` and `/logout` take a body, of a few KiB.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from anyio import fail_after
from fastapi import Request, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.auth import KNOWN, Callers, admit, credential_of
from api.errors import farm_error
from api.places import Places
from farm.config import Settings
from farm.errors import FarmError, TooLarge, TooSlow, Unauthenticated

SIGNING_IN = {"/login", "/logout"}
NO_KEY = "/p/"
"""Beginning of the paths that never look at a key."""
SIGNING_IN_BYTES = 4096
DRAINED = 4
"""A body over its limit is read up to this many times the limit, and the excess is discarded.

The sender then gets the error instead of a broken connection.
"""
FIRST_SECONDS = 30.0
"""Time that every body may take, in seconds."""
MIN_BYTES_PER_SECOND = 64 * 2**10
"""Minimum pace of a body: its time is FIRST_SECONDS plus its bytes divided by this."""
WITHOUT_KEY = 64
"""Maximum number of bodies that arrive at the same time from callers without a key."""
BODIES, BODIES_PER_TENANT = 256, 64
"""Maximum number of bodies that arrive at the same time with a key: in all, and per tenant."""


@dataclass
class Limits:
    """Limits of one body."""

    bytes: int
    """Maximum size of the body, in bytes."""
    drained: int
    """Maximum number of bytes that are read; those beyond `bytes` are discarded."""

    @classmethod
    def of(cls, path: str, settings: Settings) -> Limits:
        """Return the limits of the body of a call."""
        if path in SIGNING_IN or path.startswith(NO_KEY):
            return cls(SIGNING_IN_BYTES, DRAINED * SIGNING_IN_BYTES)
        if path == "/v1/inputs":  # its reader counts the unpacked bytes too
            return cls(2 * settings.max_input_bytes, 2 * settings.max_input_bytes)
        images = path == "/v1/images"
        most = settings.max_image_bytes if images else settings.max_body_bytes
        return cls(most, DRAINED * most)


class FrontDoor:
    """Middleware that admits requests with a body, and enforces limits while the body arrives."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._bodies = Places(BODIES, BODIES_PER_TENANT)
        self._without_key = Places(WITHOUT_KEY, WITHOUT_KEY)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http" or not _has_body(scope):
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        try:
            tenant = await self._tenant(request)
            places = self._bodies if tenant else self._without_key
            place = places.take(tenant, "bodies")
        except FarmError as error:
            await _refuse(request, error)(scope, receive, send)
            return
        limits = Limits.of(scope["path"], request.app.state.farm.settings)
        body = Body(request, receive, send, limits, place.give_back)
        try:
            await self.app(scope, body.receive, body.send)
        except FarmError:
            if body.refused is None:
                raise
        finally:
            place.give_back()
        await body.end()

    async def _tenant(self, request: Request) -> str | None:
        """Return the ID of the tenant that sends a request; None for a call that needs no key.

        Raises:
            Unauthenticated: The request has no valid key and no valid session.
            LimitExceeded: It came too soon after others of its tenant.
            Unavailable: Postgres does not answer.
        """
        if request.url.path in SIGNING_IN or request.url.path.startswith(NO_KEY):
            return None
        credential = credential_of(request)
        if credential is None:
            raise Unauthenticated("API key missing. Send the header `Authorization: Bearer <key>`.")
        callers: Callers = request.app.state.callers
        caller = await callers.ask(credential)
        await admit(request, caller)
        request.scope[KNOWN] = credential, caller
        return str(caller.tenant_id)


class Body:
    """A body that arrives, and the response if it breaks its limits."""

    def __init__(
        self,
        request: Request,
        receive: Receive,
        send: Send,
        limits: Limits,
        give_back: Callable[[], None],
    ) -> None:
        self.refused: FarmError | None = None
        self._request = request
        self._receive = receive
        self._send = send
        self._limits = limits
        self._give_back = give_back
        self._bytes = 0
        self._over = False
        self._began: float | None = None
        self._started = False

    async def receive(self) -> Message:
        """Return the next piece of the body.

        Raises:
            TooLarge: The body is larger than its limit.
            TooSlow: The body is slower than the minimum pace.
        """
        if self._over:
            return await self._receive()
        announced = self._request.headers.get("content-length", "")
        if announced.isdecimal() and (len(announced) > 18 or int(announced) > self._limits.drained):
            raise self._refusal(self._too_large())
        message = await self._next()
        while self._bytes > self._limits.bytes:
            if not message.get("more_body", False) or self._bytes > self._limits.drained:
                raise self._refusal(self._too_large())
            message = await self._next()
        return message

    async def _next(self) -> Message:
        now = time.monotonic()
        if self._began is None:
            self._began = now
        allowed = FIRST_SECONDS + self._bytes / MIN_BYTES_PER_SECOND
        try:
            with fail_after(max(0.0, self._began + allowed - now)):
                message = await self._receive()
        except TimeoutError:
            raise self._refusal(
                TooSlow("The body came too slowly. Use a faster connection.")
            ) from None
        self._bytes += len(message.get("body", b""))
        self._over = not message.get("more_body", False)
        if self._over:
            self._give_back()
        return message

    def _too_large(self) -> TooLarge:
        return TooLarge(
            f"The body is larger than the limit of {self._limits.bytes} bytes. Send less."
        )

    def _refusal(self, error: FarmError) -> FarmError:
        self.refused = error
        return error

    async def send(self, message: Message) -> None:
        """Send a response on, unless the body was refused before the response started."""
        if self.refused is None or self._started:
            self._started = True
            await self._send(message)

    async def end(self) -> None:
        """Send the error, if the body was refused."""
        if self.refused is not None and not self._started:
            answer = _refuse(self._request, self.refused)
            await answer(self._request.scope, self._receive, self._send)


def _has_body(scope: Scope) -> bool:
    names = dict(scope["headers"])
    return b"transfer-encoding" in names or names.get(b"content-length", b"0") != b"0"


def _refuse(request: Request, error: FarmError) -> Response:
    """Return the error response, which also closes the connection."""
    answer = farm_error(request, error)
    answer.headers["Connection"] = "close"
    return answer
