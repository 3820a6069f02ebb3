"""HTML templates, the headers of every page, and the answers to htmx, which updates pages."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from fastapi import Request
from fastapi.responses import HTMLResponse, Response
from jinja2 import Environment, PackageLoader, StrictUndefined

from farm.humanize import ago, count, duration, pace, percent, size, utc

STATIC = Path(__file__).parent / "static"

PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    # Not `no-referrer`: a browser would then hide its Origin, which sign-in and actions check.
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}

UPDATES = (0, 2, 5, 15, 60)
"""Intervals of updates that a visitor may choose, in seconds. 0: none."""
AUTOMATIC = "auto"
"""Choice of a visitor who leaves the interval to the pages."""
MOVING, LISTED, SUMMED = 2, 5, 30
"""Intervals of pages on which something moves, of lists, and of sums over days. Seconds."""

_templates = Environment(
    loader=PackageLoader("api.dashboard"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_templates.filters.update(
    ago=ago, count=count, duration=duration, pace=pace, percent=percent, size=size, utc=utc
)
# Part of the static files' URLs, so that a browser never mixes two versions.
_templates.globals["version"] = hashlib.sha256(
    b"".join(path.read_bytes() for path in sorted(STATIC.iterdir()) if path.is_file())
).hexdigest()[:12]
# Answers with errors are said by page.js, and the page stays as it is. Opened details stay open.
_templates.globals["htmx_config"] = json.dumps(
    {
        "noSwap": [204, 304, "4xx", "5xx"],
        "morphIgnore": ["data-htmx-powered", "open"],
        "includeIndicatorCSS": False,
    }
)
_templates.globals["vendored"] = [
    file
    for package in json.loads((STATIC / "vendor" / "vendor.json").read_text())
    for file in package["files"]
    if file["file"].endswith(".js")
]
_templates.globals["choices"] = (AUTOMATIC, *UPDATES)
_templates.globals["only_live"] = False


def render(template: str, **values: Any) -> str:
    """Fill in a template. Every value is escaped."""
    return _templates.get_template(template).render(**values)


def is_from_htmx(request: Request) -> bool:
    """Return True if htmx sends the request, and not a browser that opens an address."""
    return request.headers.get("hx-request") == "true"


def wants_html(request: Request) -> bool:
    """Return True if a browser opens the address; False if a script sends the request."""
    return "text/html" in request.headers.get("accept", "") and not is_from_htmx(request)


def updates_cookie(request: Request) -> str:
    """Return the name of the cookie with the interval of updates. Browsers share them by host."""
    return f"farm_updates_{request.url.port or 'default'}"


def show(request: Request, template: str, *, every: int = LISTED, **values: Any) -> Response:
    """Return a page, or for htmx its block `live`, with a tag of it: see `unchanged`.

    Runs in a thread: it takes milliseconds.

    Args:
        request: The request.
        template: File name of the template.
        every: Interval of the page's updates in seconds, unless the visitor has chosen one.
        values: Values of the template.
    """
    chosen = request.cookies.get(updates_cookie(request), AUTOMATIC)
    seconds = int(chosen) if chosen in map(str, UPDATES) else every
    path, query = request.url.path, request.url.query
    here = f"{path}?{query}" if query else path
    values = {**values, "here": here, "updates": seconds, "chosen_updates": chosen}
    headers = {**PAGE_HEADERS, "Vary": "HX-Request"}
    if not is_from_htmx(request):
        return HTMLResponse(render(template, **values), headers=headers)
    text = render(template, **values, only_live=True)
    headers["HX-PTag"] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return HTMLResponse(text, headers=headers)


def unchanged(request: Request, answer: Response) -> Response:
    """Return 304 in place of an answer that the browser has already."""
    tag = answer.headers.get("hx-ptag")
    if tag is None or request.headers.get("hx-ptag") != tag:
        return answer
    kept = {name: answer.headers[name] for name in (*PAGE_HEADERS, "Vary", "HX-PTag")}
    return Response(status_code=304, headers=kept)


def address_of(request: Request) -> str:
    """Return the address of a page without its host; of a form, that of the page that sent it."""
    if request.method != "GET":
        return sender_of(request)
    query = request.url.query
    return local(request.url.path + (f"?{query}" if query else ""))


def sender_of(request: Request) -> str:
    """Return the address of the page that sent a request, without its host."""
    try:
        found = urlsplit(request.headers.get("referer", ""))
    except ValueError:
        return "/"
    is_other = found.netloc != request.headers.get("host") or found.path.startswith("//")
    if is_other or found.path == request.url.path:  # the page of a refused form
        return "/"
    return local(urlunsplit(("", "", found.path or "/", found.query, "")))


MAX_BACK = 1000
"""Characters of an address to which signing in leads. Its form takes few bytes."""


def local(address: str) -> str:
    """Return an address of this server, or `/` if it is of another one, or too long."""
    return address if is_local(address) and len(address) <= MAX_BACK else "/"


def is_local(address: str) -> bool:
    """Return True if an address has no host."""
    begins = address.startswith("/") and not address.startswith("//")
    return begins and address.isprintable() and "\\" not in address
