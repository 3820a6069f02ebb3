"""Groups: calls that arrive while others are handled are handled together, in one thread.

Nothing waits for a group to grow. An idle process handles each call at once; a busy one needs fewer
statements and fewer changes of thread.
"""

from __future__ import annotations

from asyncio import Future, Task, create_task, get_running_loop
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from anyio import CapacityLimiter, to_thread

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")

MAX_GROUP = 64


class Groups(Generic[Asked, Answer]):
    """Answers many questions with one call of a function. Used in one event loop."""

    def __init__(
        self, answer: Callable[[Sequence[Asked]], Sequence[Answer | Exception]], threads: int
    ) -> None:
        """Create it.

        Args:
            answer: Answers a group, in order. It runs in a thread. An exception in its answer is
                raised to that one caller; an exception that it raises, to the whole group.
            threads: Maximum number of groups that are answered at the same time.
        """
        self._answer = answer
        self._threads = threads
        self._limiter = CapacityLimiter(threads)
        self._waiting: deque[tuple[Asked, Future[Answer]]] = deque()
        self._working = 0
        self._tasks: set[Task[None]] = set()
        """The loop itself holds tasks only weakly."""

    async def ask(self, asked: Asked) -> Answer:
        """Ask one question. Return its answer, or raise its exception."""
        future: Future[Answer] = get_running_loop().create_future()
        self._waiting.append((asked, future))
        if self._working < self._threads:
            self._working += 1
            task = create_task(self._work())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return await future

    async def _work(self) -> None:
        try:
            while self._waiting:
                size = min(MAX_GROUP, len(self._waiting))
                await self._answer_group([self._waiting.popleft() for _ in range(size)])
        finally:
            self._working -= 1

    async def _answer_group(self, group: list[tuple[Asked, Future[Answer]]]) -> None:
        answers: Sequence[Answer | Exception]
        try:
            asked = [each for each, _ in group]
            answers = await to_thread.run_sync(self._answer, asked, limiter=self._limiter)
        except Exception as error:
            answers = [error for _ in group]
        except BaseException:  # the process ends
            for _, future in group:
                future.cancel()
            raise
        for (_, future), answer in zip(group, answers, strict=True):
            if future.done():  # its client has gone
                continue
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)
