"""Running the command line in tests: in this process, or in a separate one as users do."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import boto3

from farm.cli import main


@dataclass(frozen=True)
class Outcome:
    """Result of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Return the last line of standard output, parsed as JSON."""
        return json.loads(self.out.splitlines()[-1])


def farm(
    *words: str, env: Mapping[str, str] | None = None, cwd: Path | None = None, stdin: str = ""
) -> Outcome:
    """Run `farm WORDS` in this process. Leave no variables and no S3 credentials behind.

    With `env`, no other FARM_* variables are set.
    """
    out, err = io.StringIO(), io.StringIO()
    code: int | str | None = 0
    with (
        mock.patch.object(sys, "argv", ["farm", *words]),
        mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()))),
        mock.patch.dict(os.environ, inherited() | dict(env) if env else {}, clear=bool(env)),
        mock.patch.object(boto3, "DEFAULT_SESSION", None),
        chdir(cwd or Path()),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as ending:
            code = ending.code
    assert isinstance(code, int | None)
    return Outcome(code or 0, out.getvalue(), err.getvalue())


def farm_process(
    *words: str,
    env: Mapping[str, str],
    cwd: Path | None = None,
    stdin: str = "",
    seconds: float = 580,
) -> Outcome:
    """Run `farm WORDS` in a separate process, with only the FARM_* variables of `env`."""
    done = subprocess.run(
        [sys.executable, "-m", "farm.cli", *words],
        env=inherited() | dict(env),
        cwd=cwd,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def inherited() -> dict[str, str]:
    """Return this process's variables that do not concern a farm, and a terminal's width."""
    ours = ("FARM_", "AWS_")
    found = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return found | {"COLUMNS": "120"}
