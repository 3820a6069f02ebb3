"""Signing in to the page: a key is exchanged for a session, which a cookie holds.

No script reads the cookie, no other site sends it, and the key itself is kept nowhere.
"""

from __future__ import annotations

from typing import Annotated
from urllib.parse import parse_qs, urlsplit

from fastapi import APIRouter, Depends, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from api.auth import (
    WRITERS,
    Credential,
    FarmDep,
    caller_of,
    cookie_name,
    known_caller,
    session_of,
)
from api.dashboard.html import PAGE_HEADERS, render
from api.request_body import read_body
from farm.errors import Forbidden, Unauthenticated
from farm.store import sessions
from farm.store.engine import transaction
from farm.store.keys import Caller

router = APIRouter(include_in_schema=False)

MAX_FIELDS = 4
DAY_SECONDS = 86_400.0


def visitor(request: Request, farm: FarmDep) -> Caller:
    """Who looks at the page.

    Raises:
        Unauthenticated: nobody has signed in, the session has ended, or its key was revoked.
    """
    session = session_of(request)
    if session is None:
        raise Unauthenticated("Sign in first.")
    return known_caller(request, farm, session)


Visitor = Annotated[Caller, Depends(visitor)]


def same_origin(request: Request) -> None:
    """Refuse what another site's page sends."""
    if _host(request.headers.get("origin", "")) != request.headers.get("host"):
        raise Forbidden("Actions of this page are taken on this page only.")


def _host(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc or None
    except ValueError:
        return None


def visiting_writer(caller: Visitor, _origin: Annotated[None, Depends(same_origin)]) -> Caller:
    """Who may act on the page."""
    if caller.role not in WRITERS:
        raise Forbidden(f"A {caller.role} key may look, but not change anything.")
    return caller


VisitingWriter = Annotated[Caller, Depends(visiting_writer)]


def wants_html(request: Request) -> bool:
    """Whether a browser navigates here, rather than the page's own script asking."""
    return "text/html" in request.headers.get("accept", "")


def sign_in_page(problem: str = "", status: int = 200) -> HTMLResponse:
    """Ask for a key."""
    return HTMLResponse(render("sign_in.html", problem=problem), status, headers=PAGE_HEADERS)


@router.post("/login", dependencies=[Depends(same_origin)])
def log_in(request: Request, farm: FarmDep, body: Annotated[bytes, Depends(read_body)]) -> Response:
    """Take a key, and begin a session, which the visitor's cookie holds."""
    try:
        caller = caller_of(farm, Credential(_field(body, "key")))
    except Unauthenticated as error:
        if wants_html(request):
            return sign_in_page(error.message, error.status)
        raise
    seconds = farm.settings.session_days * DAY_SECONDS
    with transaction(farm.store) as connection:
        session = sessions.open_session(connection, caller, seconds)
    response = done(request)
    response.set_cookie(
        cookie_name(request),
        session,
        max_age=int(seconds),
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )
    return response


def _field(form: bytes, name: str) -> str:
    """Read one field of a form; empty where it has none, or is no form."""
    try:
        fields = parse_qs(form.decode("utf-8", "replace"), max_num_fields=MAX_FIELDS)
    except ValueError:
        return ""
    return fields.get(name, [""])[0].strip()


@router.post("/logout", dependencies=[Depends(same_origin)])
def log_out(request: Request, farm: FarmDep) -> Response:
    """End the visitor's session, and forget the pictures in the browser's cache."""
    session = session_of(request)
    if session is not None:
        with transaction(farm.store) as connection:
            sessions.end_session(connection, session.secret)
    response = done(request)
    response.delete_cookie(cookie_name(request), httponly=True, samesite="strict")
    response.headers["Clear-Site-Data"] = '"cache"'
    return response


def done(request: Request) -> Response:
    """End an action: a browser goes back to the page, the page's script is told so."""
    return RedirectResponse("/", 303) if wants_html(request) else Response(status_code=204)
