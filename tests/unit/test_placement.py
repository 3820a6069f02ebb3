"""Placement: which worker `farm up` starts on which CUDA device."""

from __future__ import annotations

from typing import Any

import pytest

from farm.errors import InvalidRequest
from farm.local.placement import Entry, place
from farm.pipelines.runtime.gpus import Gpu

GIB = 2**30


def gpus(count: int, gib: int = 24) -> list[Gpu]:
    return [Gpu(str(each), f"GPU-{each}", "Some GPU", gib * GIB) for each in range(count)]


def entry(name: str, gib: float | None = 10) -> Entry:
    return Entry(name, uses_gpu=True, bytes=None if gib is None else int(gib * GIB))


ON_CPU = Entry("null", uses_gpu=False)


def placed(*args: Any) -> list[str]:
    """Return the workers as `name-number@device`."""
    return [f"{each.pipeline}-{each.number}@{each.device}" for each in place(*args).workers]


def test_without_devices_each_entry_gets_a_worker_or_what_is_asked_for() -> None:
    entries = [entry("sdxl"), entry("sd15"), ON_CPU]
    assert placed(entries, [], {}) == ["sdxl-1@None", "sd15-1@None", "null-1@None"]
    asked = {"sd15": 2, "null": 0}
    assert placed(entries, [], asked) == ["sdxl-1@None", "sd15-1@None", "sd15-2@None"]


def test_on_eight_devices_the_first_entry_gets_those_that_remain() -> None:
    found = placed([ON_CPU, entry("sdxl"), entry("sd15")], gpus(8), {})
    assert found[:3] == ["null-1@None", "sdxl-1@0", "sd15-1@1"]
    assert found[3:] == [f"sdxl-{number}@{number}" for number in range(2, 8)]


def test_on_as_many_devices_as_entries_each_has_one() -> None:
    assert placed([entry("a"), entry("b")], gpus(2), {}) == ["a-1@0", "b-1@1"]


def test_what_is_asked_for_is_started_and_no_more() -> None:
    found = placed([entry("sdxl"), entry("sd15")], gpus(8), {"sdxl": 5, "sd15": 2})
    assert sorted(found) == [
        "sd15-1@1",
        "sd15-2@3",
        "sdxl-1@0",
        "sdxl-2@2",
        "sdxl-3@4",
        "sdxl-4@5",
        "sdxl-5@6",
    ]


def test_an_entry_that_is_not_named_still_gets_one() -> None:
    assert placed([entry("a"), entry("b")], gpus(4), {"b": 2}) == ["a-1@0", "b-1@1", "b-2@2"]


def test_entries_share_a_device_where_they_fit_together() -> None:
    entries = [entry("a", 12), entry("b", 20), entry("c", 11)]
    found = place(entries, gpus(2), {})
    assert placed(entries, gpus(2), {}) == ["a-1@0", "b-1@1", "c-1@0"]
    assert found.left_out == {}


def test_an_entry_without_room_is_left_out_with_the_reason() -> None:
    found = place([entry("a", 20), entry("b", 3.5), entry("c", 4.5), entry("d", 40)], gpus(1), {})
    assert [each.pipeline for each in found.workers] == ["a", "b"]
    assert found.left_out == {
        "c": "it needs 4.5 GiB, and no device has enough memory left",
        "d": "it needs 40.0 GiB, and the largest device has 24.0 GiB",
    }


def test_weights_that_are_not_here_share_with_nobody() -> None:
    unknown = entry("new", None)
    assert placed([unknown, entry("a", 1)], gpus(2), {}) == ["new-1@0", "a-1@1"]
    assert placed([entry("a", 1), unknown], gpus(2), {}) == ["a-1@0", "new-1@1"]
    left = place([entry("a", 1), unknown], gpus(1), {}).left_out
    assert left == {
        "new": "its weights are not here yet, so it needs an empty device, and there is none"
    }
    assert list(place([unknown, entry("a", 1)], gpus(1), {}).left_out) == ["a"]


def test_a_worker_that_was_asked_for_and_has_no_room_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"^--workers: there is no room for worker 3 of a: "):
        place([entry("a", 20), entry("b", 1)], gpus(2), {"a": 3})


def test_leaving_one_out_makes_room_for_another() -> None:
    entries = [entry("a", 20), entry("b", 20)]
    assert list(place(entries, gpus(1), {}).left_out) == ["b"]
    assert placed(entries, gpus(1), {"a": 0}) == ["b-1@0"]
