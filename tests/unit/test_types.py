"""Types: few `Any`, and rows leave the store as named tuples."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Set
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("farm", "api", "workers")
MODULES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
MAX_PER_1000_LINES = 5.0


def names(tree: ast.AST) -> Iterator[str]:
    return (node.id for node in ast.walk(tree) if isinstance(node, ast.Name))


def aliases_of_any(tree: ast.Module) -> set[str]:
    """Names of types that are defined by Any, such as `JsonObject = dict[str, Any]`."""
    return {
        name
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript | ast.Name)
        if "Any" in names(node.value)
        for target in node.targets
        for name in names(target)
    }


def uses_of_any(tree: ast.Module, aliases: Set[str] = frozenset()) -> int:
    return sum(name == "Any" or name in aliases for name in names(tree))


def signatures(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Public functions and methods, and what they return."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and node.returns:
            yield node.name, ast.unparse(node.returns)


def test_any_is_rare() -> None:
    contents = [path.read_text() for path in MODULES]
    trees = [ast.parse(content) for content in contents]
    aliases = {name for tree in trees for name in aliases_of_any(tree)}
    lines = sum(content.count("\n") for content in contents)
    uses = sum(uses_of_any(tree, aliases) for tree in trees)
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
    alias = ast.parse("Json = dict[str, Any]\nx: Json\ny: int")
    assert aliases_of_any(alias) == {"Json"}
    assert uses_of_any(alias, {"Json"}) == 3
    assert list(signatures(tree)) == [("f", "Sequence[Row[Any]]")]
