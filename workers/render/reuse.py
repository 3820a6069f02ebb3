"""Reuse of pictures: a frame that equals a stored frame of its tenant is not rendered."""

from __future__ import annotations

import hashlib
import logging
import uuid
from collections import defaultdict
from collections.abc import Sequence

from farm.context import Farm
from farm.errors import FarmError
from farm.imaging.encoding import Encoder
from farm.storage import artifact_key
from farm.store import reuse
from farm.store.claim import ClaimedFrame
from farm.store.engine import reads
from farm.store.frames import CompletedFrame
from workers.render.identity import Identity
from workers.render.retry import retry_while_unavailable

log = logging.getLogger(__name__)


class Reuse:
    """Finds stored pictures by the hash of all parameters that decide their bytes."""

    def __init__(self, farm: Farm, identity: Identity, encoder: Encoder) -> None:
        self._farm = farm
        self._identity = identity
        self._encoder = encoder

    def digest(self, frame: ClaimedFrame) -> bytes | None:
        """Return the hash of all that decides a frame's bytes; None if its job has no reuse."""
        if not frame.reuse:
            return None
        return hashlib.sha256(self._encoder.provenance(frame.spec).encode()).digest()

    def split(
        self, claimed: Sequence[ClaimedFrame]
    ) -> tuple[Sequence[ClaimedFrame], list[CompletedFrame]]:
        """Return the frames to render, and the completed frames of those that are reused."""
        asked: defaultdict[uuid.UUID, list[ClaimedFrame]] = defaultdict(list)
        for frame in claimed:
            if frame.reuse:
                asked[frame.tenant_id].append(frame)
        done = [
            item for tenant_id, frames in asked.items() for item in self._found(tenant_id, frames)
        ]
        fences = {item.fence for item in done}
        return [frame for frame in claimed if frame.fence not in fences], done

    def _found(self, tenant_id: uuid.UUID, frames: Sequence[ClaimedFrame]) -> list[CompletedFrame]:
        digests = {frame.fence: self.digest(frame) for frame in frames}
        wanted = [digest for digest in digests.values() if digest is not None]

        def find() -> dict[bytes, reuse.StoredRender]:
            with reads(self._farm.store) as connection:
                return reuse.find_renders(connection, tenant_id, wanted)

        stored = retry_while_unavailable(self._identity.name, find)
        done = []
        for frame in frames:
            digest = digests[frame.fence]
            if digest in stored and self._copied(stored[digest], frame):
                row = stored[digest]
                same = CompletedFrame(
                    frame.fence,
                    row.sha256,
                    row.bytes,
                    row.slot,
                    digest,
                    reused=True,
                    provenance=self._encoder.kept_apart(frame.spec),
                )
                done.append(same)
        return done

    def _copied(self, row: reuse.StoredRender, frame: ClaimedFrame) -> bool:
        """Copy a stored picture to a frame's own key. Return True on success."""
        form = frame.spec.format
        source = artifact_key(frame.tenant_id, row.job_id, row.ordinal, row.sha256, form)
        target = artifact_key(frame.tenant_id, frame.job_id, frame.ordinal, row.sha256, form)
        try:
            self._farm.artifacts.copy(source, target)
        except FarmError as error:
            log.warning("%s renders %s without reuse: %s", self._identity.name, frame, error)
            return False
        return True
