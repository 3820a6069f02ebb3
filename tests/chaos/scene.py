"""The run of one row: the farm, its load, and actions for faults."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random

from tests.chaos.load import Load
from tests.chaos.proxy import Fault, Link
from tests.chaos.stack import LEASE_SECONDS, Process, Stack
from tests.chaos.truth import DatabaseProbe
from tests.support.waiting import wait_until

PATIENCE_SECONDS = 180.0


class Skipped(Exception):
    """Raised if a row cannot run on this machine. The message has the reason."""


@dataclass
class ChaosRun:
    """A running row: the farm, its load, and the random choices."""

    stack: Stack
    truth: DatabaseProbe
    load: Load
    random: Random
    problems: list[str] = field(default_factory=list)

    @contextmanager
    def noting_errors(self) -> Iterator[None]:
        """Record an error in the block as a problem of the row, and continue."""
        try:
            yield
        except Skipped:
            raise
        except Exception as error:
            self.problems.append(f"{type(error).__name__}: {error}")

    def wait(self, condition: Callable[[], object], what: str) -> None:
        wait_until(condition, PATIENCE_SECONDS, what)

    def pause(self, least: float, most: float) -> None:
        """Keep the fault for a random time."""
        time.sleep(self.random.uniform(least, most))

    def rendering(self, processes: Sequence[Process]) -> Process:
        """Wait until some of these workers hold leases. Return one of them."""
        chosen: list[Process] = []

        def found() -> bool:
            holders = self.truth.holders()
            chosen[:] = [process for process in processes if process.pid in holders]
            return bool(chosen)

        self.wait(found, "a worker held a lease")
        return self.random.choice(chosen)

    def storing(self, processes: Sequence[Process]) -> Process:
        """Wait until a worker is storing a picture. Return it: its batch is almost done."""
        process = self.rendering(processes)
        [link] = self.stack.links("seaweedfs", process.name)
        link.watch(b"PUT ").wait(LEASE_SECONDS)
        return process

    def idle(self, processes: Sequence[Process]) -> None:
        """Wait until workers have loaded their pipeline and are idle."""

        def ready() -> bool:
            states = {
                row["pid"]: row["state"]
                for row in self.truth.workers([process.pid for process in processes])
            }
            return all(states.get(process.pid) == "idle" for process in processes)

        self.wait(ready, "the workers were idle")

    def faulty(self, links: Sequence[Link], fault: Fault, least: float, most: float) -> None:
        """Put a fault on links for a random time."""
        for link in links:
            link.begin(fault)
        try:
            self.pause(least, most)
        finally:
            for link in links:
                link.heal()
