"""Orderly end on SIGINT, SIGTERM and SIGHUP."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt in the block on Ctrl-C, SIGTERM and a closed terminal.

    Ctrl-C works even if it was ignored before, as shells do for background processes.
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
