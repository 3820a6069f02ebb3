"""Ending in order on every signal that asks for an end."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Let SIGTERM and a closed terminal end the block as Ctrl-C does: by KeyboardInterrupt.

    Ctrl-C too where it was ignored, as a shell does for what it starts in the background.
    """

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    asked = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(sign, interrupt) for sign in asked]
    try:
        yield
    finally:
        for sign, handler in zip(asked, before, strict=True):
            signal.signal(sign, handler)
