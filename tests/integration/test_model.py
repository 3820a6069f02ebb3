"""The store against a model of it: any order of moves, by several workers, zombies among them.

Hypothesis chooses the moves: people submit, pause, resume, cancel and retry; workers claim and use
every lease that they ever had, also long after it was taken away; leases lapse, and are swept.
After each move the whole database must be what the model says it is. Which frames a claim picks is
the store's choice, and only checked to be a legal one.

`MODEL_EXAMPLES=5000 python -m pytest tests/integration/test_model.py` runs longer, and each time
with other moves.
"""

from __future__ import annotations

import os
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import date
from hashlib import sha256
from typing import Any
from unittest import mock

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Row, event, text

from farm import jobs
from farm.context import Farm
from farm.errors import Conflict
from farm.states import TERMINAL, FrameState, JobStatus, settled
from farm.store import frames, leases
from farm.store.claim import ClaimedFrame, Fence, Lease
from farm.store.engine import one_statement, transaction
from farm.store.frames import Done, Failure
from farm.store.workers import Account
from tests.farming import fence, hire, new_tenant, sql
from workers.janitor import Janitor

EXAMPLES = int(os.environ.get("MODEL_EXAMPLES", "50"))
LEASE_SECONDS = 600.0
WRITTEN = ("jobs", "frames", "attempts", "returns", "events")

# What is listed twice is drawn twice as often.
WISHES = ["retry", "resume", "pause", "resume", "retry", "retry", "resume", "cancel"]
DEEDS = [
    "complete",
    "complete first",
    "complete last",
    "finish",
    "finish",
    "ask_whether_complete",
    "fail",
    "fail out_of_memory",
    "fail out_of_memory",
    "flag",
    "release",
    "release first",
    "touch",
    "keep",
    "keep",
    "lapse",
    "renew",
    "lose",
    "leave",
    "forget",
    "forget_older",
    "wish pause",
    "wish resume",
    "wish cancel",
    "wish cancel",
    "wish retry",
]
ZOMBIES_DEEDS = ["complete", "finish", "fail", "fail out_of_memory", "flag", "release"]
READ = {
    name: text(query)
    for name, query in {
        "jobs": "SELECT * FROM jobs",
        "frames": "SELECT * FROM frames",
        "attempts": "SELECT * FROM attempts ORDER BY attempt",
        "returns": "SELECT job_id, ordinal, alone, paused FROM returns",
        "leases": "SELECT *, extract(epoch FROM expires_at - clock_timestamp()) AS seconds"
        " FROM leases",
        "events": "SELECT * FROM events ORDER BY id",
    }.items()
}
Rows = Sequence[Row[Any]]
Place = tuple[uuid.UUID, int]
Announced = tuple[str, uuid.UUID, int, int]
W, R = FrameState.WAITING, FrameState.RUNNING


# The model


@dataclass
class ModelFrame:
    """What a frame is: where it stands, and what it went through."""

    state: FrameState = W
    attempt: int = 0
    spared: int = 0
    alone: bool = False
    ended: list[tuple[int, str]] = field(default_factory=list)
    """The attempts that did not succeed, each with its reason."""

    def end(self, most: int, reason: str, *, charged: bool, dead: bool, alone: bool) -> None:
        """End a running attempt: the rule of charging, whole."""
        self.ended.append((self.attempt, reason))
        self.spared += not charged
        used_up = self.attempt - self.spared >= most
        self.state = FrameState.DEAD if charged and (dead or used_up) else FrameState.READY
        self.alone = self.alone or alone or charged


@dataclass
class ModelJob:
    """A job: its frames, of which those never claimed have no row, and its owner's wishes."""

    tenant: uuid.UUID
    frames: list[ModelFrame]
    max_attempts: int
    open_bucket: bool
    held: bool = False
    cancelled: bool = False

    def count(self, state: FrameState) -> int:
        return sum(frame.state is state for frame in self.frames)

    @property
    def status(self) -> JobStatus:
        if self.cancelled:
            return JobStatus.CANCELLED
        if not any(frame.attempt for frame in self.frames):
            return JobStatus.QUEUED
        succeeded, dead = self.count(FrameState.SUCCEEDED), self.count(FrameState.DEAD)
        return settled(len(self.frames), succeeded, dead, 0) or JobStatus.RUNNING

    @property
    def paused(self) -> bool:
        """Whether it is held back; one that has ended is not, nor when it is retried."""
        self.held = self.held and self.status not in TERMINAL
        return self.held

    @property
    def claimable(self) -> bool:
        waits = self.count(W) + self.count(FrameState.READY)
        return waits > 0 and not self.paused and not self.cancelled


# The machine


class StoreMachine(RuleBasedStateMachine):
    """Moves, each made on the store and on the model."""

    job_ids: Bundle[uuid.UUID] = Bundle("job_ids")
    leases: Bundle[Lease] = Bundle("leases")

    def __init__(self, farm: Farm, tenants: list[uuid.UUID]) -> None:
        super().__init__()
        more = "leases, workers, shares, input_chunks, prints, renders"
        sql(farm, f"TRUNCATE {', '.join(WRITTEN)}, {more}")
        self.farm = farm
        self.tenants = tenants
        self.hands = [hire(farm, name) for name in ("hand", "slow", "fast")]
        self.jobs: dict[uuid.UUID, ModelJob] = {}
        self.wishes = 0
        self.given: list[Lease] = []
        self.lapsed: set[uuid.UUID] = set()
        self.kept: set[uuid.UUID] = set()
        self.keyed: dict[str, tuple[Any, uuid.UUID]] = {}

    # People's moves

    @initialize(target=job_ids, images=st.integers(1, 6), max_attempts=st.integers(1, 3))
    def begin(self, images: int, max_attempts: int) -> Any:
        return self.submit(0, images, [2.0], max_attempts, None, "normal", None)

    @precondition(lambda self: sum(job.status not in TERMINAL for job in self.jobs.values()) < 4)
    @rule(
        target=job_ids,
        tenant=st.integers(0, 1),
        images=st.integers(1, 4),
        guidance=st.sampled_from([[2.0], [2.0], [4.0], [2.0, 4.0]]),
        max_attempts=st.integers(1, 3),
        bucket=st.sampled_from([None, None, 1, 2, 4]),
        priority=st.sampled_from(["normal", "bulk", "interactive"]),
        key=st.sampled_from([None, None, "a", "b"]),
    )
    def submit(
        self,
        tenant: int,
        images: int,
        guidance: list[float],
        max_attempts: int,
        bucket: int | None,
        priority: str,
        key: str | None,
    ) -> Any:
        body = {
            "pipeline": "demo",
            "prompts": ["a red star"],
            "images_per_prompt": images,
            "grid": {"guidance_scale": guidance},
            "max_attempts": max_attempts,
            "bucket": bucket,
            "priority": priority,
        }
        owner = self.tenants[tenant]
        name = f"{tenant}{key}"
        if key and name in self.keyed:
            before, same = self.keyed[name]
            if before != body:
                with pytest.raises(Conflict):
                    jobs.submit(self.farm, owner, body, key)
                return multiple()
            assert jobs.submit(self.farm, owner, body, key).id == same
            return multiple()
        job_id = jobs.submit(self.farm, owner, body, key).id
        born = [ModelFrame() for _ in range(images * len(guidance))]
        self.jobs[job_id] = ModelJob(owner, born, max_attempts, bucket is None)
        if key:
            self.keyed[name] = body, job_id
        return job_id

    @precondition(lambda self: self.wishes < len(self.given))
    @rule(job_id=job_ids, wish=st.sampled_from(WISHES))
    def steer(self, job_id: uuid.UUID, wish: str) -> None:
        self.wishes += 1
        getattr(self, wish)(job_id)
        self.check_nothing_else_is_claimed()

    def pause(self, job_id: uuid.UUID) -> None:
        job = self.jobs[job_id]
        with refused_if(job.status in TERMINAL):
            jobs.pause(self.farm, job.tenant, job_id)
            job.held = True

    def resume(self, job_id: uuid.UUID) -> None:
        job = self.jobs[job_id]
        with refused_if(job.status in TERMINAL):
            jobs.resume(self.farm, job.tenant, job_id)
            job.held = False

    def cancel(self, job_id: uuid.UUID) -> None:
        job = self.jobs[job_id]
        with refused_if(job.status in TERMINAL and not job.cancelled):
            jobs.cancel(self.farm, job.tenant, job_id)
            job.cancelled, job.held = True, False
            for frame in job.frames:
                if frame.state is R:
                    frame.ended.append((frame.attempt, "cancelled"))
                if frame.state in (W, R, FrameState.READY):
                    frame.state = FrameState.CANCELLED

    def wish(self, lease: Lease, wish: str) -> None:
        getattr(self, wish)(lease.frames[-1].job_id)

    def retry(self, job_id: uuid.UUID) -> None:
        job = self.jobs[job_id]
        dead = [frame for frame in job.frames if frame.state is FrameState.DEAD]
        with refused_if(job.cancelled or not dead):
            assert jobs.retry(self.farm, job.tenant, job_id) == len(dead)
            for frame in dead:
                frame.state, frame.spared, frame.alone = FrameState.READY, frame.attempt, False

    # Workers' moves

    @precondition(lambda self: self.something_waits())
    @rule(target=leases, who=st.integers(0, 2))
    def claim(self, who: int) -> Lease:
        return self.take(who)

    @precondition(lambda self: self.something_waits())
    @rule(target=leases, who=st.integers(0, 2))
    def claim_and_complete(self, who: int) -> Lease:
        """Do what a worker does when all is well."""
        lease = self.take(who)
        self.complete(lease)
        return lease

    @precondition(lambda self: any(self.is_open(lease) for lease in self.given))
    @rule(target=leases, who=st.integers(0, 2), deed=st.sampled_from(ZOMBIES_DEEDS))
    def take_over(self, who: int, deed: str) -> Any:
        """Claim after the newest lease has expired; then whoever had it, a zombie, uses it."""
        old = self.newest()
        self.lapse(old)
        self.expire()
        if not self.something_waits():
            return multiple()
        lease = self.take(who)
        self.do(old, deed)
        return lease

    def take(self, who: int) -> Lease:
        with skewed(who):
            lease = self.hands[who].claim(lease_seconds=LEASE_SECONDS)
        assert lease is not None
        # Ids are random: by the order of submission the same moves mean the same in each run.
        order = [*self.jobs]
        by_age = sorted(lease.frames, key=lambda frame: (order.index(frame.job_id), frame.ordinal))
        lease = replace(lease, frames=tuple(by_age))
        self.check_choice(lease)
        for claimed in lease.frames:
            frame = self.frame(claimed)
            assert claimed.attempt == frame.attempt + 1
            frame.state, frame.attempt = R, claimed.attempt
        self.given.append(lease)
        self.check_nothing_else_is_claimed()
        return lease

    def check_nothing_else_is_claimed(self) -> None:
        if not self.something_waits():
            assert self.hands[0].claim() is None

    def check_choice(self, lease: Lease) -> None:
        """A batch holds what may be claimed, of one shape, and nothing beside a lone frame."""
        assert len({(frame.job_id, frame.ordinal) for frame in lease.frames}) == len(lease.frames)
        assert all(self.jobs[frame.job_id].claimable for frame in lease.frames)
        assert {self.frame(frame).state for frame in lease.frames} <= {W, FrameState.READY}
        assert len({(f.spec.bucket, f.spec.params["guidance_scale"]) for f in lease.frames}) == 1
        assert len(lease.frames) <= lease.frames[0].spec.bucket
        assert len(lease.frames) == 1 or not any(self.frame(f).alone for f in lease.frames)

    @rule(lease=leases, deed=st.sampled_from(DEEDS))
    def use(self, lease: Lease, deed: str) -> None:
        """Use a lease, however old it is."""
        self.do(lease, deed)

    def do(self, lease: Lease, deed: str) -> None:
        word, *part = deed.split()
        getattr(self, word)(lease, *part)

    @precondition(lambda self: any(self.is_open(lease) for lease in self.given))
    @rule(deed=st.sampled_from(DEEDS))
    def use_newest(self, deed: str) -> None:
        self.do(self.newest(), deed)

    def complete(self, lease: Lease, part: str = "all") -> None:
        fences = parted(lease, part)
        with self.untouched_unless(fences) as held, skewed(self.who(lease)):
            assert self.hands[self.who(lease)].complete(lease, fences) == set(held)
        for item in held:
            self.frame_at(item).state = FrameState.SUCCEEDED

    def finish(self, lease: Lease) -> None:
        """Complete whatever its worker was ever given, in one statement: some of it long lost."""
        given = self.beside(lease)
        done = [
            Done(item, digest(item), 100 + slot, slot)
            for other in given
            for slot, item in enumerate(parted(other, "all"))
        ]
        ids = [other.id for other in given]
        with (
            self.untouched_unless([item.fence for item in done]) as held,
            skewed(self.who(lease)),
            one_statement(self.farm.store) as connection,
        ):
            accepted = frames.finish(connection, ids, done, lease.worker_id, Account())
        assert accepted == set(held)
        for item in held:
            self.frame_at(item).state = FrameState.SUCCEEDED

    def ask_whether_complete(self, lease: Lease) -> None:
        """Ask as after a COMMIT whose answer was lost."""
        fences = parted(lease, "all")
        won = [self.is_won(item) for item in fences]
        with transaction(self.farm.store) as connection:
            done = [Done(item, digest(item), 100, slot) for slot, item in enumerate(fences)]
            assert frames.already_complete(connection, done) == all(won)

    def fail(self, lease: Lease, reason: str = "render_error") -> None:
        """Fail a batch as the render line does: one of several may be why, so none is charged."""
        several, memory = len(lease.frames) > 1, reason == "out_of_memory"
        failure = Failure(
            fence(lease.frames[0]),
            reason,
            "It broke.",
            charged=not several,
            alone=several,
            smaller=memory,
        )
        fences = parted(lease, "all")
        with self.untouched_unless(fences) as held:
            failed = self.hand_fails(lease, [replace(failure, fence=item) for item in fences])
        for claimed in lease.frames:
            if fence(claimed) in held:
                # What was too large for the memory is tried again, smaller, with all the others.
                halved = (
                    memory and self.jobs[claimed.job_id].open_bucket and claimed.spec.bucket > 1
                )
                charged, alone = (False, False) if halved else (not several, several)
                self.end(fence(claimed), reason, charged=charged, alone=alone)
        assert failed == {item: self.frame_at(item).state for item in held}

    def flag(self, lease: Lease) -> None:
        """Fail one frame of a batch for good: its own fault, and no other's."""
        item = fence(lease.frames[-1])
        with self.untouched_unless([item]) as held:
            failed = self.hand_fails(lease, [Failure(item, "flagged", "No.", retryable=False)])
        for item in held:
            self.end(item, "flagged", dead=True)
        assert failed == dict.fromkeys(held, FrameState.DEAD)

    def release(self, lease: Lease, part: str = "all") -> None:
        fences = parted(lease, part)
        with self.untouched_unless(fences) as held, transaction(self.farm.store) as connection:
            assert frames.release(connection, lease.id, fences) == set(held)
        for item in held:
            self.end(item, "released", charged=False)

    def touch(self, lease: Lease) -> None:
        fences = parted(lease, "all")
        with self.untouched_unless([]), transaction(self.farm.store) as connection:
            assert leases.touch(connection, lease.id, 1, 2).wanted == any(self.holding(fences))

    def keep(self, lease: Lease) -> None:
        """Say that it is rendered, and waits for the storage."""
        with self.untouched_unless([]), transaction(self.farm.store) as connection:
            leases.keep(connection, lease.id)
        self.kept.add(lease.id)

    # The same for all that its worker holds

    def renew(self, lease: Lease) -> None:
        with skewed(self.who(lease)), transaction(self.farm.store) as connection:
            renewed = leases.renew(connection, lease.worker_id, LEASE_SECONDS)
        ids = {row.id for row in renewed}
        assert {other.id for other in self.beside(lease) if self.is_open(other)} <= ids
        assert ids <= {other.id for other in self.beside(lease)}
        self.lapsed -= ids

    def lose(self, lease: Lease) -> None:
        """The child ended, or its parent takes it for dead; it may still be heard of."""
        self.hands[self.who(lease)].lose()
        for other in self.beside(lease):
            self.drop(other, "worker_lost")

    def leave(self, lease: Lease) -> None:
        with transaction(self.farm.store) as connection:
            leases.release_all(connection, lease.worker_id)
        self.give_back(self.beside(lease))

    def forget(self, lease: Lease) -> None:
        """The reply to a claim was lost: the child gives back what it does not know of."""
        self.forget_all_but(lease, [])

    def forget_older(self, lease: Lease) -> None:
        self.forget_all_but(lease, self.beside(lease)[-1:])

    def forget_all_but(self, lease: Lease, known: list[Lease]) -> None:
        pid, ids = self.hands[self.who(lease)].pid, [other.id for other in known]
        with transaction(self.farm.store) as connection:
            leases.release_forgotten(connection, lease.worker_id, pid, ids)
        self.give_back([other for other in self.beside(lease) if other not in known])

    # Time's moves

    def lapse(self, lease: Lease) -> None:
        """Let a lease's time be up, on Postgres's clock."""
        past = "expires_at = clock_timestamp() - interval '1 second'"
        sql(self.farm, f"UPDATE leases SET {past} WHERE id = :id", id=lease.id)
        self.lapsed.add(lease.id)

    def expire(self) -> None:
        with transaction(self.farm.store) as connection:
            leases.expire(connection, 0.0)
        self.model_expires()

    @precondition(lambda self: self.lapsed)
    @rule()
    def sweep(self) -> None:
        """The janitor does everything that is due."""
        with self.farm.store.connect() as connection:
            Janitor(self.farm).sweep(connection)
        self.model_expires()

    def model_expires(self) -> None:
        for lease in self.given:
            if lease.id in self.lapsed:
                self.drop(lease, "lease_expired")
        self.lapsed.clear()

    # What the model makes of them

    def something_waits(self) -> bool:
        return any(job.claimable for job in self.jobs.values())

    def frame_at(self, item: Fence | Place) -> ModelFrame:
        return self.jobs[item[0]].frames[item[1]]

    def frame(self, claimed: ClaimedFrame) -> ModelFrame:
        return self.frame_at((claimed.job_id, claimed.ordinal))

    def holding(self, fences: Iterable[Fence]) -> list[Fence]:
        """Tell which attempts still run: all that a write may change."""
        return [
            item
            for item in fences
            if self.frame_at(item).state is R and self.frame_at(item).attempt == item[2]
        ]

    def is_won(self, item: Fence) -> bool:
        frame = self.frame_at(item)
        return frame.state is FrameState.SUCCEEDED and frame.attempt == item[2]

    def newest(self) -> Lease:
        return [lease for lease in self.given if self.is_open(lease)][-1]

    def is_open(self, lease: Lease) -> bool:
        return bool(self.holding(parted(lease, "all")))

    def end(
        self,
        item: Fence,
        reason: str,
        *,
        charged: bool = True,
        dead: bool = False,
        alone: bool = False,
    ) -> None:
        most = self.jobs[item[0]].max_attempts
        self.frame_at(item).end(most, reason, charged=charged, dead=dead, alone=alone)

    def drop(self, lease: Lease, reason: str) -> None:
        """End a lease from outside: of several frames any one may be why, so none is charged.

        Nor is any where the batch was rendered and only waited for the storage.
        """
        kept, several = lease.id in self.kept, len(lease.frames) > 1
        for item in self.holding(parted(lease, "all")):
            self.end(item, reason, charged=not (kept or several), alone=several and not kept)

    def give_back(self, leases: Iterable[Lease]) -> None:
        for lease in leases:
            for item in self.holding(parted(lease, "all")):
                self.end(item, "released", charged=False)

    def beside(self, lease: Lease) -> list[Lease]:
        """List all leases that the same worker was ever given."""
        return [other for other in self.given if other.worker_id == lease.worker_id]

    def who(self, lease: Lease) -> int:
        return [hand.id for hand in self.hands].index(lease.worker_id)

    def hand_fails(self, lease: Lease, failures: list[Failure]) -> dict[Fence, FrameState]:
        with transaction(self.farm.store) as connection:
            return frames.fail(connection, lease.id, failures, 0.0)

    @contextmanager
    def untouched_unless(self, fences: list[Fence]) -> Iterator[list[Fence]]:
        """Give those attempts that still run; without any, the block may change nothing at all."""
        held = self.holding(fences)
        before = None if held else self.written()
        yield held
        assert held or self.written() == before, "a lost lease changed something"

    def written(self) -> list[Any]:
        row = "SELECT md5(string_agg(t::text, '' ORDER BY t::text)) FROM {} t"
        return [sql(self.farm, row.format(table)) for table in WRITTEN]

    # The database against the model, after each move

    @invariant()
    def the_database_is_the_model(self) -> None:
        with transaction(self.farm.store) as connection:
            read = {name: connection.execute(query).all() for name, query in READ.items()}
        self.check_jobs(read["jobs"])
        self.check_frames(read["frames"])
        self.check_attempts(read["attempts"])
        self.check_returns(read["returns"])
        self.check_leases(read["leases"])
        self.check_events(read["events"])

    def check_jobs(self, read: Rows) -> None:
        """Durability and conservation."""
        rows = {row.id: row for row in read}
        assert set(rows) == set(self.jobs)
        for job_id, job in self.jobs.items():
            row, born = rows[job_id], [frame.attempt > 0 for frame in job.frames]
            assert born == [ordinal < row.cursor for ordinal in range(row.total)]
            assert (row.status, row.paused) == (job.status, job.paused)
            assert row.open == (row.cursor < row.total and not job.paused and not job.cancelled)
            for state in ("running", "succeeded", "dead", "cancelled"):
                assert getattr(row, state) == job.count(FrameState(state)), state

    def check_frames(self, read: Rows) -> None:
        """Each frame is where the model has it, and a succeeded one names its winner's bytes."""
        found = {(row.job_id, row.ordinal): row for row in read}
        for job_id, ordinal, frame in self.every_frame():
            if frame.attempt:
                row = found.pop((job_id, ordinal))
                assert (row.state, row.attempt) == (frame.state, frame.attempt)
                assert row.spared == frame.spared
                won = frame.state is FrameState.SUCCEEDED
                assert row.sha256 == (digest((job_id, ordinal, frame.attempt)) if won else None)
        assert not found

    def check_attempts(self, read: Rows) -> None:
        """Ledger: attempts run from 1, each that ended has one reason, at most one is open."""
        found: dict[Place, list[tuple[int, str]]] = {}
        for row in read:
            found.setdefault((row.job_id, row.ordinal), []).append((row.attempt, row.reason))
        for job_id, ordinal, frame in self.every_frame():
            assert found.pop((job_id, ordinal), []) == frame.ended
            assert frame.attempt - frame.spared <= self.jobs[job_id].max_attempts
            kept = frame.state in (R, FrameState.SUCCEEDED)
            assert frame.attempt == len(frame.ended) + kept
        assert not found

    def check_returns(self, read: Rows) -> None:
        """What may be claimed again stands in `returns`, and nothing else."""
        assert {tuple(row) for row in read} == {
            (job_id, ordinal, frame.alone, self.jobs[job_id].paused)
            for job_id, ordinal, frame in self.every_frame()
            if frame.state is FrameState.READY
        }

    def check_leases(self, read: Rows) -> None:
        """Each running attempt stands in one lease, whose end is on Postgres's clock."""
        held = Counter[Fence]()
        for row in read:
            low, high = (-60, 0) if row.id in self.lapsed else (LEASE_SECONDS - 120, LEASE_SECONDS)
            assert low < row.seconds <= high
            held.update(self.holding(zip(row.job_ids, row.ordinals, row.attempts, strict=True)))
        assert held == Counter(
            (job_id, ordinal, frame.attempt)
            for job_id, ordinal, frame in self.every_frame()
            if frame.state is R
        )

    def check_events(self, read: Rows) -> None:
        """Each attempt is announced as it begins and as it ends; nothing is after a cancel."""
        told, last = Counter[Announced](), dict[uuid.UUID, str]()
        for row in read:
            assert last.get(row.job_id) != "job.cancelled", f"{row.kind} after a cancel"
            if row.kind.removeprefix("job.") in list(JobStatus):
                last[row.job_id] = row.kind.removeprefix("job.")
            told.update((row.kind, row.job_id, *it[:2]) for it in row.data.get("frames", []))
        assert last == {job_id: job.status for job_id, job in self.jobs.items()}
        assert told == Counter(self.announcements())

    def announcements(self) -> Iterator[Announced]:
        for job_id, ordinal, frame in self.every_frame():
            for attempt in range(1, frame.attempt + 1):
                yield "frames.claimed", job_id, ordinal, attempt
            for attempt, reason in frame.ended:
                if reason != "cancelled":
                    kind = "released" if reason == "released" else "failed"
                    yield f"frames.{kind}", job_id, ordinal, attempt
            if frame.state is FrameState.SUCCEEDED:
                yield "frames.succeeded", job_id, ordinal, frame.attempt

    def every_frame(self) -> Iterator[tuple[uuid.UUID, int, ModelFrame]]:
        for job_id, job in self.jobs.items():
            for ordinal, frame in enumerate(job.frames):
                yield job_id, ordinal, frame


def parted(lease: Lease, part: str) -> list[Fence]:
    fences = [fence(frame) for frame in lease.frames]
    return {"all": fences, "first": fences[:1], "last": fences[-1:]}[part]


def digest(item: Fence) -> bytes:
    return sha256(repr(item).encode()).digest()


@contextmanager
def refused_if(refused: bool) -> Iterator[None]:
    if refused:
        with pytest.raises(Conflict):
            yield
    else:
        yield


@contextmanager
def skewed(who: int) -> Iterator[None]:
    """Let a worker's own clock be right, or hours behind or ahead."""
    hours = (0, -5, 5)[who]
    with mock.patch("time.time", return_value=time.time() + 3600 * hours):
        yield


def refuse_times(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
    """Fail where a statement is given a point in time: leases live by Postgres's clock alone."""
    many = parameters if isinstance(parameters, list) else [parameters]
    for value in (value for values in many for value in dict(values or {}).values()):
        told = abs(value - time.time()) < 86_400 if isinstance(value, int | float) else False
        assert not told, f"a time was sent with {statement}"
        assert not isinstance(value, date), f"a time was sent with {statement}"


@pytest.mark.timeout(600 + 5 * EXAMPLES)
def test_the_store_does_what_the_model_does(farm: Farm) -> None:
    tenants = [new_tenant(farm, name) for name in ("ann", "bob")]
    event.listen(farm.store, "before_cursor_execute", refuse_times)

    class Machine(StoreMachine):
        def __init__(self) -> None:
            super().__init__(farm, tenants)

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=50,
            derandomize="MODEL_EXAMPLES" not in os.environ,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        ),
    )
