"""`python -m tests.vendored`: fetch the scripts of others that the dashboard serves.

api/dashboard/static/vendor/vendor.json names each package of npm, its version and the hash of its
archive, as npm publishes it. To change a version, change both and run this. Needs npm, which
installs nothing and runs nothing of the package.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import tarfile
import tempfile
from base64 import b64encode
from pathlib import Path
from typing import Any

VENDOR = Path(__file__).parents[1] / "api" / "dashboard" / "static" / "vendor"
LIST = VENDOR / "vendor.json"


def fetch() -> None:
    """Take each file of the list out of its archive, and note its hash.

    Raises:
        SystemExit: an archive is another one than the list names.
    """
    packages: list[dict[str, Any]] = json.loads(LIST.read_text())
    for package in packages:
        with tempfile.TemporaryDirectory() as temporary:
            name = f"{package['name']}@{package['version']}"
            command = ["npm", "pack", "--silent", "--pack-destination", temporary, name]
            subprocess.run(command, check=True)
            [archive] = Path(temporary).iterdir()
            found = f"sha512-{b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()}"
            if found != package["integrity"]:
                raise SystemExit(f"{name} has the hash {found}, not {package['integrity']}.")
            with tarfile.open(archive) as tar:
                for file in package["files"]:
                    member = tar.extractfile(f"package/{file['from']}")
                    assert member is not None
                    content = member.read()
                    (VENDOR / file["file"]).write_bytes(content)
                    file["integrity"] = integrity(content)
    LIST.write_text(json.dumps(packages, indent=2) + "\n")


def integrity(content: bytes) -> str:
    """Return a hash as HTML's attribute `integrity` has it."""
    return f"sha384-{b64encode(hashlib.sha384(content).digest()).decode()}"


if __name__ == "__main__":
    fetch()
