"""Signing in to the page: a cookie holds the key; no script reads it, no other site sends it."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import parse_qs, urlsplit

from fastapi import APIRouter, Depends, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from api.auth import WRITERS, FarmHere, caller_of, cookie_name, known_caller
from api.body import read_body
from api.html import PAGE_HEADERS, render
from farm.errors import Forbidden, Unauthenticated
from farm.store.keys import Caller

router = APIRouter(include_in_schema=False)

MOST_FIELDS = 4


def visitor(request: Request, farm: FarmHere) -> Caller:
    """Who looks at the page.

    Raises:
        Unauthenticated: nobody has signed in, or the key was revoked since.
    """
    key = request.cookies.get(cookie_name(request))
    if not key:
        raise Unauthenticated("Sign in first.")
    return known_caller(request, farm, key)


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
def log_in(
    request: Request, farm: FarmHere, body: Annotated[bytes, Depends(read_body)]
) -> Response:
    """Take a key, and keep it in the visitor's cookie."""
    key = _field(body, "key")
    try:
        caller_of(farm, key)
    except Unauthenticated as error:
        if wants_html(request):
            return sign_in_page(error.message, error.status)
        raise
    response = done(request)
    response.set_cookie(
        cookie_name(request),
        key,
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )
    return response


def _field(form: bytes, name: str) -> str:
    """Read one field of a form; empty where it has none, or is no form."""
    try:
        fields = parse_qs(form.decode("utf-8", "replace"), max_num_fields=MOST_FIELDS)
    except ValueError:
        return ""
    return fields.get(name, [""])[0].strip()


@router.post("/logout", dependencies=[Depends(same_origin)])
def log_out(request: Request) -> Response:
    """Forget the visitor's key, and the pictures in the browser's cache."""
    response = done(request)
    response.delete_cookie(cookie_name(request), httponly=True, samesite="strict")
    response.headers["Clear-Site-Data"] = '"cache"'
    return response


def done(request: Request) -> Response:
    """End an action: a browser goes back to the page, the page's script is told so."""
    return RedirectResponse("/", 303) if wants_html(request) else Response(status_code=204)
