"""A folder's farm.env: settings as KEY=value lines, which a shell can read too."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

NAME = "farm.env"


def load_env(data: Path) -> dict[str, str]:
    """Read `data`/farm.env: FARM_* and AWS_* variables; empty when there is no such file."""
    path = data / NAME
    if not path.is_file():
        return {}
    words = (word for line in path.read_text().splitlines() for word in _words(line))
    return dict(word.split("=", 1) for word in words if "=" in word)


def format_env(env: Mapping[str, str]) -> str:
    """Lines that `load_env`, `sh` and dotenv read alike."""
    return "".join(f"{key}={shlex.quote(value)}\n" for key, value in env.items())


def _words(line: str) -> list[str]:
    return shlex.split(line, comments=True)
