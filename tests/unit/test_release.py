"""The text of a release equals its version's section of the changelog."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

CHANGELOG = (
    "# Changelog\n\n## Unreleased\n\n## 1.2.0 - 2026-01-02\n\n- One.\n\n## 1.1.0\n\n- Two.\n"
)


@pytest.fixture
def release_notes() -> Callable[[str, Path], str]:
    function: Callable[[str, Path], str] = runpy.run_path(str(ROOT / ".ci/release_notes.py"))[
        "release_notes"
    ]
    return function


def tree(folder: Path, changelog: str) -> Path:
    (folder / "pyproject.toml").write_text('[project]\nname = "farm"\nversion = "1.2.0"\n')
    (folder / "CHANGELOG.md").write_text(changelog)
    return folder


def test_a_release_has_its_section(
    tmp_path: Path, release_notes: Callable[[str, Path], str]
) -> None:
    assert release_notes("v1.2.0", tree(tmp_path, CHANGELOG)) == "- One.\n"


def test_another_tag_is_refused(tmp_path: Path, release_notes: Callable[[str, Path], str]) -> None:
    with pytest.raises(ValueError, match=r"tag is v1\.3\.0, and the version .* is 1\.2\.0"):
        release_notes("v1.3.0", tree(tmp_path, CHANGELOG))


def test_a_missing_section_is_refused(
    tmp_path: Path, release_notes: Callable[[str, Path], str]
) -> None:
    with pytest.raises(ValueError, match="rename Unreleased"):
        release_notes("v1.2.0", tree(tmp_path, "# Changelog\n\n## Unreleased\n\n- One.\n"))
