"""Numbers and times in a form for people."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from api.words import ago, count, duration, percent

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (59.9, "59 s"),
        (60, "1 min"),
        (3599, "60 min"),
        (3600, "1 h"),
        (86_399, "24 h"),
        (86_400, "1 day"),
        (5 * 86_400, "5 days"),
        (1e9, "11\u202f574 days"),
    ],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_how_long_ago() -> None:
    assert ago(NOW - timedelta(seconds=1), NOW) == "just now"
    assert ago(NOW + timedelta(seconds=5), NOW) == "just now"  # another machine's clock
    assert ago(NOW - timedelta(minutes=3), NOW) == "3 min ago"


def test_thousands_stand_apart() -> None:
    assert [count(number) for number in (7, 1000, 1_234_567)] == [
        "7",
        "1\u202f000",
        "1\u202f234\u202f567",
    ]


def test_shares() -> None:
    assert [percent(share) for share in (None, 0.0, 0.974, 1.0)] == ["—", "0%", "97%", "100%"]
