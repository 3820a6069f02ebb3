"""The end of batches in Postgres: completed together, or one by one after an error."""

from __future__ import annotations

import logging
import time
import uuid
from collections import defaultdict
from collections.abc import Collection, Sequence
from contextlib import suppress

from farm.context import Farm
from farm.domain.states import FrameState
from farm.errors import Unavailable
from farm.store import frames, provenances, tenants, workers
from farm.store.circuit_breaker import note_failure
from farm.store.claim import ClaimedFrame, Fence
from farm.store.engine import one_statement, reads, transaction
from farm.store.frames import CompletedFrame
from workers.render.batch import RenderedBatch
from workers.render.failures import failures, is_suspicious, named
from workers.render.identity import Identity
from workers.render.retry import retry_while_unavailable

log = logging.getLogger(__name__)


class BatchCommitter:
    """Ends batches that are stored or failed. Waits while Postgres does not answer."""

    def __init__(self, farm: Farm, identity: Identity) -> None:
        self._farm = farm
        self._identity = identity
        self._commit_seconds = 0.0
        """Duration of the previous commit, in seconds. The next commit records it."""

    def end(self, batches: Sequence[RenderedBatch]) -> None:
        """End batches: all those without failures in one commit."""
        self._keep_provenance([item for batch in batches for item in batch.done])
        well = [batch for batch in batches if batch.done and not batch.failures]
        rest = [batch for batch in batches if batch not in well]
        if well and not self._end_together(well):
            rest = [*well, *rest]
        for batch in rest:
            self._end_alone(batch)
        self._ring_for_limited(batches)

    def _keep_provenance(self, done: Sequence[CompletedFrame]) -> None:
        """Store the provenance of frames whose files must not hold it, before they succeed.

        It is of an attempt, so one that was lost changes nothing.
        """
        apart = {item.fence: item.provenance for item in done if item.provenance is not None}
        if not apart:
            return

        def keep() -> None:
            with one_statement(self._farm.store) as connection:
                provenances.keep(connection, apart)

        retry_while_unavailable(self._identity.name, keep)

    def _ring_for_limited(self, batches: Sequence[RenderedBatch]) -> None:
        """Wake a worker of each lane whose work may have waited for the end of these frames."""
        leases = [batch.lease for batch in batches if batch.lease.limited]
        tenant_ids = {frame.tenant_id for lease in leases for frame in lease.frames}
        if not tenant_ids:
            return
        lanes: list[tuple[str, bool]] = []
        with suppress(Unavailable), reads(self._farm.store) as connection:  # the janitor rings too
            lanes = tenants.waiting_lanes(connection, tenant_ids)
        for pipeline, urgent in lanes:
            self._farm.bells.ring(pipeline, urgent=urgent)

    def _end_together(self, batches: Sequence[RenderedBatch]) -> bool:
        """Return True if a frame was accepted. If none was, each batch is ended separately."""
        done = [item for batch in batches for item in batch.done]
        account = sum((batch.accounted() for batch in batches[1:]), batches[0].accounted())
        account.commit_seconds = self._commit_seconds

        def finish() -> set[Fence]:
            with one_statement(self._farm.store) as connection:
                ids = [batch.lease.id for batch in batches]
                return frames.complete_batches(connection, ids, done, self._identity.id, account)

        started = time.monotonic()
        try:
            accepted = retry_while_unavailable(self._identity.name, finish)
        except Exception:  # the database refused; ending each batch shows which one is wrong
            log.exception("%s could not end %d batches together", self._identity.name, len(batches))
            return False
        self._commit_seconds = time.monotonic() - started
        if accepted:
            self._tell_dropped(done, accepted)
            for batch in batches:
                self._trace(batch, started, accepted)
        return bool(accepted)

    def _end_alone(self, batch: RenderedBatch) -> None:
        started = time.monotonic()
        try:
            accepted = retry_while_unavailable(self._identity.name, lambda: self._complete(batch))
        except Exception as error:
            log.error(  # noqa: TRY400 - the traceback is in exc_info
                "%s failed at %s", self._identity.name, named(batch.lease.frames), exc_info=error
            )
            batch.done, batch.failures = [], failures(batch.lease.frames, error)
            batch.suspicious = is_suspicious(error)
            accepted = retry_while_unavailable(self._identity.name, lambda: self._complete(batch))
        self._trace(batch, started, accepted)

    def _complete(self, batch: RenderedBatch) -> Collection[Fence]:
        """Commit a batch, and return the frames that succeeded."""
        done, account, me, until = batch.done, batch.accounted(), self._identity, None
        settings, first = self._farm.settings, batch.lease.frames[0]
        with transaction(self._farm.store) as connection:
            accepted = frames.complete(connection, batch.lease.id, done)
            if not accepted and done and frames.already_complete(connection, done):
                return [item.fence for item in done]  # the reply to an earlier COMMIT was lost
            ended = frames.fail(
                connection, batch.lease.id, batch.failures, settings.retry_seconds
            ).values()
            account.succeeded = len(accepted)
            account.dropped = len(done) - len(accepted)
            account.dead = [*ended].count(FrameState.DEAD)
            account.requeued = [*ended].count(FrameState.READY)
            workers.account(connection, me.id, account)
            if batch.suspicious and not done:
                until = note_failure(
                    connection, me.id, first.job_id, first.ordinal, settings.trip_seconds
                )
        if until is not None:
            log.error("%s is tripped until %s: several frames in a row failed", me.name, until)
        self._tell_dropped(done, accepted)
        return accepted

    def _trace(self, batch: RenderedBatch, started: float, accepted: Collection[Fence]) -> None:
        """Add a committed batch to the traces of its jobs."""
        if self._farm.traces is None:
            return
        lease = batch.lease
        batch.stages["complete"] = started, time.monotonic()
        jobs: dict[uuid.UUID, list[ClaimedFrame]] = defaultdict(list)
        for frame in lease.frames:
            jobs[frame.job_id].append(frame)
        self._farm.traces.batch(
            {
                job_id: {
                    "farm.job": str(job_id),
                    "farm.pipeline": lease.pipeline,
                    "farm.worker": self._identity.name,
                    "farm.lease": str(lease.id),
                    "farm.batch": len(lease.frames),
                    "farm.frames": len(own),
                    "farm.succeeded": sum(frame.fence in accepted for frame in own),
                    "farm.attempt": max(frame.attempt for frame in own),
                }
                for job_id, own in jobs.items()
            },
            batch.stages,
        )

    def _tell_dropped(self, done: Sequence[CompletedFrame], accepted: Collection[Fence]) -> None:
        for item in done:
            if item.fence not in accepted:
                log.warning(
                    "%s: job %s frame %s attempt %s was dropped: its lease was lost",
                    self._identity.name,
                    *item.fence,
                )
