"""Failpoints: places where a farm in development fails on purpose, so that its healing is seen.

`FARM_FAILPOINTS` holds them as `point=action:text`, separated by semicolons. A failpoint acts where
a prompt contains its text, so whoever submits a job chooses what fails:

    submit.committed=exit:EXIT; render.step=segfault:SEGFAULT; render.step=oom:BIG

Points: `submit.committed`, in the API between a job's commit and its bell; `render.step`, in a
worker at every step of a batch. They are refused unless `FARM_ENVIRONMENT` is `development`.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

POINTS = ("submit.committed", "render.step")


@dataclass(frozen=True)
class Failpoint:
    """Where to fail, how, and for which prompts."""

    point: str
    action: str
    text: str


def _segfault() -> None:
    ctypes.string_at(0)


def _hang() -> None:
    threading.Event().wait()


def _exit() -> None:
    os._exit(1)


def _run_out_of_memory() -> None:
    raise MemoryError("A failpoint says that there is no memory left.")


ACTIONS: Mapping[str, Callable[[], None]] = {
    "segfault": _segfault,
    "hang": _hang,
    "exit": _exit,
    "oom": _run_out_of_memory,
}


def parse(text: str) -> list[Failpoint]:
    """Read failpoints as `FARM_FAILPOINTS` holds them.

    Raises:
        ValueError: a point or an action is unknown, or a text is missing.
    """
    return [_parsed(part.strip()) for part in text.split(";") if part.strip()]


def _parsed(part: str) -> Failpoint:
    point, _, rest = part.partition("=")
    action, _, text = rest.partition(":")
    if point not in POINTS or action not in ACTIONS or not text:
        raise ValueError(
            f"failpoint {part!r}: write point=action:text, with a point of {', '.join(POINTS)} "
            f"and an action of {', '.join(ACTIONS)}"
        )
    return Failpoint(point, action, text)


def reach(failpoints: str, point: str, prompts: Sequence[str]) -> None:
    """Fail here if a failpoint of this point says so for one of the prompts.

    Raises:
        MemoryError: the action is `oom`; the others end or hold up the process.
    """
    for failpoint in parse(failpoints) if failpoints else ():
        if failpoint.point == point and any(failpoint.text in prompt for prompt in prompts):
            ACTIONS[failpoint.action]()
