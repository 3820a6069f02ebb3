"""Signing in to the dashboard: a key is exchanged for a session, which is stored in a cookie.

Scripts cannot read the cookie, forms of other sites cannot send it, and the key itself is not
stored.
"""

from __future__ import annotations

import json
from typing import Annotated
from urllib.parse import parse_qs, urlsplit

from fastapi import APIRouter, Depends, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from api.auth import (
    Credential,
    FarmDep,
    admitted_caller,
    caller_of,
    cookie_name,
    count_request,
    looker,
    operator,
    refuse_viewers,
    session_of,
)
from api.dashboard.html import (
    AUTOMATIC,
    PAGE_HEADERS,
    UPDATES,
    local,
    render,
    sender_of,
    updates_cookie,
    wants_html,
)
from api.request_body import read_body
from api.tenancy import about
from farm.errors import Forbidden, InvalidRequest, Unauthenticated
from farm.store import sessions
from farm.store.engine import transaction
from farm.store.keys import Caller

router = APIRouter(include_in_schema=False)

MAX_FIELDS = 4
DAY_SECONDS = 86_400.0


async def visitor(request: Request) -> Caller:
    """Return the caller of the request's session, as one of the tenant of the job in the path.

    Raises:
        Unauthenticated: There is no session, it has ended, or its key was revoked.
        LimitExceeded: The tenant sends too many requests.
    """
    session = session_of(request)
    if session is None:
        raise Unauthenticated("Sign in first.")
    return await about(request, await admitted_caller(request, session), None)


async def perhaps_visitor(request: Request) -> Caller | None:
    """Return the caller of the request's session, or None."""
    try:
        return await visitor(request)
    except Unauthenticated:
        return None


Visitor = Annotated[Caller, Depends(visitor)]
PerhapsVisitor = Annotated[Caller | None, Depends(perhaps_visitor)]


def same_origin(request: Request) -> None:
    """Refuse a request from a page of another site.

    Raises:
        Forbidden: The `Origin` header names another host.
    """
    if _host(request.headers.get("origin", "")) != request.headers.get("host"):
        raise Forbidden("The request came from a page of another site. Use the farm's own page.")


def _host(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc or None
    except ValueError:
        return None


def visiting_writer(caller: Visitor, _origin: Annotated[None, Depends(same_origin)]) -> Caller:
    """Require a session that may change jobs, and a request from the page itself."""
    refuse_viewers(caller)
    return caller


VisitingWriter = Annotated[Caller, Depends(visiting_writer)]


async def visiting_operator(
    caller: Visitor, _origin: Annotated[None, Depends(same_origin)]
) -> Caller:
    """Require an operator's session, and a request from the page itself."""
    return await operator(caller)


VisitingOperator = Annotated[Caller, Depends(visiting_operator)]


async def watching_operator(caller: Visitor) -> Caller:
    """Require an operator's session, for a page that changes nothing."""
    return await operator(caller)


WatchingOperator = Annotated[Caller, Depends(watching_operator)]


async def visiting_looker(caller: Visitor) -> Caller:
    """Require a session that sees every tenant."""
    return await looker(caller)


VisitingLooker = Annotated[Caller, Depends(visiting_looker)]


def sign_in_page(problem: str = "", status: int = 200, back: str = "/") -> HTMLResponse:
    """Build the sign-in page, which asks for a key, and leads to the address `back`."""
    page = render("sign_in.html", problem=problem, back=back)
    return HTMLResponse(page, status, headers=PAGE_HEADERS)


@router.post("/login", dependencies=[Depends(same_origin)])
def log_in(request: Request, farm: FarmDep, body: Annotated[bytes, Depends(read_body)]) -> Response:
    """Check a key, and store a new session in the browser's cookie."""
    try:
        caller = caller_of(farm, Credential(field_of(body, "key")))
    except Unauthenticated as error:
        if wants_html(request):
            return sign_in_page(error.message, error.status, local(field_of(body, "back")))
        raise
    count_request(request, caller)
    seconds = farm.settings.session_days * DAY_SECONDS
    with transaction(farm.store) as connection:
        session = sessions.open_session(connection, caller, seconds)
    response = done(request, to=local(field_of(body, "back")))
    response.set_cookie(
        cookie_name(request),
        session,
        max_age=int(seconds),
        httponly=True,
        samesite="lax",
        secure=request.url.scheme == "https",
    )
    return response


def field_of(form: bytes, name: str) -> str:
    """Return one field of a form; empty if the field is missing or the body is no form."""
    try:
        fields = parse_qs(form.decode("utf-8", "replace"), max_num_fields=MAX_FIELDS)
    except ValueError:
        return ""
    return fields.get(name, [""])[0].strip()


@router.post("/logout", dependencies=[Depends(same_origin)])
def log_out(request: Request, farm: FarmDep) -> Response:
    """End the session, and clear the pictures from the browser's cache."""
    session = session_of(request)
    if session is not None:
        with transaction(farm.store) as connection:
            sessions.end_session(connection, session.secret)
    response = done(request, to="/")
    response.delete_cookie(cookie_name(request), httponly=True, samesite="lax")
    response.headers["Clear-Site-Data"] = '"cache"'
    return response


@router.post("/updates", dependencies=[Depends(same_origin)])
def set_updates(request: Request, body: Annotated[bytes, Depends(read_body)]) -> Response:
    """Set the interval in which the pages of this browser are updated."""
    seconds = field_of(body, "seconds")
    allowed = (AUTOMATIC, *map(str, UPDATES))
    if seconds not in allowed:
        choices = ", ".join(allowed)
        raise InvalidRequest(f"seconds: use one of {choices}.", param="seconds")
    response = done(request)
    year = int(365 * DAY_SECONDS)
    response.set_cookie(updates_cookie(request), seconds, year, httponly=True, samesite="lax")
    return response


def done(request: Request, said: str = "", to: str = "") -> Response:
    """Return the response to an action.

    Args:
        request: The request of the action.
        said: The outcome in a sentence, which a page that stays says.
        to: Address that a browser opens next. Empty: the page that sent the request.
    """
    request.app.state.shared.clear()
    if wants_html(request):
        return RedirectResponse(to or sender_of(request), 303)
    news = {"changed": True, **({"said": {"text": said}} if said else {})}
    return Response(status_code=204, headers={"HX-Trigger": json.dumps(news)})
