"""A request's body: read within its limit, and parsed as strict JSON."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from anyio import CapacityLimiter, WouldBlock
from fastapi import Request
from pydantic_core import from_json
from starlette.requests import ClientDisconnect

from api.auth import farm_of
from farm.errors import MalformedBody, TooLarge, Unavailable

DRAINED = 4
"""How many times its limit a body is read on, kept nowhere, so that its sender hears the refusal
instead of a broken connection."""


async def read_body(request: Request) -> bytes:
    """Read a body of at most `max_body_bytes` bytes; see read_within."""
    return await read_within(request, farm_of(request).settings.max_body_bytes)


async def read_within(request: Request, limit: int) -> bytes:
    """Read a body of at most `limit` bytes.

    Raises:
        TooLarge: it is larger.
        MalformedBody: it was cut short.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and (len(announced) > 18 or int(announced) > DRAINED * limit):
        raise TooLarge(f"The body is larger than the limit of {limit} bytes.")
    chunks: list[bytes] = []
    size = 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size <= limit:
                chunks.append(chunk)
            elif size > DRAINED * limit:
                break
    except ClientDisconnect as error:
        raise MalformedBody("The body was cut short.") from error
    if size > limit:
        raise TooLarge(f"The body is larger than the limit of {limit} bytes.")
    return b"".join(chunks)


@contextmanager
def admitted(limiter: CapacityLimiter, what: str) -> Iterator[None]:
    """Hold a place in the block, which somebody else may want.

    Raises:
        Unavailable: all are taken.
    """
    try:
        limiter.acquire_nowait()
    except WouldBlock:
        raise Unavailable(
            f"Too many {what} are being uploaded; send it again in a moment."
        ) from None
    try:
        yield
    finally:
        limiter.release()


def parse_json(body: bytes) -> Any:
    """Parse JSON, without NaN, infinities or lone surrogates.

    Raises:
        MalformedBody: it is something else; the message tells the line and column.
    """
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise MalformedBody(f"The body is not JSON: {error}.") from error
