"""The number of cores: those of the process's affinity, limited by a container's quota."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from farm import process as module
from farm.process import cores


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("max 100000", 8),
        ("400000 100000", 4),
        ("150000 100000", 2),
        ("5000 100000", 1),
        ("1600000 100000", 8),
        ("nonsense", 8),
        (None, 8),
    ],
)
def test_a_quota_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str | None, expected: int
) -> None:
    quota = tmp_path / "cpu.max"
    if told is not None:
        quota.write_text(f"{told}\n")
    monkeypatch.setattr(module, "QUOTA", quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)), raising=False)
    assert cores() == expected
