"""What becomes of frames when something goes wrong: the one place that decides it."""

from __future__ import annotations

import traceback
from collections.abc import Sequence

from farm.domain.states import FLAGGED, REJECTED
from farm.errors import FarmError, RenderError, StorageRefused, Unavailable
from farm.imaging.filters import Verdict
from farm.pipelines.runtime.devices import is_out_of_memory
from farm.store.claim import ClaimedFrame
from farm.store.engine import tells_statements
from farm.store.frames import FailedAttempt


def failures(claimed: Sequence[ClaimedFrame], error: Exception) -> list[FailedAttempt]:
    """Map what went wrong to what becomes of the frames."""
    text = "".join(traceback.format_exception(error)).replace("\x00", "")
    message = type(error).__name__
    if not tells_statements(error):
        message = f"{message}: {error}".replace("\x00", "")
    several = len(claimed) > 1
    reason, retryable, charged, smaller = "render_error", True, not several, False
    if isinstance(error, Unavailable | StorageRefused):
        reason = "storage_unavailable" if isinstance(error, Unavailable) else "storage_refused"
        charged, several = False, False
    elif is_out_of_memory(error):
        reason, message, smaller = "out_of_memory", "Memory ran out.", True
    elif several:
        # Any one of them may be why, and they may be of several tenants: each is tried alone.
        message = "Its batch failed; it is tried again without the others."
    elif isinstance(error, FarmError):
        message, retryable = error.message, error.retryable
        if isinstance(error, RenderError):
            reason = error.code
    return [
        FailedAttempt(
            frame.fence,
            reason,
            message,
            retryable,
            None if several else text,  # it may tell of other tenants' frames
            charged=charged,
            isolated=several,
            smaller=smaller,
        )
        for frame in claimed
    ]


def is_suspicious(error: Exception) -> bool:
    """Whether an error may be the worker's own fault, rather than a server's or the frame's."""
    return isinstance(error, StorageRefused) or not isinstance(error, FarmError)


def flagged(frame: ClaimedFrame) -> FailedAttempt:
    """What becomes of a flagged picture: another attempt would give the same one."""
    message = "The pipeline's safety checker flagged this picture."
    return FailedAttempt(frame.fence, FLAGGED, message, retryable=False)


def rejected(frame: ClaimedFrame, name: str, verdict: Verdict) -> FailedAttempt:
    """What becomes of a picture that a filter rejects: it is drawn again, with another seed."""
    message = f"Filter {name}, score {verdict.score:.4g}: {verdict.why or 'rejected'}."
    return FailedAttempt(frame.fence, REJECTED, message, charged=False, reroll=True)


def named(claimed: Sequence[ClaimedFrame]) -> str:
    """Name frames, for the log."""
    return "; ".join(str(frame) for frame in claimed)
