"""A few rows of `make chaos`, once or twice each. Nothing is lost, and nothing is done twice."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chaos.report import verdict
from tests.chaos.run import Chaos, chaos

SEED = 7


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chaos]:
    with chaos(tmp_path_factory.mktemp("chaos"), SEED, short=True) as farm:
        yield farm


@pytest.mark.parametrize(
    ("number", "times"),
    [
        (1, 1),
        (3, 1),
        (4, 2),
        (8, 1),
        (9, 2),
        (10, 1),
        (12, 2),
        (15, 1),
        pytest.param(16, 1, marks=pytest.mark.slow),
    ],
)
def test_nothing_is_lost_or_doubled(running: Chaos, number: int, times: int) -> None:
    result = running.run(number, times)
    assert verdict(result) == "ok"
    assert result.times == times
    assert result.findings.frames > 0
