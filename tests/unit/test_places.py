"""Turns: one tenant's slow work does not delay the turns of others."""

from __future__ import annotations

import threading
import uuid

import anyio
import pytest

from api.places import Turns

ANN, BOB, CAROL = (uuid.UUID(int=number) for number in range(3))
DEADLINE_SECONDS = 10.0


@pytest.mark.parametrize("a_tenant", [1, 2])
def test_a_tenant_has_its_turns_and_others_have_theirs(a_tenant: int) -> None:
    turns, go_on = Turns(a_tenant + 1, a_tenant), threading.Event()
    begun: list[str] = []

    def long(name: str) -> None:
        begun.append(name)
        assert go_on.wait(DEADLINE_SECONDS)

    async def main() -> None:
        with anyio.fail_after(DEADLINE_SECONDS):
            async with anyio.create_task_group() as group:
                for number in range(3):
                    group.start_soon(turns.run, ANN, long, f"ann {number}")
                while len(begun) < a_tenant:
                    await anyio.lowlevel.checkpoint()
                assert await turns.run(BOB, lambda: "at once") == "at once"
                assert sorted(begun) == ["ann 0", "ann 1", "ann 2"][:a_tenant]
                go_on.set()
        assert sorted(begun) == ["ann 0", "ann 1", "ann 2"]

    anyio.run(main)


def test_what_fails_gives_its_turn_back() -> None:
    turns = Turns(1)

    def fail() -> None:
        raise ValueError("It failed.")

    async def main() -> None:
        with anyio.fail_after(DEADLINE_SECONDS):
            with pytest.raises(ValueError, match=r"It failed\."):
                await turns.run(CAROL, fail)
            assert await turns.run(CAROL, lambda: 1) == 1

    anyio.run(main)
