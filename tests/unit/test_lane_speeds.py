"""Time until a lane is empty."""

from __future__ import annotations

import pytest

from farm.domain.lane_speeds import seconds_until_empty


@pytest.mark.parametrize(
    ("waiting", "speeds", "able", "held", "seconds"),
    [
        (120, [1.0, 1.0], 1, False, 120.0),
        (120, [0.0, 0.0, 1.0, 3.0], 1, False, 60.0),  # it was idle before
        (0, [1.0], 1, False, None),
        (120, [], 1, False, None),
        (120, [0.0], 1, False, None),
        (120, [1.0], 0, False, None),
        (120, [1.0], 1, True, None),
    ],
)
def test_idle_times_do_not_count(
    waiting: int, speeds: list[float], able: int, held: bool, seconds: float | None
) -> None:
    assert seconds_until_empty(waiting, speeds, able=able, held=held) == seconds
