"""The layers of docs/architecture.md equal those that import-linter checks."""

from __future__ import annotations

import tomllib
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[2]


def test_the_page_shows_the_layers_that_are_checked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contracts = project["tool"]["importlinter"]["contracts"]
    [checked] = [each["layers"] for each in contracts if each["name"] == "the floors of the farm"]
    page = (ROOT / "docs/architecture.md").read_text()
    shown = page.split("## The layers", 1)[1].split("```")[1].strip().splitlines()
    assert shown == checked
    assert len(checked) == 9


def test_no_folder_has_more_modules_than_a_reader_can_take_in() -> None:
    exempt = {"farm/store", "farm/cli/commands"}
    folders = {
        path.parent for top in ("farm", "api", "workers") for path in (ROOT / top).rglob("*.py")
    }
    count = {
        folder.relative_to(ROOT).as_posix(): len({*folder.glob("*.py")} - {folder / "__init__.py"})
        for folder in folders
    }
    assert {name: modules for name, modules in count.items() if modules > 20}.keys() <= exempt
    assert count["farm"] <= 10


def test_no_two_packages_import_each_other() -> None:
    """A package and its own subpackage are one: contracts of import-linter order them."""
    graph = grimp.build_graph("farm", "api", "workers", cache_dir=None)
    packages = {module for module in graph.modules if graph.find_children(module)}

    def package_of(module: str) -> str:
        return module if module in packages else module.rpartition(".")[0]

    arrows = {
        (package_of(importer), package_of(imported))
        for importer in graph.modules
        for imported in graph.find_modules_directly_imported_by(importer)
    }
    both = {(a, b) for a, b in arrows if a < b and (b, a) in arrows}
    assert {(a, b) for a, b in both if not b.startswith(f"{a}.")} == set()
    assert ("api.routes", "farm.services") in arrows
