"""Types: few `Any`, and rows leave the store as named tuples."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("farm", "api", "workers")
MODULES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
MAX_PER_1000_LINES = 5.0


def uses_of_any(tree: ast.Module) -> int:
    return sum(isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(tree))


def signatures(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Public functions and what they return."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and node.returns:
            yield node.name, ast.unparse(node.returns)


def test_any_is_rare() -> None:
    lines = uses = 0
    for path in MODULES:
        content = path.read_text()
        lines += content.count("\n")
        uses += uses_of_any(ast.parse(content))
    assert lines > 20_000
    assert uses / lines * 1000 <= MAX_PER_1000_LINES


def test_no_row_leaves_the_store() -> None:
    found = [
        f"{path.name}: {name} -> {returned}"
        for path in sorted((ROOT / "farm/store").glob("*.py"))
        for name, returned in signatures(ast.parse(path.read_text()))
        if "Row[" in returned
    ]
    assert found == []


def test_the_checks_see_what_they_are_for() -> None:
    tree = ast.parse("def f(x: Any) -> Sequence[Row[Any]]: ...")
    assert uses_of_any(tree) == 2
    assert list(signatures(tree)) == [("f", "Sequence[Row[Any]]")]
