"""Moves of people: submit, pause, resume, cancel and retry."""

from __future__ import annotations

import json
import uuid
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import initialize, multiple, precondition, rule

from farm.domain.states import TERMINAL, FrameState
from farm.errors import KeyReused
from farm.services import input_upload, jobs, steering
from farm.services.input_upload import InputReader
from farm.store import job_commands as stored
from farm.store.claim import Lease
from farm.store.engine import transaction
from farm.store.tenants import lock_settings, set_tenant
from tests.integration.model.model import ModelFrame, ModelJob, R, W
from tests.integration.model.moves import JOB_IDS, Moves, refused_if

# A request that is listed twice is chosen twice as often.
WISHES = ["retry", "resume", "pause", "resume", "retry", "retry", "resume", "cancel"]


class PeoplesMoves(Moves):
    """Moves of people, each made on the store and on the model."""

    @initialize(target=JOB_IDS, images=st.integers(1, 6), max_attempts=st.integers(1, 3))
    def begin(self, images: int, max_attempts: int) -> Any:
        return self.submit(0, images, [2.0], None, max_attempts, None, "normal", None, False)

    @precondition(
        lambda self: sum(job.status not in TERMINAL for job in self.model.jobs.values()) < 4
    )
    @rule(
        target=JOB_IDS,
        tenant=st.integers(0, 1),
        images=st.integers(1, 4),
        guidance=st.sampled_from([[2.0], [2.0], [4.0], [2.0, 4.0]]),
        lines=st.sampled_from([None, None, [2.0, 4.0, 2.0], [4.0, None, 2.0, 4.0], [None, None]]),
        max_attempts=st.integers(1, 3),
        bucket=st.sampled_from([None, None, 1, 2, 4]),
        priority=st.sampled_from(["normal", "bulk", "interactive"]),
        key=st.sampled_from([None, None, "a", "b"]),
        reuse=st.booleans(),
    )
    def submit(
        self,
        tenant: int,
        images: int,
        guidance: list[float],
        lines: list[float | None] | None,
        max_attempts: int,
        bucket: int | None,
        priority: str,
        key: str | None,
        reuse: bool,
    ) -> Any:
        body: dict[str, Any] = {
            "pipeline": "demo",
            "prompts": ["a red star"],
            "images_per_prompt": images,
            "grid": {"guidance_scale": guidance},
            "max_attempts": max_attempts,
            "bucket": bucket,
            "priority": priority,
        }
        if lines is not None:  # each with its own guidance, or that of the job
            del body["prompts"], body["grid"]
            body |= {
                "input": self.input_of(self.tenants[tenant], lines),
                "guidance_scale": guidance[0],
            }
        if reuse:  # seeds that other jobs have too, and still a bucket that the claim chooses
            body |= {"reuse": True, "seed": 7, "repeatable": None if bucket else False}
        owner = self.tenants[tenant]
        name = f"{tenant}{key}"
        if key and name in self.keyed:
            before, same = self.keyed[name]
            if before != body:
                with pytest.raises(KeyReused):
                    jobs.submit(self.farm, owner, body, key)
                return multiple()
            assert jobs.submit(self.farm, owner, body, key).id == same
            return multiple()
        job_id = jobs.submit(self.farm, owner, body, key).id
        born = [ModelFrame() for _ in range(images * len(guidance if lines is None else lines))]
        in_groups = lines is not None and len({*lines}) > 1
        self.model.jobs[job_id] = ModelJob(owner, born, max_attempts, bucket, in_groups)
        if key:
            self.keyed[name] = body, job_id
        return job_id

    def input_of(self, tenant: uuid.UUID, lines: list[float | None]) -> str:
        """Store an input whose lines have these values of guidance_scale; None: no value."""
        with InputReader(self.farm.settings) as read:
            for value in lines:
                line = {"prompt": "a red star", "guidance_scale": value}
                read.feed(json.dumps(line).encode() + b"\n")
            read.end()
            return str(input_upload.store(self.farm, tenant, read).id)

    @rule(tenant=st.integers(0, 1), most=st.sampled_from([None, None, 0, 1, 2, 3, 5]))
    def limit(self, tenant: int, most: int | None) -> None:
        """Limit the frames of a tenant that may run. What runs already goes on."""
        owner = self.tenants[tenant]
        with transaction(self.farm.store) as connection:
            before = lock_settings(connection, owner)
            assert before is not None
            set_tenant(connection, owner, before, before._replace(max_running_frames=most))
        self.model.limits[owner] = most
        self.check_nothing_else_is_claimed()

    @precondition(lambda self: self.wishes < len(self.model.given))
    @rule(job_id=JOB_IDS, wish=st.sampled_from(WISHES))
    def steer(self, job_id: uuid.UUID, wish: str) -> None:
        self.wishes += 1
        getattr(self, wish)(job_id)
        self.check_nothing_else_is_claimed()

    def pause(self, job_id: uuid.UUID) -> None:
        job = self.model.jobs[job_id]
        with refused_if(job.status in TERMINAL):
            steering.pause(self.farm, job.tenant, job_id)
            job.held = True

    def resume(self, job_id: uuid.UUID) -> None:
        job = self.model.jobs[job_id]
        with refused_if(job.status in TERMINAL):
            steering.resume(self.farm, job.tenant, job_id)
            job.held = False
            while self.followed(2):
                pass

    @rule(rows=st.integers(1, 2))
    def follow(self, rows: int) -> None:
        self.followed(rows)

    def followed(self, rows: int) -> bool:
        """Apply their jobs' requests to a few requeued frames. Return True if more are left."""
        with self.farm.store.connect() as connection:
            return stored.follow(connection, rows)

    def cancel(self, job_id: uuid.UUID) -> None:
        job = self.model.jobs[job_id]
        with refused_if(job.status in TERMINAL and not job.cancelled):
            steering.cancel(self.farm, job.tenant, job_id)
            job.cancelled, job.held = True, False
            for frame in job.frames:
                if frame.state is R:
                    frame.ended.append((frame.attempt, "cancelled"))
                if frame.state in (W, R, FrameState.READY):
                    frame.state = FrameState.CANCELLED

    def wish(self, lease: Lease, wish: str) -> None:
        getattr(self, wish)(lease.frames[-1].job_id)

    def retry(self, job_id: uuid.UUID) -> None:
        job = self.model.jobs[job_id]
        dead = [frame for frame in job.frames if frame.state is FrameState.DEAD]
        with refused_if(job.cancelled or not dead):
            assert steering.retry(self.farm, job.tenant, job_id) == len(dead)
            for frame in dead:
                frame.state, frame.uncharged, frame.isolated = (
                    FrameState.READY,
                    frame.attempt,
                    False,
                )
