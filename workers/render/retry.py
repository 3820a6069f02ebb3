"""Retries while Postgres does not answer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_random_exponential

from farm.errors import Unavailable

log = logging.getLogger(__name__)

T = TypeVar("T")


def retry_while_unavailable(worker: str, work: Callable[[], T]) -> T:
    """Repeat `work` until Postgres answers, without a limit.

    Without Postgres there is nothing else to do. If the lease was lost during the wait, the write
    changes nothing.
    """

    def tell(state: RetryCallState) -> None:
        outcome = state.outcome
        assert outcome is not None
        log.warning("%s waits for Postgres: %s", worker, outcome.exception())

    tries = Retrying(
        retry=retry_if_exception_type(Unavailable),
        wait=wait_random_exponential(multiplier=0.2, max=2.0),
        before_sleep=tell,
    )
    return tries(work)
