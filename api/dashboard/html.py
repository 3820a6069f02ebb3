"""HTML templates, and the headers of every page."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from farm.humanize import ago, count, duration, pace, percent, size

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

_templates = Environment(
    loader=PackageLoader("api.dashboard"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_templates.filters.update(
    ago=ago, count=count, duration=duration, pace=pace, percent=percent, size=size
)
# Part of the static files' URLs, so that a browser never mixes two versions.
_templates.globals["version"] = hashlib.sha256(
    b"".join(path.read_bytes() for path in sorted(STATIC.iterdir()))
).hexdigest()[:12]


def render(template: str, **values: Any) -> str:
    """Fill in a template. Every value is escaped."""
    return _templates.get_template(template).render(**values)
