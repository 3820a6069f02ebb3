"""Shared answers: tabs that look at the same page share what is read for it, for a second.

Thirty dashboards on walls then cost as much as one. Answers are shared between visitors who may see
and do the same: those of one tenant with one role. What only one key sees, such as its saved views,
is not shared between keys.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any

from cachetools import TTLCache
from fastapi import Request
from fastapi.responses import Response

from api.dashboard.html import is_from_htmx, unchanged
from farm.store.keys import Caller

SECONDS = 1.0
MOST = 500
"""Answers that a process remembers."""


class SharedAnswers:
    """Answers to updates of pages. Any thread may use it."""

    def __init__(self) -> None:
        self._answers: TTLCache[Hashable, Response] = TTLCache(MOST, SECONDS)
        self._asking: dict[Hashable, threading.Lock] = {}
        self._lock = threading.Lock()
        self._changes = 0

    def get(self, whose: Hashable, build: Callable[[], Response]) -> Response:
        """Return the answer of this second. Of several callers one builds it, and others wait."""
        with self._lock:
            # An answer that was begun before a change is not that of a caller who comes after it.
            key = self._changes, whose
            answer = self._answers.get(key)
            if answer is not None:
                return answer
            asking = self._asking.setdefault(key, threading.Lock())
        try:
            with asking:
                with self._lock:
                    answer = self._answers.get(key)
                if answer is None:
                    answer = build()
                    if answer.status_code == 200:
                        with self._lock:
                            self._answers[key] = answer
                return answer
        finally:  # also if it is refused: addresses are many
            with self._lock:
                self._asking.pop(key, None)

    def clear(self) -> None:
        """Forget all answers: somebody has changed something, and wants to see it."""
        with self._lock:
            self._changes += 1
            self._answers.clear()


def shared(
    request: Request, caller: Caller, build: Callable[[], Response], *, by_key: bool = False
) -> Response:
    """Return a page, and for its updates the answer that the tabs of some visitors share.

    Args:
        request: The request.
        caller: The visitor.
        build: Reads what the page shows, and builds it with `html.show`. Of the visitor it may show
            the role, the tenant and the sight of every tenant.
        by_key: The page shows more of the visitor's key: only its tabs share the answer.
    """
    if not is_from_htmx(request):
        return build()
    answers: SharedAnswers = request.app.state.shared
    whose = caller.tenant_id, caller.home, caller.role, caller.everywhere
    own = caller.key_id if by_key else None
    key: tuple[Any, ...] = (*whose, own, str(request.url))
    return unchanged(request, answers.get(key, build))
