"""Filters of a pipeline, applied to each picture before it is stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from PIL import Image

from farm.context import Farm
from farm.imaging.filters import NEAR, Filter, Verdict
from farm.store import perceptual_hashes
from farm.store.claim import ClaimedFrame
from farm.store.engine import transaction
from farm.store.frames import FailedAttempt
from workers.render.failures import rejected
from workers.render.identity import Identity
from workers.render.retry import retry_while_unavailable


@dataclass(frozen=True)
class FilterChain:
    """Filters by name, in the catalog's order. The first that rejects a picture decides."""

    farm: Farm
    identity: Identity
    filters: Mapping[str, Filter]

    def rejection(self, frame: ClaimedFrame, picture: Image.Image) -> FailedAttempt | None:
        """Return the failed attempt of a rejected picture, or None if the picture is kept."""
        for name, judge in self.filters.items():
            verdict = judge(picture, frame.spec)
            if verdict.keep and verdict.perceptual_hash is not None:
                verdict = self._alone(frame, verdict, verdict.perceptual_hash)
            if not verdict.keep:
                return rejected(frame, name, verdict)
        return None

    def _alone(self, frame: ClaimedFrame, verdict: Verdict, hashed: int) -> Verdict:
        """Store a picture's perceptual hash. Reject it if a stored one of its job is similar."""

        def keep() -> tuple[int, int] | None:
            with transaction(self.farm.store) as connection:
                return perceptual_hashes.keep_print(
                    connection, frame.job_id, frame.ordinal, hashed, NEAR
                )

        near = retry_while_unavailable(self.identity.name, keep)
        if near is None:
            return verdict
        ordinal, bits = near
        return Verdict(False, bits, f"it looks like frame {ordinal}: {bits} of 64 bits differ")
