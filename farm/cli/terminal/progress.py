"""Progress of long work: a live bar or spinner on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from farm.cli.terminal.console import SPINNER, err, note
from farm.humanize import count


@contextmanager
def counted(what: str, total: int, *, size: bool = False) -> Iterator[Callable[[int], None]]:
    """Show progress on standard error. Yields a function that adds to the count.

    Args:
        what: name of the work, such as `Downloading`.
        total: count at the end.
        size: True if bytes are counted.
    """
    if not err.is_terminal:
        yield _lines(what, total)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(complete_style="green", finished_style="green"),
        DownloadColumn() if size else MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda more: progress.advance(task, more)


def _lines(what: str, total: int) -> Callable[[int], None]:
    done = 0

    def count_more(more: int) -> None:
        nonlocal done
        before, done = done, done + more
        if total >= 10 and done * 10 // total > before * 10 // total:
            note(f"{what} {count(done)}/{count(total)}", None)

    return count_more


@contextmanager
def spinning(what: str) -> Iterator[Callable[[str], None]]:
    """Show a spinner on a terminal, and nothing elsewhere. Yields a function that adds details.

    Nothing else may be printed while the spinner runs: it owns its line.
    """
    if not err.is_terminal:
        yield lambda _more: None
        return
    with err.status(Text(f"{what} …"), spinner=SPINNER) as status:
        yield lambda more: status.update(Text.assemble(f"{what} … ", (more, "dim")))


@contextmanager
def busy(what: str) -> Iterator[Callable[[str], None]]:
    """Print a line that work is running; on a terminal, show a spinner instead.

    Yields a function that adds details.
    """
    if not err.is_terminal:
        note(f"{what} …", None)
    with spinning(what) as say_more:
        yield say_more
