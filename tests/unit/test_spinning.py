"""Torch's threads wait actively for a short time only, which busy cores need."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from farm.process import limit_spinning

POLICIES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@pytest.mark.parametrize(
    ("chosen", "spins"),
    [({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_a_policy_that_the_user_chose_stays(
    monkeypatch: pytest.MonkeyPatch, chosen: dict[str, str], spins: str | None
) -> None:
    for name in POLICIES:
        monkeypatch.delenv(name, raising=False)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    try:
        limit_spinning()
        assert os.environ.get("GOMP_SPINCOUNT") == spins
    finally:
        os.environ.clear()
        os.environ.update(before)


PROGRAM = """
import os, sys
from unittest import mock
from farm.cli.commands import processes
runs = "workers.render.parent.run_worker"
with mock.patch.object(processes, "_process"), mock.patch(runs) as run:
    run.side_effect = lambda *_: print(os.environ["GOMP_SPINCOUNT"], "torch" in sys.modules) or 0
    processes.worker("demo")
"""


def test_a_worker_sets_it_before_torch_is_loaded() -> None:
    env = {name: value for name, value in os.environ.items() if name not in POLICIES}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=False
    )
    assert done.stdout == "3000 False\n", done.stderr
