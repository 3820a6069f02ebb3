"""Reading docs/pipelines.md in tests: its blocks of code and its tables."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "pipelines.md"
CONTROL = "0" * 64
"""ID of an uploaded image."""


@dataclass(frozen=True)
class Block:
    """A block of code."""

    language: str
    text: str
    line: int
    """Line number of its beginning."""

    def __str__(self) -> str:
        return f"{self.language}-line-{self.line}"


def blocks(language: str, page: Path = PAGE) -> list[Block]:
    """List all blocks of a language, in the page's order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(language, found[1], text.count("\n", 0, found.start(1)) + 1)
        for found in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


def executed(block: Block) -> dict[str, Any]:
    """Run a block of Python as a program. Return its names."""
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(block.text, str(block), "exec"), scope)
    return scope


def table_after(mark: str, page: Path = PAGE) -> list[list[str]]:
    """Read the rows of the table after a comment, without its header."""
    lines = page.read_text(encoding="utf-8").partition(f"{mark}\n")[2].splitlines()
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows[2:]


def _example_family() -> Block:
    return next(block for block in blocks("python") if "\nfamily = " in block.text)


EXAMPLE_FAMILY = _example_family()
"""Source of the page's example module, a whole family."""
