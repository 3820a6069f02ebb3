"""Trying again and again while Postgres is away."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_random_exponential

from farm.errors import Unavailable

log = logging.getLogger(__name__)

T = TypeVar("T")


def retry_while_unavailable(worker: str, work: Callable[[], T]) -> T:
    """Do something until Postgres lets it be done; it never gives up.

    Without Postgres there is nothing else to do, and a write whose lease was lost meanwhile changes
    nothing.
    """

    def tell(state: RetryCallState) -> None:
        outcome = state.outcome
        assert outcome is not None
        log.warning("%s waits: %s", worker, outcome.exception())

    tries = Retrying(
        retry=retry_if_exception_type(Unavailable),
        wait=wait_random_exponential(multiplier=0.2, max=2.0),
        before_sleep=tell,
    )
    return tries(work)
