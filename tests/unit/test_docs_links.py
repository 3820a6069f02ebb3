"""The pages: every link leads somewhere, every path of the code is there, the map is short."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    ROOT / "examples/README.md",
    *sorted(ROOT.glob("docs/**/*.md")),
]
# Records keep the paths of their time.
PRESENT = [page for page in PAGES if page.parent.name != "adr" and page.name != "CHANGELOG.md"]
MAX_MAP_LINES = 120
EXAMPLES = {"farm/pipelines/families/flux.py"}  # the family that a reader is shown how to add


def links() -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        for match in re.finditer(r"\]\(([^)\s]+)\)", page.read_text()):
            if not match[1].startswith(("http:", "https:", "mailto:")):
                yield page, match[1]


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    shown = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", text).strip().lower().replace(" ", "-") for text in shown}


def test_every_link_leads_somewhere() -> None:
    broken = []
    for page, link in links():
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert broken == []


def test_every_path_of_the_code_exists() -> None:
    paths = re.compile(r"`((?:farm|api|workers|migrations|tests|docs)/[\w./]*)`")
    found = [(page, path) for page in PRESENT for path in paths.findall(page.read_text())]
    missing = [
        f"{page.relative_to(ROOT)}: {path}"
        for page, path in found
        if not (ROOT / path).exists() and path not in EXAMPLES
    ]
    assert len(found) > 50
    assert missing == []


def test_the_map_is_short() -> None:
    assert len((ROOT / "docs/architecture.md").read_text().splitlines()) <= MAX_MAP_LINES


def test_every_page_is_reached_from_the_map_or_the_readme() -> None:
    linked = {(page.parent / link.partition("#")[0]).resolve() for page, link in links()}
    assert [str(page) for page in PAGES if page not in linked and page.parent != ROOT] == []
