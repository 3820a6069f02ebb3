"""Run code with the packages of some extras only, as in an environment without the others.

`python -m tests.support.distributions EXTRAS COMMAND` runs `farm COMMAND` in this way. EXTRAS is
`none`, or names with commas between them, for example `files,server`.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable, Sequence
from importlib import metadata
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from packaging.requirements import Requirement

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
OWN = {"farm", "api", "workers", "migrations", "tests"}


def name_of(distribution: str) -> str:
    """Return a distribution's name in its normal form (PEP 503)."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def requirements(extras: Iterable[str]) -> list[str]:
    """List what the project requires with some extras."""
    found: list[str] = list(PROJECT["dependencies"])
    for extra in extras:
        for each in PROJECT["optional-dependencies"][extra]:
            named = Requirement(each)
            found += requirements(named.extras) if named.name == PROJECT["name"] else [each]
    return found


def closure(wanted: Iterable[str]) -> set[str]:
    """Name the distributions that some requirements bring, as far as they are installed here."""
    left, seen = [Requirement(each) for each in wanted], set[tuple[str, frozenset[str]]]()
    while left:
        requirement = left.pop()
        key = (name_of(requirement.name), frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            needed = metadata.distribution(requirement.name).requires or []
        except metadata.PackageNotFoundError:
            continue
        for each in map(Requirement, needed):
            extras = ["", *requirement.extras]
            if each.marker is None or any(each.marker.evaluate({"extra": one}) for one in extras):
                left.append(each)
    return {name for name, _ in seen}


class Absent(MetaPathFinder):
    """Finds no module of the distributions that are not wanted."""

    def __init__(self, extras: Iterable[str]) -> None:
        present = closure(requirements(extras))
        self.modules = {
            module
            for module, names in metadata.packages_distributions().items()
            if not present & {name_of(name) for name in names}
        } - OWN

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Fail for an absent module, as Python does; leave others to the next finder."""
        if fullname.split(".")[0] in self.modules:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
        return None


if __name__ == "__main__":
    extras, sys.argv[1:] = sys.argv[1], sys.argv[2:]
    already = set(sys.modules)
    sys.meta_path.insert(0, Absent([] if extras == "none" else extras.split(",")))
    # What this module itself needed must not help.
    for module in {"packaging"} & already:
        del sys.modules[module]
    from farm.cli import main

    main()
