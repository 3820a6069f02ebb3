"""HEAD wherever GET is: the same answer, less its body."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ASKED = "farm.head"
"""A key of a request's scope: whether it was HEAD"""


class Heads:
    """Lets the app answer HEAD as it answers GET, and keeps the body back."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        await self.app({**scope, "method": "GET", ASKED: True}, receive, send_head)


def is_head(request: Request) -> bool:
    """Whether a request that is answered as GET was HEAD."""
    return bool(request.scope.get(ASKED))


IsHead = Annotated[bool, Depends(is_head)]
