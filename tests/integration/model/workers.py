"""Moves of workers: they claim, and use every lease that they ever had, even old ones."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
from hypothesis.stateful import multiple, precondition, rule

from farm.domain.states import FrameState
from farm.store import frames, leases
from farm.store.claim import Fence, Lease
from farm.store.engine import one_statement, reads, transaction
from farm.store.frames import CompletedFrame, FailedAttempt
from farm.store.reuse import find_renders
from farm.store.workers import Account
from tests.integration.model.model import LEASE_SECONDS, PLAN, R, W, parted, recipe, rendered
from tests.integration.model.moves import LEASES, skewed
from tests.integration.model.people import PeoplesMoves
from tests.support.store import fence

# A move that is listed twice is chosen twice as often.
DEEDS = [
    "complete",
    "complete first",
    "complete last",
    "finish",
    "finish",
    "reuse",
    "reuse",
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
ZOMBIES_DEEDS = ["complete", "finish", "reuse", "fail", "fail out_of_memory", "flag", "release"]


class WorkersMoves(PeoplesMoves):
    """Moves of workers, each made on the store and on the model."""

    @precondition(lambda self: self.model.something_waits())
    @rule(target=LEASES, who=st.integers(0, 2))
    def claim(self, who: int) -> Lease:
        return self.take(who)

    @precondition(lambda self: self.model.something_waits())
    @rule(target=LEASES, who=st.integers(0, 2))
    def claim_and_complete(self, who: int) -> Lease:
        """Claim a batch, reuse what is stored and complete the others, the normal case."""
        lease = self.take(who)
        self.reuse(lease)
        self.complete(lease)
        return lease

    @precondition(lambda self: any(self.model.is_open(lease) for lease in self.model.given))
    @rule(target=LEASES, who=st.integers(0, 2), deed=st.sampled_from(ZOMBIES_DEEDS))
    def take_over(self, who: int, deed: str) -> Any:
        """Claim after the newest lease has expired. Then its former holder, a zombie, uses it."""
        old = self.model.newest()
        self.lapse(old)
        self.expire()
        if not self.model.something_waits():
            return multiple()
        lease = self.take(who)
        self.do(old, deed)
        return lease

    def take(self, who: int) -> Lease:
        with skewed(who):
            lease = self.hands[who].claim(lease_seconds=LEASE_SECONDS)
        assert lease is not None
        # IDs are random. In the order of submission, equal moves have equal effects in each run.
        order = [*self.model.jobs]
        by_age = sorted(lease.frames, key=lambda frame: (order.index(frame.job_id), frame.ordinal))
        lease = replace(lease, frames=tuple(by_age))
        self.check_choice(lease)
        for claimed in lease.frames:
            frame = self.model.frame(claimed)
            assert claimed.attempt == frame.attempt + 1
            frame.state, frame.attempt = R, claimed.attempt
        self.model.given.append(lease)
        self.check_nothing_else_is_claimed()
        return lease

    def check_choice(self, lease: Lease) -> None:
        """A batch holds claimable frames of one shape. An isolated frame is the only one in it."""
        assert len({(frame.job_id, frame.ordinal) for frame in lease.frames}) == len(lease.frames)
        assert all(self.model.jobs[frame.job_id].claimable for frame in lease.frames)
        for tenant, count in Counter(frame.tenant_id for frame in lease.frames).items():
            assert count <= self.model.room(tenant)
        assert {self.model.frame(frame).state for frame in lease.frames} <= {W, FrameState.READY}
        assert len({(f.spec.bucket, f.spec.params["guidance_scale"]) for f in lease.frames}) == 1
        [bucket] = {frame.spec.bucket for frame in lease.frames}
        [given] = {self.model.jobs[frame.job_id].bucket for frame in lease.frames}
        # If the bucket is open, this plan leaves frames behind rather than pad.
        assert bucket == (given or len(lease.frames))
        assert len(lease.frames) <= bucket
        assert given is not None or bucket in PLAN
        assert len(lease.frames) == 1 or not any(self.model.frame(f).isolated for f in lease.frames)

    @rule(lease=LEASES, deed=st.sampled_from(DEEDS))
    def use(self, lease: Lease, deed: str) -> None:
        """Use a lease of any age."""
        self.do(lease, deed)

    def do(self, lease: Lease, deed: str) -> None:
        word, *part = deed.split()
        getattr(self, word)(lease, *part)

    @precondition(lambda self: any(self.model.is_open(lease) for lease in self.model.given))
    @rule(deed=st.sampled_from(DEEDS))
    def use_newest(self, deed: str) -> None:
        self.do(self.model.newest(), deed)

    def complete(self, lease: Lease, part: str = "all") -> None:
        self.end_by(lease, rendered(lease, part))

    def reuse(self, lease: Lease) -> None:
        """End the frames that equal stored ones with these artifacts, instead of a render."""
        done = []
        for claimed in lease.frames:
            key, owner = recipe(claimed), self.model.jobs[claimed.job_id].tenant
            if key is None:
                continue
            with reads(self.farm.store) as connection:
                found = find_renders(connection, owner, [key])
            assert bool(found) == ((owner, key) in self.model.renders)
            for row in found.values():
                assert (row.job_id, row.ordinal) in self.model.renders[owner, key]
                assert row.sha256 == self.model.jobs[row.job_id].frames[row.ordinal].sha256
                item = fence(claimed)
                done.append(CompletedFrame(item, row.sha256, row.bytes, row.slot, key, reused=True))
        if done:
            self.end_by(lease, done)

    def end_by(self, lease: Lease, done: list[CompletedFrame]) -> None:
        with (
            self.untouched_unless([item.fence for item in done]) as held,
            skewed(self.who(lease)),
            transaction(self.farm.store) as connection,
        ):
            assert frames.complete(connection, lease.id, done) == set(held)
        self.model.succeed(item for item in done if item.fence in held)

    def finish(self, lease: Lease) -> None:
        """Complete all leases that its worker ever had in one statement. Some of them are lost."""
        given = self.model.same_workers(lease)
        done = [item for other in given for item in rendered(other)]
        ids = [other.id for other in given]
        with (
            self.untouched_unless([item.fence for item in done]) as held,
            skewed(self.who(lease)),
            one_statement(self.farm.store) as connection,
        ):
            accepted = frames.complete_batches(connection, ids, done, lease.worker_id, Account())
        assert accepted == set(held)
        self.model.succeed(item for item in done if item.fence in held)

    def ask_whether_complete(self, lease: Lease) -> None:
        """Ask for completion, as after a COMMIT with a lost answer."""
        done = rendered(lease)
        won = [self.model.is_won(item) for item in done]
        with transaction(self.farm.store) as connection:
            assert frames.already_complete(connection, done) == all(won)

    def fail(self, lease: Lease, reason: str = "render_error") -> None:
        """Fail a batch as the render loop does. With several frames none is charged."""
        several, memory = len(lease.frames) > 1, reason == "out_of_memory"
        failure = FailedAttempt(
            fence(lease.frames[0]),
            reason,
            "It broke.",
            charged=not several,
            isolated=several,
            smaller=memory,
        )
        fences = parted(lease, "all")
        with self.untouched_unless(fences) as held:
            failed = self.hand_fails(lease, [replace(failure, fence=item) for item in fences])
        for claimed in lease.frames:
            if fence(claimed) in held:
                # A batch that is too large for the memory is tried again with a smaller bucket.
                halved = (
                    memory
                    and self.model.jobs[claimed.job_id].bucket is None
                    and claimed.spec.bucket > 1
                )
                charged, isolated = (False, False) if halved else (not several, several)
                self.model.end(fence(claimed), reason, charged=charged, isolated=isolated)
        assert failed == {item: self.model.frame_at(item).state for item in held}

    def flag(self, lease: Lease) -> None:
        """Fail one frame of a batch permanently. No other frame is affected."""
        item = fence(lease.frames[-1])
        with self.untouched_unless([item]) as held:
            failed = self.hand_fails(
                lease, [FailedAttempt(item, "flagged", "No.", retryable=False)]
            )
        for item in held:
            self.model.end(item, "flagged", dead=True)
        assert failed == dict.fromkeys(held, FrameState.DEAD)

    def release(self, lease: Lease, part: str = "all") -> None:
        fences = parted(lease, part)
        with self.untouched_unless(fences) as held, transaction(self.farm.store) as connection:
            assert frames.release(connection, lease.id, fences) == set(held)
        for item in held:
            self.model.end(item, "released", charged=False)

    def touch(self, lease: Lease) -> None:
        fences = parted(lease, "all")
        with self.untouched_unless([]), transaction(self.farm.store) as connection:
            assert leases.report_step(connection, lease.id, 1, 2).wanted == any(
                self.model.holding(fences)
            )

    def keep(self, lease: Lease) -> None:
        """Report that the batch is rendered and waits for the storage."""
        with self.untouched_unless([]), transaction(self.farm.store) as connection:
            leases.mark_spooled(connection, lease.id)
        self.model.kept.add(lease.id)

    # The same for all leases of the worker

    def renew(self, lease: Lease) -> None:
        with skewed(self.who(lease)), transaction(self.farm.store) as connection:
            renewed = leases.renew(connection, lease.worker_id, LEASE_SECONDS)
        ids, given = {row.id for row in renewed}, self.model.same_workers(lease)
        assert {other.id for other in given if self.model.is_open(other)} <= ids
        assert ids <= {other.id for other in given}
        self.model.lapsed -= ids

    def lose(self, lease: Lease) -> None:
        """End the child, or let its parent consider it dead. It may still act afterwards."""
        self.hands[self.who(lease)].lose()
        for other in self.model.same_workers(lease):
            self.model.drop(other, "worker_lost")

    def leave(self, lease: Lease) -> None:
        with transaction(self.farm.store) as connection:
            leases.release_all(connection, lease.worker_id)
        self.model.give_back(self.model.same_workers(lease))

    def forget(self, lease: Lease) -> None:
        """Lose the reply to a claim. The child releases the leases that it does not know."""
        self.forget_all_but(lease, [])

    def forget_older(self, lease: Lease) -> None:
        self.forget_all_but(lease, self.model.same_workers(lease)[-1:])

    def forget_all_but(self, lease: Lease, known: list[Lease]) -> None:
        pid, ids = self.hands[self.who(lease)].pid, [other.id for other in known]
        with transaction(self.farm.store) as connection:
            leases.release_unknown(connection, lease.worker_id, pid, ids)
        given = self.model.same_workers(lease)
        self.model.give_back([other for other in given if other not in known])

    def hand_fails(self, lease: Lease, failures: list[FailedAttempt]) -> dict[Fence, FrameState]:
        with transaction(self.farm.store) as connection:
            return frames.fail(connection, lease.id, failures, 0.0)
