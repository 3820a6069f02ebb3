"""`keep_for`: its forms, what it means, and when a job goes."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farm.domain.keeping import LONGEST_SECONDS, checked_keep, expiry, too_long, written

END = datetime(2026, 12, 1, 18, tzinfo=UTC)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        (3600, 3600),
        (1, 1),
        ("90s", 90),
        ("30m", 1800),
        ("12h", 43_200),
        ("7d", 604_800),
        ("007d", 604_800),
        ("3660d", LONGEST_SECONDS),
    ],
)
def test_it_is_seconds_or_a_text(value: Any, seconds: int | None) -> None:
    assert checked_keep(value) == seconds


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "more than 0"),
        (-5, "more than 0"),
        ("0d", "more than 0"),
        (LONGEST_SECONDS + 1, f"at most {LONGEST_SECONDS} seconds (3660d)"),
        ("999999999d", "at most"),
        ("9999999999d", "such as"),
        (1.5, "such as"),
        (True, "such as"),
        ([], "such as"),
        ("", "such as"),
        ("3600", "such as"),
        ("-7d", "such as"),
        ("7 d", "such as"),
        ("7D", "such as"),
        ("7d\n", "such as"),
        ("1w", "such as"),
        ("1d12h", "such as"),
        ("٧d", "such as"),
        ("always", '"90s", "30m", "12h" or "7d"'),
    ],
)
def test_anything_else_is_refused_with_an_example(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        checked_keep(value)


@given(st.integers(1, LONGEST_SECONDS))
def test_what_is_written_is_read_again(seconds: int) -> None:
    assert checked_keep(written(seconds)) == seconds


def test_a_time_is_written_in_its_largest_unit() -> None:
    assert [written(seconds) for seconds in (604_800, 129_600, 5400, 90)] == [
        "7d",
        "36h",
        "90m",
        "90s",
    ]


def test_a_job_goes_after_its_own_time_or_that_of_the_farm() -> None:
    assert expiry(END, 60, 7.0) == END + timedelta(minutes=1)
    assert expiry(END, None, 0.5) == END + timedelta(hours=12)
    assert expiry(END, None, 0.0) is None, "it stays"
    assert expiry(None, 60, 7.0) is None, "it has not ended"
    assert expiry(END, None, 1e7) is None, "after the year 9999"


def test_the_refusal_names_the_maximum() -> None:
    refusal = too_long(129_600, 86_400)
    assert refusal is not None
    assert refusal.param == "keep_for"
    assert refusal.message.startswith("keep_for: 36h is more than this tenant's maximum, 1d.")
    for seconds, most in ((None, 60), (60, None), (60, 60)):
        assert too_long(seconds, most) is None
