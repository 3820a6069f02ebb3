"""Waiting for a condition instead of sleeping for a guess."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

SLOWNESS = 3
"""How many times slower than a quiet machine with two cores a test's machine may be."""


def wait_until(condition: Callable[[], T], seconds: float, what: str) -> T:
    """Return the first true value of `condition`. Fail with the text `what` if it takes too long.

    Args:
        condition: called until its value is true.
        seconds: what it may take on a quiet machine.
        what: what is waited for, as the end of "while waiting until".
    """
    seconds *= SLOWNESS
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"timeout after {seconds:g} s while waiting until {what}")
        time.sleep(0.05)
    return value
