"""Numbers, times, sizes and rates in a form for people, on pages and terminals."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from farm.humanize import ago, count, duration, numbered, percent, plural

NOW = datetime(2026, 1, 1, 0, 5, tzinfo=UTC)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0.0 s"),
        (-3, "0.0 s"),
        (4.21, "4.2 s"),
        (59.4, "59 s"),
        (60, "1 min 0 s"),
        (3599.4, "59 min 59 s"),
        (7500, "2 h 5 min"),
        (2 * 86_400, "2 days"),
        (5 * 86_400, "5 days"),
        (1e9, "11,574 days"),
    ],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (1, "just now"),
        (-5, "just now"),  # the clock of another machine
        (40, "40 s ago"),
        (59.9, "59 s ago"),
        (60, "1 min ago"),
        (3599, "59 min ago"),
        (3600, "1 h ago"),
        (86_400, "1 day ago"),
        (5 * 86_400, "5 days ago"),
    ],
)
def test_how_long_ago(seconds: float, words: str) -> None:
    assert ago(NOW - timedelta(seconds=seconds), NOW) == words


def test_a_moment_as_the_api_writes_it() -> None:
    assert ago("2026-01-01T00:00:00.5Z", NOW) == "4 min ago"


def test_numbers() -> None:
    assert [count(number) for number in (7, 1000, 1_234_567)] == ["7", "1,000", "1,234,567"]
    assert [plural(number, "frame") for number in (1, 2000)] == ["1 frame", "2,000 frames"]
    assert numbered({"waiting": 12, "dead": 0, "worker_lost": 3}) == "12 waiting, 3 worker lost"


def test_shares() -> None:
    assert [percent(share) for share in (None, 0.0, 0.974, 1.0)] == ["—", "0%", "97%", "100%"]
