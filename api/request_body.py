"""Reading a request's body, and parsing it as strict JSON. The front door limits its size."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from pydantic_core import from_json
from starlette.requests import ClientDisconnect

from farm.domain.numbers import whole
from farm.errors import MalformedBody


async def read_body(request: Request) -> bytes:
    """Read a body. The front door enforces its limits.

    Raises:
        MalformedBody: The connection ended before the body.
    """
    try:
        return await request.body()
    except ClientDisconnect as error:
        raise MalformedBody("The connection ended before the body did. Send it again.") from error


def parse_json(body: bytes) -> Any:
    """Parse JSON, without NaN, infinities or lone surrogates.

    Raises:
        MalformedBody: The body is not such JSON. The message has the line and the column.
    """
    try:
        return _whole(from_json(body, allow_inf_nan=False))
    except ValueError as error:
        raise MalformedBody(f"The body is not JSON: {error}.") from error


def _whole(value: Any) -> Any:
    """Convert every whole float in a value to an integer: 2.0 to 2."""
    if isinstance(value, dict):
        return {name: _whole(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_whole(each) for each in value]
    return whole(value)
