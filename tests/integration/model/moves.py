"""The base of all moves: the store, the model, the workers, and the passing of time."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
from hypothesis.stateful import Bundle, RuleBasedStateMachine, precondition, rule
from sqlalchemy import text

from farm.context import Farm
from farm.errors import Conflict
from farm.store import leases
from farm.store.claim import Fence, Lease
from farm.store.engine import one_statement, transaction
from tests.integration.model.model import PLAN, Model
from tests.support.store import register_worker, sql
from workers.janitor.janitor import Janitor

WRITTEN = ("jobs", "frames", "attempts", "requeued_frames", "events", "reusable_renders")
ALSO_EMPTIED = (
    "lanes",
    "device_use",
    "leases",
    "workers",
    "shares",
    "job_prompts",
    "job_groups",
    "job_order",
    "perceptual_hashes",
    "job_webhooks",
    "frame_provenances",
)

JOB_IDS: Bundle[uuid.UUID] = Bundle("job_ids")
LEASES: Bundle[Lease] = Bundle("leases")


class Moves(RuleBasedStateMachine):
    """A store without jobs, its model, and three workers."""

    def __init__(self, farm: Farm, tenants: list[uuid.UUID]) -> None:
        super().__init__()
        sql(farm, f"TRUNCATE {', '.join(WRITTEN + ALSO_EMPTIED)}")
        sql(farm, "UPDATE tenants SET max_running_frames = NULL")
        self.farm = farm
        self.tenants = tenants
        self.model = Model()
        self.hands = [
            replace(register_worker(farm, name), plans=json.dumps({"default": PLAN}))
            for name in ("hand", "slow", "fast")
        ]
        self.wishes = 0
        self.keyed: dict[str, tuple[Any, uuid.UUID]] = {}

    def who(self, lease: Lease) -> int:
        return [worker.id for worker in self.hands].index(lease.worker_id)

    def check_nothing_else_is_claimed(self) -> None:
        self.look()
        if not self.model.something_waits():
            assert self.hands[0].claim() is None

    @contextmanager
    def untouched_unless(self, fences: list[Fence]) -> Iterator[list[Fence]]:
        """Yield the attempts that still run. If there are none, the block must change nothing."""
        held = self.model.holding(fences)
        before = None if held else self.written()
        yield held
        assert held or self.written() == before, "a lost lease changed something"

    def written(self) -> Any:
        """Return a hash of each table that a move may write."""
        row = "(SELECT md5(string_agg(t::text, '' ORDER BY t::text)) FROM {} t)"
        with one_statement(self.farm.store) as connection:
            query = "SELECT " + ", ".join(row.format(table) for table in WRITTEN)
            return connection.execute(text(query)).one()

    # Moves of time

    def lapse(self, lease: Lease) -> None:
        """Let a lease end, by Postgres's clock."""
        past = "expires_at = clock_timestamp() - interval '1 second'"
        sql(self.farm, f"UPDATE leases SET {past} WHERE id = :id", id=lease.id)
        self.model.lapsed.add(lease.id)

    def expire(self) -> None:
        with transaction(self.farm.store) as connection:
            leases.expire(connection, 0.0)
        self.model.expire_lapsed()
        self.look()

    def look(self) -> None:
        """Read which leases have not ended."""
        self.model.held = {row.id for row in sql(self.farm, "SELECT id FROM leases")}

    @precondition(lambda self: self.model.lapsed)
    @rule()
    def sweep(self) -> None:
        """Run all due work of the janitor."""
        with self.farm.store.connect() as connection:
            Janitor(self.farm).sweep(connection)
        self.model.expire_lapsed()


@contextmanager
def refused_if(refused: bool) -> Iterator[None]:
    if refused:
        with pytest.raises(Conflict):
            yield
    else:
        yield


@contextmanager
def skewed(who: int) -> Iterator[None]:
    """Set a worker's own clock: correct, hours behind or hours ahead."""
    hours = (0, -5, 5)[who]
    with mock.patch("time.time", return_value=time.time() + 3600 * hours):
        yield
