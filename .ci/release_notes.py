"""Print the section of CHANGELOG.md for a tag, for example v0.2.0.

Exits with 1 where the tag is not the version in pyproject.toml, or the section is missing.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def release_notes(tag: str, root: Path = ROOT) -> str:
    """Return the changelog's section for a tag.

    Raises:
        ValueError: the tag is not `v` and the project's version, or there is no section for it.
    """
    version = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    if tag != f"v{version}":
        raise ValueError(f"The tag is {tag}, and the version in pyproject.toml is {version}.")
    changelog = (root / "CHANGELOG.md").read_text()
    section = re.search(
        rf"^## \[?{re.escape(version)}\]?.*?\n(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL
    )
    if section is None or not section[1].strip():
        raise ValueError(
            f"CHANGELOG.md has no section {version}: rename Unreleased to `{version} - YYYY-MM-DD`."
        )
    return section[1].strip() + "\n"


if __name__ == "__main__":
    try:
        sys.stdout.write(release_notes(sys.argv[1]))
    except (IndexError, ValueError) as error:
        sys.exit(f"release_notes.py: {error}")
