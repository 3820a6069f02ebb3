"""The calculation of the benchmark suite's figures."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from tests.benchmarks import report
from tests.benchmarks.figures import Ratio, Row, Series, in_turn, percentile
from tests.support.machine_info import replace_between


def test_ways_are_measured_in_turn_and_each_second_turn_backwards() -> None:
    order: list[str] = []

    def way(name: str) -> float:
        order.append(name)
        return float(len(order))

    ways = {name: partial(way, name) for name in "ab"}
    series = in_turn(ways, 3, "s")
    assert "".join(order) == "abbaab"
    assert [list(found.values) for found in series] == [[1, 4, 5], [2, 3, 6]]


def test_a_ratio_is_of_the_two_of_a_turn() -> None:
    row = Row("x", "A row", "How.", [Series("a", [1, 9, 4], "s"), Series("b", [2, 3, 4], "s")])
    row.add_ratio("a", "b", least=2.0)
    [ratio] = row.ratios
    assert list(ratio.values) == [0.5, 3, 1]
    assert (ratio.median, ratio.ok, row.ok) == (1, False, False)
    assert "| a ÷ b | **1** | 0.5 - 3 | at least 2 | **missed** |" in report.section(row)


def test_goals() -> None:
    assert Ratio("r", [1.0]).ok
    assert Ratio("r", [1.0], most=1.0).ok
    assert not Ratio("r", [1.1], most=1.0).ok
    assert not Ratio("r", [0.9], least=1.0).ok
    assert not Row("x", "A row", "How.", problems=["Something was lost."]).ok


def test_percentiles() -> None:
    values = [float(value) for value in range(1, 21)]
    assert [percentile(values, at) for at in (50, 95, 99, 100)] == [10, 19, 20, 20]
    assert percentile([7.0], 50) == 7


def test_what_was_found_goes_between_the_markers(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("before\n<b>\nold\n<e>\nafter\n")
    replace_between(path, "<b>", "<e>", "new")
    assert path.read_text() == "before\n<b>\nnew\n<e>\nafter\n"
