"""HEAD for every path that has GET: the same response without its body."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ASKED = "farm.head"
"""Key of a request's scope: true if the request was HEAD."""


class Heads:
    """Middleware that passes HEAD to the app as GET, and drops the body of the response."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        await self.app({**scope, "method": "GET", ASKED: True}, receive, send_head)


def is_head(request: Request) -> bool:
    """Return True if a request that is handled as GET was HEAD."""
    return bool(request.scope.get(ASKED))


IsHead = Annotated[bool, Depends(is_head)]
