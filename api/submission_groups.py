"""Jobs that arrive at the same moment are checked and stored together."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from functools import partial

from cachetools import TTLCache
from fastapi import Response

from api.groups import Groups
from farm.context import Farm
from farm.services.jobs import Insert, Submission, submit_many
from farm.store.group_commit import HasLimits, insert_counted_group, insert_group
from farm.store.queries import JobRow

THREADS = 2
"""Number of groups that are handled at the same time: one is checked, one is stored."""
LIMITED_TENANTS, LIMITED_SECONDS = 10_000, 10.0

Accepted = Callable[[JobRow], Response]


class SubmissionGroups:
    """Groups of jobs, and separate ones for tenants with limits.

    What a tenant has is counted under a lock. No tenant without limits waits for it.
    """

    def __init__(self, farm: Farm, accepted: Accepted) -> None:
        """Create it. `accepted` makes the answer of a stored job."""

        def groups(insert: Insert) -> Groups[Submission, Response]:
            return Groups(partial(_submit, farm, accepted, insert), THREADS)

        self._of_all = groups(insert_group)
        self._counted = groups(insert_counted_group)
        self._limited: TTLCache[uuid.UUID, bool] = TTLCache(LIMITED_TENANTS, LIMITED_SECONDS)
        """Tenants that had limits a moment ago, so that this need not be found out again."""

    async def ask(self, sent: Submission) -> Response:
        """Check and store a job. Return its answer, or raise the error with which it is refused."""
        if sent.tenant_id not in self._limited:
            try:
                return await self._of_all.ask(sent)
            except HasLimits:
                self._limited[sent.tenant_id] = True
        return await self._counted.ask(sent)


def _submit(
    farm: Farm, accepted: Accepted, insert: Insert, sent: Sequence[Submission]
) -> list[Response | Exception]:
    return [
        result if isinstance(result, Exception) else accepted(result)
        for result in submit_many(farm, sent, insert)
    ]
