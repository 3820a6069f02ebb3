"""Garbage collections are rare while a process starts, and as usual once its pipeline is loaded."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import gc
usual = gc.get_threshold()
{start}
rare = gc.get_threshold()
{loaded}
print(rare[0] // usual[0], gc.get_threshold() == usual, gc.get_freeze_count() > 1_000)
"""


def _run(start: str, loaded: str) -> str:
    script = SCRIPT.format(start=start, loaded=loaded)
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_a_starting_process_collects_rarely() -> None:
    start = "from farm.process import collect_rarely; collect_rarely()"
    often, usual, frozen = _run(start, "").split()
    assert int(often) >= 20
    assert (usual, frozen) == ("False", "False")


def test_a_loaded_worker_collects_as_usual_and_skips_what_it_loaded() -> None:
    start = "from farm.process import collect_rarely, collect_usually; collect_rarely()"
    _, usual, frozen = _run(start, "collect_usually()").split()
    assert (usual, frozen) == ("True", "True")
