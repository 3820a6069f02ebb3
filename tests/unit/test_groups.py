"""Groups of calls: what arrives while others are handled is handled together."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest

from api.groups import MAX_GROUP, Groups


class Handler:
    """A function that answers n with n * 10, waits for permission, and notes its groups."""

    def __init__(self, *, waits: bool = False) -> None:
        self.groups: list[list[int]] = []
        self.may = threading.Event()
        if not waits:
            self.may.set()

    def __call__(self, asked: Sequence[int]) -> list[int | Exception]:
        self.groups.append([*asked])
        assert self.may.wait(30)
        if asked[0] == -2:
            raise KeyError("all")
        return [KeyError("one") if number == -1 else number * 10 for number in asked]


def test_a_single_call_waits_for_nobody() -> None:
    async def run() -> None:
        handler = Handler()
        groups = Groups(handler, 1)
        assert await groups.ask(4) == 40
        assert await groups.ask(5) == 50
        assert handler.groups == [[4], [5]]

    asyncio.run(run())


def test_calls_that_come_in_the_meantime_are_handled_together() -> None:
    async def run() -> None:
        handler = Handler(waits=True)
        groups = Groups(handler, 1)
        first = asyncio.create_task(groups.ask(1))
        async with asyncio.timeout(30):
            while not handler.groups:
                await asyncio.sleep(0)
        later = [asyncio.create_task(groups.ask(number)) for number in range(2, 22)]
        await asyncio.sleep(0)  # each of them has asked
        handler.may.set()
        answers = await asyncio.gather(first, *later)
        assert answers == [number * 10 for number in range(1, 22)]
        assert handler.groups == [[1], [*range(2, 22)]]

    asyncio.run(run())


def test_as_many_groups_are_handled_at_once_as_there_are_threads() -> None:
    async def run() -> None:
        handler = Handler(waits=True)
        groups = Groups(handler, 2)
        tasks = []
        for number in range(2):
            tasks.append(asyncio.create_task(groups.ask(number)))
            async with asyncio.timeout(30):
                while len(handler.groups) <= number:
                    await asyncio.sleep(0)
        handler.may.set()
        assert await asyncio.gather(*tasks) == [0, 10]

    asyncio.run(run())


def test_a_group_has_a_limit() -> None:
    async def run() -> None:
        handler = Handler()
        groups = Groups(handler, 1)
        await asyncio.gather(*(groups.ask(number) for number in range(3 * MAX_GROUP)))
        assert max(map(len, handler.groups)) == MAX_GROUP
        assert sum(map(len, handler.groups)) == 3 * MAX_GROUP

    asyncio.run(run())


def test_an_error_reaches_only_its_own_caller() -> None:
    async def run() -> None:
        groups = Groups(Handler(), 1)
        tasks = [groups.ask(1), groups.ask(-1), groups.ask(2)]
        one, error, two = await asyncio.gather(*tasks, return_exceptions=True)
        assert (one, two) == (10, 20)
        assert isinstance(error, KeyError)

    asyncio.run(run())


def test_an_error_of_the_handler_reaches_its_whole_group() -> None:
    async def run() -> None:
        groups = Groups(Handler(), 1)
        results = await asyncio.gather(groups.ask(-2), groups.ask(1), return_exceptions=True)
        assert [type(result) for result in results] == [KeyError, KeyError]
        assert await groups.ask(3) == 30

    asyncio.run(run())


def test_a_caller_that_has_gone_stops_no_other() -> None:
    async def run() -> None:
        handler = Handler(waits=True)
        groups = Groups(handler, 1)
        gone, stays = (asyncio.create_task(groups.ask(number)) for number in (1, 2))
        async with asyncio.timeout(30):
            while not handler.groups:
                await asyncio.sleep(0)
        gone.cancel()
        handler.may.set()
        assert await stays == 20
        with pytest.raises(asyncio.CancelledError):
            await gone

    asyncio.run(run())
