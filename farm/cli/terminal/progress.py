"""A bar for anything long that can be counted: live on a terminal, plain lines elsewhere."""

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

from farm.cli.terminal.console import SPINNER, count, err, note


@contextmanager
def counted(what: str, total: int, *, size: bool = False) -> Iterator[Callable[[int], None]]:
    """Show how far something is, on standard error; gives the function that counts so many more.

    Args:
        what: is done.
        total: to be counted.
        size: what is counted are bytes.
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
    """Turn a spinner on a terminal, and say nothing elsewhere; gives what says more.

    Nothing may be printed meanwhile: the spinner has its line for itself.
    """
    if not err.is_terminal:
        yield lambda _more: None
        return
    with err.status(Text(f"{what} …"), spinner=SPINNER) as status:
        yield lambda more: status.update(Text.assemble(f"{what} … ", (more, "dim")))


@contextmanager
def busy(what: str) -> Iterator[Callable[[str], None]]:
    """Say what takes a while, with a spinner on a terminal; gives the function that says more."""
    if not err.is_terminal:
        note(f"{what} …", None)
    with spinning(what) as say_more:
        yield say_more
