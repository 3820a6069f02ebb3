"""Following a job to its end: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol

import typer
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from farm.cli.console import SPINNER, STATUS_STYLES, clean, count, duration, err, note, plural
from farm.cli.exits import INTERRUPTED
from farm.cli.find import short
from farm.cli.workers import busyness
from farm.errors import FarmError
from farm.states import TERMINAL

if TYPE_CHECKING:
    from farm.cli.client import FarmClient, Job

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 1.0
"""Seconds between two looks at a job."""

PACE_SECONDS = 20.0


class Stalled(FarmError):
    """Nothing of a job moved for too long; the message says why it waits."""

    code = "stalled"


class Pace:
    """Frames a second over the last 20 seconds."""

    def __init__(self) -> None:
        self._marks: deque[tuple[float, int]] = deque()

    def mark(self, now: float, done: int) -> float | None:
        """Note how many frames are done; returns the pace, None while it is unknown."""
        self._marks.append((now, done))
        while len(self._marks) > 2 and now - self._marks[1][0] >= PACE_SECONDS:
            self._marks.popleft()
        (since, before) = self._marks[0]
        return (done - before) / (now - since) if now > since and done > before else None


class View(Protocol):
    """Shows a job as it stands."""

    def show(self, job: Job, pace: float | None, busy: str = "") -> None:
        """Show it; `pace` is in frames a second, `busy` the workers' share of work."""
        ...


def follow(client: FarmClient, job: Job, stalled_seconds: float | None = None) -> Job:
    """Show a job until it has ended; returns it as it then stands.

    Args:
        client: the farm.
        job: the job as last read.
        stalled_seconds: how long nothing of it may move; None for ever.

    Raises:
        Stalled: nothing moved for so long.
        typer.Exit: Ctrl-C; the job itself goes on.
    """
    try:
        with _view() as view:
            return _watch(client, job, view, stalled_seconds)
    except KeyboardInterrupt as error:
        name = short(job["id"])
        note(f"The job goes on: farm watch {name} shows it again, farm cancel {name} ends it.")
        raise typer.Exit(INTERRUPTED) from error


def _watch(client: FarmClient, job: Job, view: View, stalled_seconds: float | None) -> Job:
    pace, pause = Pace(), FIRST_PAUSE
    moved, seen = time.monotonic(), job["counts"]
    while True:
        now = time.monotonic()
        if job["counts"] != seen:
            moved, seen = now, job["counts"]
        workers = client.get("/v1/workers")["data"]
        view.show(job, pace.mark(now, finished(job)), busyness(workers, job["pipeline"]))
        if job["status"] in TERMINAL:
            return job
        if stalled_seconds is not None and now - moved > stalled_seconds:
            why = job["waiting_because"] or "A worker runs it, but finishes no frame."
            raise Stalled(f"Nothing moved for {duration(stalled_seconds)}. {why}")
        time.sleep(pause)
        pause = min(pause * 1.2, LONGEST_PAUSE)
        job = client.job(job["id"])


@contextmanager
def _view() -> Iterator[View]:
    if not err.is_terminal:
        yield Lines()
        return
    bar = Bar()
    with Live(bar, console=err, refresh_per_second=8, transient=True):
        yield bar


class Lines:
    """A line whenever the job's status, its tenth of progress, or why it waits has changed."""

    def __init__(self) -> None:
        self._shown: tuple[Any, ...] = ()

    def show(self, job: Job, pace: float | None, busy: str = "") -> None:
        """Print a line if there is something new."""
        why = job["waiting_because"]
        news = (job["status"], job["paused"], int(job["progress"] * 10), why)
        if news != self._shown:
            self._shown = news
            parts = (f"{short(job['id'])} {headline(job, pace)}", why, busy)
            note("  ".join(part for part in parts if part), None)


class Bar:
    """A bar over a line of counts, drawn again eight times a second."""

    def __init__(self) -> None:
        self._job: Job | None = None
        self._pace: float | None = None
        self._busy = ""
        self._spinner = Spinner(SPINNER, style="blue")

    def show(self, job: Job, pace: float | None, busy: str = "") -> None:
        """Take the job's newest state."""
        self._job, self._pace, self._busy = job, pace, busy

    def __rich__(self) -> Group | Text:
        """Draw it."""
        job = self._job
        if job is None:
            return Text()
        bar = ProgressBar(
            total=job["total"],
            completed=finished(job),
            width=40,
            complete_style="green",
            finished_style="green",
        )
        line = Table.grid(padding=(0, 1))
        line.add_row(self._spinner, Text(short(job["id"]), "bold"), bar, headline(job, self._pace))
        below = [text for text in (detail(job), self._busy) if text]
        lines = [Text(f"  {text}", "dim", no_wrap=True, overflow="ellipsis") for text in below]
        return Group(line, *lines)


def finished(job: Job) -> int:
    """How many of a job's frames are done with."""
    counts = job["counts"]
    return int(counts["succeeded"] + counts["dead"] + counts["cancelled"])


def headline(job: Job, pace: float | None) -> Text:
    """Write `running  12/24  3.1 frames/s  4.2 s left`."""
    status = "paused" if job["paused"] and job["status"] not in TERMINAL else job["status"]
    words = Text(status, STATUS_STYLES.get(status, ""))
    words.append(f"  {count(finished(job))}/{count(job['total'])}", "default")
    if job["status"] in TERMINAL:
        return words
    left = job["total"] - finished(job)
    if pace is not None:
        words.append(f"  {pace:.1f} frames/s  {duration(left / pace)} left", "default")
    elif job["eta_seconds"] is not None:
        words.append(f"  {duration(job['eta_seconds'])} left", "default")
    return words


def detail(job: Job) -> str:
    """Write the counts that are not nought, and why nothing runs."""
    counts = ", ".join(
        f"{count(number)} {name}" for name, number in job["counts"].items() if number
    )
    why = job["waiting_because"]
    return clean(f"{counts}. {why}" if why else counts)


def summary(job: Job) -> str:
    """Say what became of a job, in one sentence."""
    counts = job["counts"]
    done = f"{count(counts['succeeded'])} of {plural(job['total'], 'frame')}"
    seconds = _seconds(job)
    took = f" in {duration(seconds)}" if seconds is not None else ""
    rest = [f"{count(counts[name])} {name}" for name in ("dead", "cancelled") if counts[name]]
    return f"{job['status']}: {done}{took}" + (f" ({', '.join(rest)})" if rest else "")


def _seconds(job: Job) -> float | None:
    if not (job["started_at"] and job["finished_at"]):
        return None
    started, ended = (datetime.fromisoformat(job[name]) for name in ("started_at", "finished_at"))
    return (ended - started).total_seconds()
