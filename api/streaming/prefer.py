"""The header `Prefer: wait=SECONDS` (RFC 7240): a call that waits until a job has ended."""

from __future__ import annotations

import math
import re
from typing import Annotated

from fastapi import Header, Request

WAIT = re.compile(r"wait(?:\s*=\s*\"?([0-9]{1,9})\"?)?", re.ASCII | re.IGNORECASE)
VARY = {"Vary": "Prefer"}
PreferHeader = Annotated[
    str | None,
    Header(
        description="`wait=SECONDS`, such as wait=30: wait until there is something to return. A"
        " preference that is not understood is ignored"
    ),
]


def wait_asked(request: Request) -> int | None:
    """Return the seconds that a caller wants to wait, at most those that the farm allows.

    None: it does not want to wait. A preference that cannot be understood is ignored, as RFC 7240
    asks for. `wait` without a number means the longest time.
    """
    longest = math.floor(request.app.state.farm.settings.wait_seconds)
    for header in request.headers.getlist("prefer"):
        for preference in header.split(","):
            found = WAIT.fullmatch(preference.partition(";")[0].strip())
            if found:
                asked = longest if found[1] is None else int(found[1])
                return min(asked, longest) or None
    return None


def applied(seconds: int) -> dict[str, str]:
    """Return the headers of a response that waited, or would have waited, for these seconds."""
    return {**VARY, "Preference-Applied": f"wait={seconds}", "Cache-Control": "no-store"}
