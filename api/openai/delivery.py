"""Calls without an idempotency key: whether their callers got the answers. See ADR 44."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from anyio import CancelScope, create_task_group
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send


class Delivery(Response):
    """Sends a response, and then tells whether its caller got all of it."""

    def __init__(self, response: Response, ended: Callable[[bool], Awaitable[object]]) -> None:
        """Create it.

        Args:
            response: The response to send.
            ended: Called once, with True if the caller got its answer.
        """
        super().__init__(status_code=response.status_code)
        self._response = response
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        is_gone, is_sent = await _has_gone(receive), False

        async def noting(message: Message) -> None:
            nonlocal is_sent
            await send(message)
            is_last = message["type"] == "http.response.body" and not message.get("more_body")
            is_sent = is_sent or (is_last and not is_gone)

        async def watch() -> None:
            nonlocal is_gone
            while (await receive())["type"] != "http.disconnect":
                pass
            is_gone = True

        try:
            async with create_task_group() as group:
                group.start_soon(watch)
                await self._response(scope, receive, noting)
                group.cancel_scope.cancel()
        finally:
            with CancelScope(shield=True):
                # Who is asked to send the call again has no answer yet.
                again = self._response.headers.get("x-should-retry") == "true"
                await self._ended(is_sent and not again)


async def _has_gone(receive: Receive) -> bool:
    """Return True if the caller has gone already. The body of its call has been read."""
    with CancelScope() as scope:
        scope.cancel()
        message = await receive()
        return bool(message["type"] == "http.disconnect")
    return False
