"""Functions that print text and tables, and that format numbers and times.

Results go to standard output. Progress and errors go to standard error, so that a pipe receives
only results.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from farm.client.objects import JobData

# Emoji codes such as `:star:` are off too: prompts are shown exactly as written.
SHORT = 8
"""Number of characters of an ID in lists."""
out = Console(highlight=False, emoji=False)
err = Console(stderr=True, highlight=False, emoji=False)

Why = Annotated[str, typer.Option(help='Reason, stored with the action. Example: "ticket 7".')]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print JSON for scripts, one object per line.", show_default=False),
]

SPINNER = "dots" if err.encoding.lower().startswith("utf") else "line"

LAST_WIDTH = 12
"""Smallest width of the last column of a table, in characters."""
PIPE_WIDTH = 200
"""Width of a table in a pipe or a file, in characters."""

STATUS_STYLES = {
    "queued": "cyan",
    "running": "blue",
    "paused": "yellow",
    "succeeded": "green",
    "partial": "yellow",
    "failed": "red",
    "cancelled": "dim",
}


def emit(value: object) -> None:
    """Print JSON as one line of standard output."""
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    typer.echo(json.dumps(value, ensure_ascii=not utf8, default=str))


def say(text: str, style: str | None = None) -> None:
    """Print text to standard output, without markup and without wrapping."""
    out.print(clean(text), style=style, markup=False, soft_wrap=True)


def note(text: str, style: str | None = "dim") -> None:
    """Print a message that is not a result to standard error."""
    err.print(clean(text), style=style, markup=False, soft_wrap=True)


class Columns(Table):
    """A table whose cells are plain text: markup and control characters in them do nothing."""

    def add_row(self, *cells: RenderableType | None, **look: Any) -> None:
        """Add a row of cells. A `Text` keeps its style."""
        plain = (Text(clean(cell)) if isinstance(cell, str) else cell for cell in cells)
        super().add_row(*plain, **look)

    @property
    def least_width(self) -> int:
        """Width at which nothing but the last column is cut, in characters."""
        widths = [
            max(Text.from_markup(str(column.header)).cell_len, *map(_length, column.cells), 0) + 2
            for column in self.columns[:-1]
        ]
        return sum(widths) + LAST_WIDTH


def _length(cell: RenderableType) -> int:
    return cell.cell_len if isinstance(cell, Text) else 0


def columns(*names: str, right: tuple[str, ...] = ()) -> Columns:
    """Build a plain table with these columns. Those in `right` are aligned to the right.

    Only the last column shrinks on a narrow terminal: fill it with `tail(text)`. See `show_table`.
    """
    table = Columns(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in names:
        justify: JustifyMethod = "right" if name in right else "left"
        table.add_column(name, justify=justify, no_wrap=name != names[-1])
    return table


def tail(text: str) -> Text:
    """Build the last cell of a row, which is cut at the end of the terminal."""
    return Text(clean(text), no_wrap=True, overflow="ellipsis")


def show_table(table: Columns) -> None:
    """Print a table, as wide as the terminal, or PIPE_WIDTH wide without one.

    Where it does not fit, the terminal breaks its lines, and no ID or name is cut.
    """
    width = max(out.width if out.is_terminal else PIPE_WIDTH, table.least_width)
    Console(highlight=False, emoji=False, width=width).print(table)


def styled_status(job: JobData) -> Text:
    """Return a job's status, or `paused`, in its colour."""
    status = "paused" if job["paused"] and job["finished_at"] is None else job["status"]
    return Text(status, STATUS_STYLES.get(status, "default"))


def clean(text: str) -> str:
    """Make text safe for a terminal: replace control characters and direction overrides."""
    return "".join("\ufffd" if _harmful(char) else char for char in text)


def _harmful(char: str) -> bool:
    if unicodedata.category(char) == "Cc":
        return char not in "\n\t"
    return unicodedata.bidirectional(char) in {"LRO", "RLO", "LRE", "RLE", "PDF"}


def one_line(text: str, limit: int = 60) -> str:
    """Return the beginning of a text on one line, at most `limit` characters."""
    line = " ".join(clean(text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def program() -> str:
    """Return how to type this command: `farm` if it is on the PATH, else the path of its file."""
    file = Path(sys.argv[0])
    if shutil.which("farm") or file.name != "farm":
        return "farm"
    inside = file.resolve().is_relative_to(Path.cwd())
    return shlex.quote(str(file.resolve().relative_to(Path.cwd()) if inside else file.resolve()))


def short(job_id: str) -> str:
    """Return the first characters of an ID, as lists show it."""
    return job_id[:SHORT]
