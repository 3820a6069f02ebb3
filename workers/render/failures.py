"""Consequences of errors for frames. Only this module decides them."""

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
    """Build the failed attempts of frames from an error."""
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
        # Any of them may be the cause, also one of another tenant: each is tried in isolation.
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
            None if several else text,  # it may contain data of other tenants
            charged=charged,
            isolated=several,
            smaller=smaller,
        )
        for frame in claimed
    ]


def is_suspicious(error: Exception) -> bool:
    """Return True if the worker may have caused an error, not a server or the frame."""
    return isinstance(error, StorageRefused) or not isinstance(error, FarmError)


def flagged(frame: ClaimedFrame) -> FailedAttempt:
    """Build the failed attempt of a flagged picture. A retry would give the same picture."""
    message = "The pipeline's safety checker flagged this picture."
    return FailedAttempt(frame.fence, FLAGGED, message, retryable=False)


def rejected(frame: ClaimedFrame, name: str, verdict: Verdict) -> FailedAttempt:
    """Build the failed attempt of a rejected picture. Its frame gets another seed."""
    message = f"Filter {name}, score {verdict.score:.4g}: {verdict.why or 'rejected'}."
    return FailedAttempt(frame.fence, REJECTED, message, charged=False, reroll=True)


def named(claimed: Sequence[ClaimedFrame]) -> str:
    """Return the names of frames for the log."""
    return "; ".join(str(frame) for frame in claimed)
