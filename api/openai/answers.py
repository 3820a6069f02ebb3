"""Answers of OpenAI's image API: the pictures of a job, read from the storage."""

from __future__ import annotations

import json
import logging
import math
import time
import uuid
from base64 import b64encode
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Any

from anyio import CapacityLimiter, sleep, to_thread
from PIL import Image

from api import schemas
from api.addresses import Address
from api.door import FIRST_SECONDS, MIN_BYTES_PER_SECOND
from api.errors import error_body
from api.openai.wishes import Wish
from api.places import Place, Places
from api.responses import frame_views
from api.streaming.streams import State, message
from farm.context import Farm
from farm.domain.states import TERMINAL, FrameState
from farm.errors import Conflict, FarmError, NotFound, TooLarge, TooSlow, Unavailable
from farm.services.previews import Preview
from farm.storage import NotStored, artifact_key
from farm.store import queries
from farm.store.engine import transaction
from farm.store.keys import Caller

log = logging.getLogger(__name__)

MIB = 2**20
MAX_MIB = 64
"""Maximum size of the pictures that one answer holds, in MiB. Larger ones have addresses only."""
MIB_AT_ONCE, MIB_PER_TENANT = 1024, 512
"""Maximum memory of the answers that a process makes or sends at the same time, in MiB."""
COPIES = 4
"""Memory of a picture in an answer, in times its size: the file, its base64, and the JSON."""
BUSY_SECONDS = 1.0
"""Interval in which a stream tries again to get memory for a picture, in seconds."""
BLOCK_BYTES = 2**16
NO_TOKENS = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"text_tokens": 0, "image_tokens": 0},
}
"""The farm counts device seconds, and not tokens. Clients expect the field."""


class Flagged(FarmError):
    """The safety checker of the pipeline kept every picture back."""

    code = "moderation_blocked"
    status = 400


class RenderFailed(FarmError):
    """No frame of the job succeeded."""

    code = "render_failed"
    status = 500


@dataclass(frozen=True)
class Answers:
    """Makes the answers to a call, in threads."""

    farm: Farm
    caller: Caller
    wish: Wish
    signed: Address
    places: Places
    limiter: CapacityLimiter

    async def body(self, job: schemas.Job) -> tuple[bytes, Place]:
        """Return the JSON of an ended job, and a place to give back when it is sent.

        Raises:
            Flagged: All pictures were flagged.
            RenderFailed: There is no picture.
            Conflict: The job was cancelled.
            TooLarge: The pictures are too large for an answer.
            Unavailable: A server does not answer, or too many pictures are being sent.
        """
        frames = await self._run(self._frames, job.id)
        done = [frame for frame in frames if frame.state is FrameState.SUCCEEDED]
        if not done:
            raise _failure(job, frames)
        forms = self._forms(done)
        place = self._place(done) if "b64_json" in forms else Place(lambda: None)
        try:
            return await self._run(self._body, job, frames, done, forms), place
        except BaseException:
            place.give_back()
            raise

    async def blocks(self, states: AsyncIterator[State]) -> AsyncIterator[bytes]:
        """Yield the blocks of a stream: each picture when it is there, or at the end an error."""
        sent: set[int] = set()
        previewed: Counter[int] = Counter()
        job: schemas.Job | None = None
        try:
            async for state in states:
                if state is None:
                    yield b": the job has not ended\n\n"
                    continue
                if isinstance(state, list):
                    for preview in state:
                        if preview.ordinal not in sent and self._is_due(preview, previewed):
                            yield _partial(preview, previewed[preview.ordinal])
                            previewed[preview.ordinal] += 1
                    continue
                if job is None:
                    yield f": job {state.id} is {state.status}\n\n".encode()
                job = state
                if job.counts.succeeded > len(sent) or job.status in TERMINAL:
                    frames = await self._run(self._frames, job.id)
                    async for block in self._new(job, frames, sent):
                        yield block
            assert job is not None, "the states begin with the job"
            if job.status not in TERMINAL:
                raise Unavailable(f"The stream ended before job {job.id}, which goes on.")
            if not sent:
                raise _failure(job, frames)
        except TooSlow as error:  # in the middle of an event
            log.warning("%s", error.message)
        except FarmError as error:
            yield message({"error": error_body(error)})

    def _is_due(self, preview: Preview, sent: Counter[int]) -> bool:
        """Spread the partial images of a picture over its steps."""
        number, most = sent[preview.ordinal], self.wish.partial_images
        return number < most and preview.step / preview.steps >= number / most

    async def _new(
        self, job: schemas.Job, frames: Sequence[schemas.Frame], sent: set[int]
    ) -> AsyncIterator[bytes]:
        for frame in frames:
            if frame.state is not FrameState.SUCCEEDED or frame.ordinal in sent:
                continue
            self._forms([frame])
            while (place := self._free_place(frame)) is None:
                yield b": waiting for memory\n\n"
                await sleep(BUSY_SECONDS)
            try:
                block = await self._run(self._completed, job, frame)
                began = time.monotonic()
                for first in range(0, len(block), BLOCK_BYTES):
                    yield block[first : first + BLOCK_BYTES]
                    if time.monotonic() > began + FIRST_SECONDS + first / MIN_BYTES_PER_SECOND:
                        raise TooSlow(f"The picture was read too slowly. Job {job.id} has it.")
            finally:
                place.give_back()
            sent.add(frame.ordinal)

    def _forms(self, frames: Sequence[schemas.Frame]) -> set[str]:
        """Return the forms in which pictures are sent: `url`, `b64_json`, or both.

        Raises:
            TooLarge: They are too large for the form that is asked for.
        """
        signs = self.farm.settings.signed_url_seconds > 0
        forms = {self.wish.form} if self.wish.form else {"b64_json", *(["url"] if signs else [])}
        mib = math.ceil(sum(frame.bytes or 0 for frame in frames) / MIB)
        if mib <= MAX_MIB or forms == {"url"}:
            return forms
        if forms == {"b64_json"} or self.wish.stream:
            raise TooLarge(
                f"The pictures have {mib} MiB; an answer may hold {MAX_MIB}. They are stored: "
                "download them by their addresses, or send response_format url."
            )
        return {"url"}

    def _place(self, frames: Sequence[schemas.Frame]) -> Place:
        mib = math.ceil(COPIES * sum(frame.bytes or 0 for frame in frames) / MIB)
        return self.places.take(str(self.caller.tenant_id), "pictures", mib)

    def _free_place(self, frame: schemas.Frame) -> Place | None:
        try:
            return self._place([frame])
        except Unavailable:
            return None

    async def _run(self, function: Callable[..., Any], *args: Any) -> Any:
        return await to_thread.run_sync(partial(function, *args), limiter=self.limiter)

    def _frames(self, job_id: uuid.UUID) -> list[schemas.Frame]:
        with transaction(self.farm.store) as connection:
            job = queries.get_job(connection, self.caller.tenant_id, job_id)
            rows = {
                row.ordinal: row
                for row in queries.list_frames(connection, job_id, after=-1, limit=job.total)
            }
            ordinals = range(job.total)
            return frame_views(connection, job, rows, ordinals, self.caller, self.signed)

    def _body(
        self,
        job: schemas.Job,
        frames: Sequence[schemas.Frame],
        done: Sequence[schemas.Frame],
        forms: Collection[str],
    ) -> bytes:
        seconds = _seconds_between(job)
        answer = {
            "id": str(job.id),
            "created": int(job.created_at.timestamp()),
            "object": "list",
            "model": job.pipeline,
            **_about_frame(done[0]),
            "data": [self._picture(job.id, frame, forms) for frame in done],
            "usage": NO_TOKENS,
            "farm": {
                "job": str(job.id),
                "device_seconds": job.device_seconds,
                "waited_seconds": seconds,
                "flagged": [frame.ordinal for frame in frames if frame.flagged],
                "failed": [
                    frame.ordinal for frame in frames if frame not in done and not frame.flagged
                ],
            },
        }
        return json.dumps(answer).encode()

    def _picture(
        self, job_id: uuid.UUID, frame: schemas.Frame, forms: Collection[str]
    ) -> dict[str, Any]:
        picture = {
            "index": frame.ordinal,
            "type": "b64_json" if "b64_json" in forms else "url",
            "revised_prompt": frame.prompt,
            "seed": frame.seed,
            "sha256": frame.sha256,
            "frame": f"/v1/jobs/{job_id}/frames/{frame.ordinal}",
        }
        if "url" in forms:
            picture["url"] = frame.signed_url
        if "b64_json" in forms:
            picture["b64_json"] = self._base64(job_id, frame)
        return picture

    def _completed(self, job: schemas.Job, frame: schemas.Frame) -> bytes:
        kind = "image_generation.completed"
        data = {
            "type": kind,
            "created_at": int(time.time()),
            **_about_frame(frame),
            "index": frame.ordinal,
            "seed": frame.seed,
            "sha256": frame.sha256,
            "usage": NO_TOKENS,
            "b64_json": self._base64(job.id, frame),
        }
        return message(data, kind)

    def _base64(self, job_id: uuid.UUID, frame: schemas.Frame) -> str:
        assert frame.sha256 is not None, "a succeeded frame has a picture"
        digest = bytes.fromhex(frame.sha256)
        key = artifact_key(self.caller.tenant_id, job_id, frame.ordinal, digest, frame.format)
        try:
            return b64encode(self.farm.artifacts.get(key)).decode()
        except NotStored:
            raise NotFound(f"Job {job_id}: its pictures were removed.") from None
        except Unavailable as error:  # its message has the key, and with it the tenant's ID
            log.warning("%s", error)
            raise Unavailable("The image storage does not answer.") from error


def _partial(preview: Preview, number: int) -> bytes:
    kind = "image_generation.partial_image"
    with Image.open(BytesIO(preview.jpeg)) as image:
        about = _about("jpeg", *image.size)
    data = {
        "type": kind,
        "partial_image_index": number,
        "created_at": int(time.time()),
        **about,
        "index": preview.ordinal,
        "b64_json": b64encode(preview.jpeg).decode(),
    }
    return message(data, kind)


def _about_frame(frame: schemas.Frame) -> dict[str, str]:
    return _about(frame.format, frame.width, frame.height)


def _about(form: str, width: int, height: int) -> dict[str, str]:
    return {
        "background": "opaque",
        "output_format": form,
        "quality": "auto",
        "size": f"{width}x{height}",
    }


def _seconds_between(job: schemas.Job) -> float | None:
    """Return the time that a job waited for its first frame to start, in seconds."""
    if job.started_at is None:
        return None
    return round((job.started_at - job.created_at).total_seconds(), 3)


def _failure(job: schemas.Job, frames: Sequence[schemas.Frame]) -> FarmError:
    if all(frame.flagged for frame in frames):
        return Flagged("The safety checker of the pipeline kept back every picture.")
    for frame in frames:
        if frame.state is FrameState.DEAD and not frame.flagged:
            return RenderFailed(f"Job {job.id}, frame {frame.ordinal}: {frame.error}")
    return Conflict(f"Job {job.id} was cancelled.")
