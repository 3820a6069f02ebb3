"""A request's body: read, and parsed as strict JSON; its limits are the front door's."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from pydantic_core import from_json
from starlette.requests import ClientDisconnect

from farm.domain.numbers import whole
from farm.errors import MalformedBody


async def read_body(request: Request) -> bytes:
    """Read a body, whose limits the front door watches.

    Raises:
        MalformedBody: it was cut short.
    """
    try:
        return await request.body()
    except ClientDisconnect as error:
        raise MalformedBody("The body was cut short.") from error


def parse_json(body: bytes) -> Any:
    """Parse JSON, without NaN, infinities or lone surrogates.

    Raises:
        MalformedBody: it is something else; the message tells the line and column.
    """
    try:
        return _whole(from_json(body, allow_inf_nan=False))
    except ValueError as error:
        raise MalformedBody(f"The body is not JSON: {error}.") from error


def _whole(value: Any) -> Any:
    """Make every 2.0 in it a 2."""
    if isinstance(value, dict):
        return {name: _whole(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_whole(each) for each in value]
    return whole(value)
