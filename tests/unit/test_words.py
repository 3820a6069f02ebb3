"""The language of the project: no archaic words, and docstrings in one form."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXTS = (".py", ".sql", ".md", ".html", ".js", ".css", ".toml", ".txt", ".yml", ".yaml", "Makefile")
# ADRs are records, and this file has the list.
EXCEPT = ("docs/adr/", "tests/unit/test_words.py")
ARCHAIC = (
    "whoever", "whomever", "nought", "anew", "bear", "bears", "mend", "mends", "mended", "beside",
    "meanwhile", "for ever", "of its own", "in hand", "otherwise than", "thereof", "wherein",
    "whence", "hitherto", "lest",
)  # fmt: skip
FIRST_WORDS = {"What", "Whoever", "Where", "Whether"}
"""A docstring, a description or a help begins with the thing instead."""


@cache
def texts() -> dict[str, str]:
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
    )
    names = [name for name in listed.stdout.splitlines() if name.endswith(TEXTS)]
    paths = {name: ROOT / name for name in names if not name.startswith(EXCEPT)}
    return {name: path.read_text() for name, path in paths.items() if path.is_file()}


@cache
def trees() -> list[tuple[str, ast.Module]]:
    return [(name, ast.parse(text)) for name, text in texts().items() if name.endswith(".py")]


def attribute_docstrings(tree: ast.Module) -> Iterator[ast.Constant]:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for before, after in pairwise(body) if isinstance(body, list) else ():
            if isinstance(before, ast.Assign | ast.AnnAssign) and (text := text_of(after)):
                yield text


def text_of(node: ast.stmt) -> ast.Constant | None:
    value = node.value if isinstance(node, ast.Expr) else None
    return value if isinstance(value, ast.Constant) and isinstance(value.value, str) else None


def docstrings(tree: ast.Module) -> Iterator[ast.Constant]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from filter(None, map(text_of, node.body[:1]))
    yield from attribute_docstrings(tree)


def helps(tree: ast.Module) -> Iterator[ast.Constant]:
    """Texts of options and of fields: `help=`, `description=`, `summary=`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg in {"help", "description", "summary"}:
            for value in ast.walk(node.value):
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield value
                    break


def test_no_archaic_words() -> None:
    archaic = re.compile(rf"\b({'|'.join(ARCHAIC)})\b", re.IGNORECASE)
    found = [
        f"{name}:{number}: {match[0]}: {line.strip()[:100]}"
        for name, content in texts().items()
        for number, line in enumerate(content.splitlines(), 1)
        for match in archaic.finditer(line)
        # Its tables have the names of before.
        if not (name == "CHANGELOG.md" and line.startswith("|"))
    ]
    assert found == [], "\n".join(["", *found])


def test_texts_begin_with_the_thing() -> None:
    found = [
        f"{name}:{text.lineno}: {str(text.value)[:80]!r}"
        for name, tree in trees()
        for text in [*docstrings(tree), *helps(tree)]
        if re.match(r"\W*(\w*)", str(text.value))[1] in FIRST_WORDS  # type: ignore[index]
    ]
    assert found == [], "\n".join(["", *found])


def test_attribute_docstrings_are_sentences() -> None:
    """A capital first, a full stop last, and none that goes on in the next one."""
    found = [
        f"{name}:{text.lineno}: {str(text.value)[:80]!r}"
        for name, tree in trees()
        for text in attribute_docstrings(tree)
        if re.match(r"[a-z…]", str(text.value).strip()) or not str(text.value).strip().endswith(".")
    ]
    assert found == [], "\n".join(["", *found])


def test_the_checks_see_what_they_are_for() -> None:
    tree = ast.parse('A = 1\n"""one"""\ndef f(x=opt(help="What it is.")):\n    """Where."""\n')
    assert [text.value for text in attribute_docstrings(tree)] == ["one"]
    assert [text.value for text in docstrings(tree)] == ["Where.", "one"]
    assert [text.value for text in helps(tree)] == ["What it is."]
    assert len(texts()) > 400
