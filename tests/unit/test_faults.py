"""Causes of failed attempts: alike if only numbers, paths, IDs and quoted words differ."""

from __future__ import annotations

import traceback
from collections.abc import Callable

import pytest

from farm.domain.faults import calls_of, common_part, fault_of


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("CUDA error 700 at step 12 of 25", "CUDA error 701 at step 3 of 50"),
        ("No file /models/a/unet.bin", "No file /mnt/b/vae.bin"),
        ("The prompt 'a red star' is too long", "The prompt 'a blue moon' is too long"),
        ("Tensor at 0x7f0011aa22", "Tensor at 0x7f99bb"),
        (
            "Job 2f1c9a52-0000-4000-8000-000000000001 is gone",
            "Job 9e48a497-93d3-449e-a347-4d7938a3ca74 is gone",
        ),
        ("It took 3.5 s", "It took 12,5 s"),
        ("two   lines\nof text", "two lines of text"),
    ],
)
def test_what_differs_from_frame_to_frame_is_no_other_cause(one: str, other: str) -> None:
    assert common_part(one) == common_part(other)
    assert fault_of("render_error", one, None) == fault_of("render_error", other, None)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Memory ran out.", "The disk is full."),
        ("the decade began", "the facade began"),  # words of the letters of hexadecimal digits
        ("No file a", "No folder a"),
    ],
)
def test_other_words_are_another_cause(one: str, other: str) -> None:
    assert fault_of("render_error", one, None) != fault_of("render_error", other, None)


def test_a_reason_and_the_functions_of_a_traceback_are_part_of_a_cause() -> None:
    def deep(depth: int) -> None:
        if depth:
            deep(depth - 1)
        raise ValueError("It broke.")

    def elsewhere(_depth: int) -> None:
        raise ValueError("It broke.")

    def log_of(broken: Callable[[int], None], depth: int) -> str:
        try:
            broken(depth)
        except ValueError as error:
            return "".join(traceback.format_exception(error))
        raise AssertionError

    log = log_of(deep, 0)
    assert calls_of(log) == ["test_faults.py:log_of", "test_faults.py:deep"]
    assert calls_of(log_of(deep, 9)) == ["test_faults.py:deep"] * 3
    one = fault_of("render_error", "It broke.", log)
    assert one == fault_of("render_error", "It broke.", log.replace("line ", "line 1"))
    assert one != fault_of("render_error", "It broke.", log_of(elsewhere, 0))
    assert one != fault_of("worker_lost", "It broke.", log)
    assert len(one) == 16
    assert calls_of("12:00 WARNING farm: no traceback") == []
    windows = '  File "C:\\farm\\x.py", line 3, in run'
    assert calls_of(windows) == ["x.py:run"]
