"""The state machine's pure functions."""

from __future__ import annotations

import itertools

import pytest

from farm.domain.states import (
    FRAME_TRANSITIONS,
    JOB_TRANSITIONS,
    TERMINAL,
    FrameState,
    JobStatus,
    after_failure,
    retry_delay,
    settled,
)


def test_every_state_can_be_reached_and_only_ends_have_no_way_out() -> None:
    reached = {to for moves in FRAME_TRANSITIONS.values() for ends in moves.values() for to in ends}
    left = {start for moves in FRAME_TRANSITIONS.values() for start in moves}
    assert reached == set(FrameState) - {FrameState.WAITING}
    assert set(FrameState) - left == {FrameState.SUCCEEDED, FrameState.CANCELLED}
    reached_jobs = {
        to for moves in JOB_TRANSITIONS.values() for ends in moves.values() for to in ends
    }
    assert reached_jobs == set(JobStatus) - {JobStatus.QUEUED}


@pytest.mark.parametrize("total", [1, 2, 5])
def test_a_job_settles_with_its_last_frame(total: int) -> None:
    for succeeded, dead, cancelled in itertools.product(range(total + 1), repeat=3):
        ended = succeeded + dead + cancelled
        if ended > total:
            continue
        status = settled(total, succeeded, dead, cancelled)
        if ended < total:
            assert status is None
        elif succeeded == total:
            assert status is JobStatus.SUCCEEDED
        else:
            assert status is (JobStatus.PARTIAL if succeeded else JobStatus.FAILED)
        assert status is None or status in TERMINAL


def test_a_frame_is_dead_after_max_attempts_or_at_once() -> None:
    assert after_failure(True, 2, 3) is FrameState.READY
    assert after_failure(True, 3, 3) is FrameState.DEAD
    assert after_failure(False, 1, 3) is FrameState.DEAD


def test_back_off_doubles_up_to_a_minute() -> None:
    assert [retry_delay(attempt, 1.0) for attempt in (1, 2, 3, 4)] == [1.0, 2.0, 4.0, 8.0]
    assert retry_delay(5000, 1.0) == 60.0
    assert retry_delay(1, 0.0) == 0.0
