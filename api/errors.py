"""Error responses: RFC 9457 problems. This is the only module that builds them."""

from __future__ import annotations

import json
import logging
import math
import uuid
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.dashboard.html import PAGE_HEADERS, address_of, render, sender_of, wants_html
from api.request_rates import RATE, Rate, Taken
from farm.domain.inputs import BadLines
from farm.errors import (
    FarmError,
    InvalidRequest,
    Limit,
    LimitExceeded,
    Unauthenticated,
    Unavailable,
)

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_SECONDS = 2
REPEATABLE = {"GET", "HEAD", "OPTIONS", "PUT", "DELETE"}
"""Methods of calls that may be repeated (RFC 9110, section 9.2.2)."""
NAMED_BY = {
    "/v1/jobs": ("idempotency-key",),
    "/openai/v1/images/generations": ("idempotency-key", "x-stainless-retry-count"),
}
"""Paths of submissions, and the headers of those that may be repeated: they get the same job."""
NEVER_AGAIN = {"x-should-retry": "false"}
REQUESTS = "requests_a_second"
"""Name of the limit of requests."""
LIMIT_SECONDS = 30
"""Seconds after which a client that met a limit should try again. When others end is not known."""

KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
"""`error.type` of each status, as public clients know it. For others the first digit decides."""


class ProblemResponse(JSONResponse):
    """A problem as an HTTP response."""

    media_type = MEDIA_TYPE

    def render(self, content: Any) -> bytes:
        """Encode a problem. Text that UTF-8 cannot encode is replaced."""
        return json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")


def error_body(error: FarmError) -> dict[str, str | None]:
    """Return the `error` object of a problem, for one of several answers in a response."""
    body: dict[str, str | None] = problem(error.status, error.code, error.message, error.param)[
        "error"
    ]
    return body


def problem(
    status: int, code: str, detail: str, param: str | None = None, **more: Any
) -> dict[str, Any]:
    """Build a problem, with the `error` object that public clients show."""
    kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {
        "type": f"urn:farm:problem:{code}",
        "title": code.replace("_", " ").capitalize(),
        "status": status,
        "detail": detail,
        "error": {"message": detail, "type": kind, "code": code, "param": param},
        **more,
    }


def _answer(
    request: Request, content: dict[str, Any], headers: Mapping[str, str] | None = None
) -> Response:
    status = content["status"]
    if wants_html(request):
        page = render("problem.html", problem=content, back=sender_of(request))
        return HTMLResponse(page, status, headers={**PAGE_HEADERS, **(headers or {})})
    return ProblemResponse(content, status, headers=headers)


def farm_error(request: Request, error: Exception) -> Response:
    """Return the response for an error of the farm."""
    assert isinstance(error, FarmError)
    if "token" in request.query_params and error.status in (429, 503) and _is_stream(request):
        return _ended_stream(error)
    headers = _should_retry(request, error)
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = 'Bearer realm="farm"'
    if "token" in request.query_params:  # a page of any site sent it, and may read the error
        headers["Access-Control-Allow-Origin"] = "*"
    if isinstance(error, Unavailable) and headers["x-should-retry"] == "true":
        headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    if isinstance(error, LimitExceeded) and error.limit:
        headers |= _limit_fields(error.limit)
    if error.status >= 500:
        log.error("Request %s: %s", request_id(request), error.message)
    more: dict[str, Any] = {}
    if isinstance(error, BadLines):
        more = {"lines": error.problems}
    elif isinstance(error, LimitExceeded) and error.limit:
        more = {"limit": limit_body(error.limit)}
    if isinstance(error, Unauthenticated) and wants_html(request) and not _is_api(request):
        page = render("sign_in.html", problem=error.message, back=address_of(request))
        return HTMLResponse(page, error.status, headers={**PAGE_HEADERS, **headers})
    content = problem(error.status, error.code, error.message, error.param, **more)
    return _answer(request, content, headers)


def _should_retry(request: Request, error: FarmError) -> dict[str, str]:
    """Tell clients whether to repeat a call. Some do so by themselves, without a key.

    `false` for a call that may have stored something before its error, unless it has a key.
    """
    if isinstance(error, LimitExceeded):
        again = error.limit is None or error.limit.fits_later
    elif not error.retryable:
        again = False
    elif isinstance(error, Unavailable) and not error.is_undecided:
        again = True
    else:
        again = is_repeatable(request)
    return {"x-should-retry": "true" if again else "false"}


def is_repeatable(request: Request) -> bool:
    """Return True if the same request can be sent again and do no harm."""
    return request.method in REPEATABLE or any(
        header in request.headers for header in NAMED_BY.get(request.url.path, ())
    )


def _is_api(request: Request) -> bool:
    return request.url.path.startswith(("/v1/", "/openai/"))


def _is_stream(request: Request) -> bool:
    return "text/event-stream" in request.headers.get("accept", "").lower()


def _ended_stream(error: FarmError) -> Response:
    """Return a stream that ends at once. A browser would never connect again after an error."""
    log.warning("A stream with a token was not opened: %s", error.message)
    headers = {"Access-Control-Allow-Origin": "*", "Cache-Control": "no-store"}
    text = f"retry: {RETRY_AFTER_SECONDS * 1000}\n\n"
    return Response(text, headers=headers, media_type="text/event-stream")


def limit_body(limit: Limit) -> dict[str, str | float]:
    """Return the `limit` object of a problem."""
    return {"name": limit.name, "value": limit.value, "used": limit.used}


def _limit_fields(limit: Limit) -> dict[str, str]:
    """Return the header fields of a limit, as draft-ietf-httpapi-ratelimit-headers-11 has them.

    Without Retry-After, if the same call can never succeed.
    """
    if limit.burst is not None:  # the quota is what may be sent in a window of seconds
        return {
            "RateLimit-Policy": _policy(limit.name, Rate(limit.value, limit.burst)),
            "RateLimit": f'"{limit.name}";r=0;t={limit.wait_seconds}',
            "Retry-After": str(limit.wait_seconds),
        }
    # Both are whole numbers in the draft.
    left, until = max(0, math.floor(limit.value - limit.used)), limit.wait_seconds
    fields = {
        "RateLimit-Policy": f'"{limit.name}";q={math.floor(limit.value)}',
        "RateLimit": f'"{limit.name}";r={left}' + (f";t={until}" if until else ""),
    }
    if not limit.fits_later:
        return fields
    return {**fields, "Retry-After": str(until or LIMIT_SECONDS)}


def _policy(name: str, rate: Rate) -> str:
    window = max(1, round(rate.burst / rate.per_second))
    return f'"{name}";q={rate.burst};w={window}'


def _rate_fields(rate: Rate, taken: Taken) -> list[tuple[bytes, bytes]]:
    """Return the header fields that tell what is left of the limit of a tenant's requests."""
    left = f'"{REQUESTS}";r={taken.left(rate)};t={math.ceil(taken.full_in)}'
    return [
        (b"ratelimit-policy", _policy(REQUESTS, rate).encode()),
        (b"ratelimit", left.encode()),
    ]


def _invalid(request: Request, error: Exception) -> Response:
    first = cast(RequestValidationError, error).errors()[0]
    param = ".".join(str(part) for part in first["loc"][1:]) or None
    message = f"{param}: {first['msg'].removeprefix('Value error, ').rstrip('.')}."
    return farm_error(request, InvalidRequest(message, param=param))


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = HTTPStatus(error.status_code).name.lower()
    detail = str(error.detail).rstrip(".")
    content = problem(error.status_code, code, f"{request.method} {request.url.path}: {detail}.")
    return _answer(request, content, {**NEVER_AGAIN, **(error.headers or {})})


def request_id(request: Request) -> str:
    """Return the ID of a request: it is in the logs and in the response's X-Request-Id header."""
    return str(request.scope.get("farm_request_id", "-"))


class Guard:
    """Middleware that gives every request an ID and turns an unexpected error into a plain 500."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        name = scope["farm_request_id"] = uuid.uuid4().hex
        started = False

        async def named(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", name.encode()),
                    (b"x-content-type-options", b"nosniff"),
                ]
                has = {field.lower() for field, _ in message["headers"]}
                if RATE in scope and b"ratelimit" not in has:
                    message["headers"] += _rate_fields(*scope[RATE])
            await send(message)

        try:
            await self.app(scope, receive, named)
        except Exception:
            log.exception("Request %s failed: %s %s", name, scope["method"], scope["path"])
            if started:
                raise
            detail = f"Internal error. The farm's log has the details under request {name}."
            content = problem(500, "internal_error", detail)
            await _answer(Request(scope), content, NEVER_AGAIN)(scope, receive, named)


def install(app: FastAPI) -> None:
    """Install the handlers that turn every error of an app into a problem."""
    app.add_exception_handler(FarmError, farm_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_middleware(Guard)
