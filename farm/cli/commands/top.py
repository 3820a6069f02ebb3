"""`farm top`: the overview in a terminal, live: attention, lanes and workers. For operators."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from farm.cli.client import farm_client
from farm.cli.terminal.console import Json, columns, emit, one_line, out
from farm.cli.terminal.signals import interrupted_by_signals
from farm.domain.lane_speeds import seconds_until_empty
from farm.errors import FarmError, Forbidden, Unauthenticated
from farm.humanize import ago, count, duration, percent, utc

if TYPE_CHECKING:
    from farm.cli.client.http import FarmClient
    from farm.client.objects import Attention, HistoryPoint, Lane, LaneHistory, Worker

PRIORITIES = ("interactive", "normal", "bulk")
LEVELS = {"critical": "bold red", "warning": "yellow", "info": "cyan"}
STATES = {"rendering": "blue", "loading": "cyan", "failed": "bold red", "idle": "green"}
HISTORY: Mapping[str, str | int] = {"range": "15m", "points": 15}
ATTENTION_SHOWN = 8
BARS = "▁▂▃▄▅▆▇█"
LOOK_SECONDS = 0.5
"""Interval in which the size of the terminal is looked at, in seconds."""
LINES_AROUND = 9
"""Lines of a screen that are neither rows nor attention."""


@dataclass(frozen=True)
class Overview:
    """The farm now, as the API tells it."""

    attention: Sequence[Attention]
    lanes: Sequence[Lane]
    past: Mapping[str, LaneHistory]
    """The last 15 minutes of each lane."""
    workers: Sequence[Worker]


def top(
    every: Annotated[
        float, typer.Option(min=0.5, max=3600, metavar="SECONDS", help="Time between two updates.")
    ] = 2.0,
    once: Annotated[
        bool, typer.Option("--once", help="Print it once. So it is if the output is no terminal.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what needs attention, the lanes and the workers, live. Press q to leave it.

    It needs the key of an operator, or of a viewer that sees every tenant.

    Example: farm top --every 5
    """
    with farm_client() as client:
        if as_json:
            emit(vars(read(client)))
        elif once or not out.is_terminal:
            out.print(drawn(read(client), datetime.now(UTC), None))
        else:
            _live(client, every)


def read(client: FarmClient) -> Overview:
    """Ask the farm for its overview."""
    past = {each["pipeline"]: each for each in client.history(HISTORY)["lanes"]}
    return Overview(
        client.attention()["data"], client.lanes()["data"], past, client.workers()["data"]
    )


def _live(client: FarmClient, every: float) -> None:
    from rich.live import Live

    found, problem = read(client), ""
    live = Live(console=out, screen=True, auto_refresh=False)
    with interrupted_by_signals(), live as screen, _keys() as pressed:
        while True:
            due, size = time.monotonic() + every, None
            while (left := due - time.monotonic()) > 0:
                if size != out.size:
                    size = out.size
                    shown = drawn(found, datetime.now(UTC), size.height - bool(problem))
                    screen.update(Group(Text(problem, "bold red"), shown) if problem else shown)
                    screen.refresh()
                if "q" in pressed(min(left, LOOK_SECONDS)):
                    return
            try:
                found, problem = read(client), ""
            except (Unauthenticated, Forbidden):
                raise
            except FarmError as error:
                problem = one_line(f"{error.message} Trying again.", 160)


@contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Yield a function that waits for keys up to a time in seconds, and returns them.

    Keys are not shown. Ctrl-C interrupts, as ever.
    """
    if not sys.stdin.isatty():

        def no_keys(seconds: float) -> str:
            time.sleep(seconds)
            return ""

        yield no_keys
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)

    def keys(seconds: float) -> str:
        ready, _, _ = select.select([sys.stdin], [], [], seconds)
        return os.read(sys.stdin.fileno(), 1024).decode(errors="replace").lower() if ready else ""

    try:
        yield keys
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def drawn(found: Overview, now: datetime, height: int | None) -> RenderableType:
    """Draw an overview, with as many workers as fit into `height` lines. None: with all."""
    parts: list[RenderableType] = [_summary(found, now), Text()]
    attention = found.attention[:ATTENTION_SHOWN]
    for each in attention:
        words = one_line(each["sentence"], 160)
        parts.append(Text.assemble((f"{each['level']:<9}", LEVELS[each["level"]]), words))
    if more := len(found.attention) - len(attention):
        parts.append(Text(f"and {more} more on the page /", "dim"))
    if not attention:
        parts.append(Text("Nothing needs attention.", "green"))
    room = None
    if height is not None:
        room = max(1, height - LINES_AROUND - len(attention) - len(found.lanes))
    shown = sorted(found.workers, key=_worst_first)[:room]
    parts += [Text(), _lanes(found), Text(), _workers(shown)]
    if left := len(found.workers) - len(shown):
        parts.append(Text(f"and {count(left)} more", "dim"))
    return Group(*parts)


def _summary(found: Overview, now: datetime) -> Text:
    speeds = [_speed(found.past.get(lane["pipeline"])) for lane in found.lanes]
    waiting = sum(sum(lane["waiting"].values()) for lane in found.lanes)
    able = sum(lane["able"] for lane in found.lanes)
    alive = sum(lane["workers"] for lane in found.lanes)
    facts = (
        f"{60 * sum(speeds):.3g} frames/min",
        f"{count(waiting)} frames wait",
        f"{able} of {alive} workers can render",
        utc(now),
    )
    return Text.assemble(("Farm  ", "bold"), "   ".join(facts))


def _speed(past: LaneHistory | None) -> float:
    points = past["points"] if past else []
    return sum(each["frames_per_second"] for each in points) / len(points) if points else 0.0


def _lanes(found: Overview) -> Table:
    names = ("frames/min", "15 min", "empty in", "busy", "able", "")
    table = columns("lane", *PRIORITIES, *names, right=(*PRIORITIES, "frames/min", "busy", "able"))
    for lane in found.lanes:
        past = found.past.get(lane["pipeline"])
        points = past["points"] if past else []
        speed = _speed(past)
        busy = [each["busy"] for each in points if each["busy"] is not None]
        table.add_row(
            lane["pipeline"],
            *(count(lane["waiting"][name]) for name in PRIORITIES),
            f"{60 * speed:.3g}",
            bars([each["frames_per_second"] for each in points]),
            _empty_in(lane, points),
            percent(sum(busy) / len(busy) if busy else None),
            f"{lane['able']} of {lane['workers']}",
            _problem(lane),
        )
    return table


def _empty_in(lane: Lane, points: Sequence[HistoryPoint]) -> str:
    speeds = [each["frames_per_second"] for each in points]
    waiting, held = sum(lane["waiting"].values()), lane["hold"] is not None
    seconds = seconds_until_empty(waiting, speeds, able=lane["able"], held=held)
    return "" if seconds is None else duration(seconds)


def _problem(lane: Lane) -> Text:
    if hold := lane["hold"]:
        by = hold["by"] or "a key without a name"
        return Text(one_line(f"held by {by}: {hold['why']}", 60), "yellow")
    return Text(one_line(lane["problem"] or "", 60), "red")


def bars(numbers: Sequence[float]) -> str:
    """Draw numbers as bars of up to a line's height; empty if the terminal cannot show them."""
    most = max(numbers, default=0.0)
    if not out.encoding.lower().startswith("utf") or not most:
        return ""
    return "".join(BARS[round(each / most * (len(BARS) - 1))] for each in numbers)


def _worst_first(worker: Worker) -> tuple[bool, bool, str, str]:
    away = worker["state"] != "failed", worker["batch"] is None
    return (*away, worker["pipeline"], worker["name"])


def _workers(shown: Sequence[Worker]) -> Table:
    table = columns("worker", "state", "batch", "busy", "frames", "device", "seen", "problem")
    for each in shown:
        batch = each["batch"]
        state = "draining" if each["draining"] else each["state"]
        table.add_row(
            each["name"],
            Text(state, STATES.get(state, "yellow")),
            f"step {batch['step']} of {batch['steps']}" if batch else "",
            percent(each.get("busy")),
            count(each["succeeded"]),
            one_line(each["device"] or "", 30),
            ago(each["seen_at"]),
            Text(one_line(each["problem"] or "", 60), "red"),
        )
    return table
