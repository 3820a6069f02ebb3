"""Time until a lane is empty, from its speeds of the last minutes."""

from __future__ import annotations

from collections.abc import Sequence


def seconds_until_empty(
    waiting: int, speeds: Sequence[float], *, able: int, held: bool
) -> float | None:
    """Return the time until nothing waits, in seconds, at the speed of the times with frames.

    Args:
        waiting: number of frames that wait.
        speeds: frames a second, one for each of some equal times.
        able: number of workers that can render.
        held: True if an operator holds the lane.

    Returns:
        The time. None: nothing waits, nothing is rendered, or the speed is not known.
    """
    rendering = [speed for speed in speeds if speed > 0]
    if not (waiting and rendering and able) or held:
        return None
    return waiting * len(rendering) / sum(rendering)
