"""The layers of docs/architecture.md equal those that import-linter checks."""

from __future__ import annotations

import tomllib
from pathlib import Path

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
