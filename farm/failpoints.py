"""Failpoints: places where a farm in development fails on purpose, to test its recovery.

`FARM_FAILPOINTS` has the form `point=action:text`, separated by semicolons. A failpoint acts on
prompts that contain its text, so the person who submits a job chooses what fails. For example:

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
    """A place to fail, the kind of failure, and the text of the prompts it applies to."""

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
    raise MemoryError("Memory ran out, simulated by a failpoint.")


ACTIONS: Mapping[str, Callable[[], None]] = {
    "segfault": _segfault,
    "hang": _hang,
    "exit": _exit,
    "oom": _run_out_of_memory,
}


def parse(text: str) -> list[Failpoint]:
    """Parse failpoints in the form of `FARM_FAILPOINTS`.

    Raises:
        ValueError: a point or an action is unknown, or a text is missing.
    """
    return [_parsed(part.strip()) for part in text.split(";") if part.strip()]


def _parsed(part: str) -> Failpoint:
    point, _, rest = part.partition("=")
    action, _, text = rest.partition(":")
    if point not in POINTS or action not in ACTIONS or not text:
        raise ValueError(
            f"failpoint {part!r}: write point=action:text, for example render.step=oom:BIG. "
            f"Points: {', '.join(POINTS)}. Actions: {', '.join(ACTIONS)}"
        )
    return Failpoint(point, action, text)


def reach(failpoints: str, point: str, prompts: Sequence[str]) -> None:
    """Fail here if a failpoint of this point applies to one of the prompts.

    Raises:
        MemoryError: the action is `oom`. The other actions end or block the process.
    """
    for failpoint in parse(failpoints) if failpoints else ():
        if failpoint.point == point and any(failpoint.text in prompt for prompt in prompts):
            ACTIONS[failpoint.action]()
