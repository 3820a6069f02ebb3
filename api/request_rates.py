"""Requests a second of each tenant, counted in Redis for all API processes together.

While Redis does not answer, each process counts for itself. The algorithm is the generic cell rate
algorithm: one time for each tenant, https://en.wikipedia.org/wiki/Generic_cell_rate_algorithm.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import uuid
from typing import Any, NamedTuple

import redis
from cachetools import TTLCache

from farm.config import Settings
from farm.redis_address import redis_place

log = logging.getLogger(__name__)

# KEYS: of the tenant. ARGV: seconds between two requests, and number of requests at once. Returns
# the seconds to wait, and those until the whole number may come at once again, both as text.
# Redis's clock is used, so those of the processes may differ.
TAKE = """
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1000000
local due = math.max(tonumber(redis.call('GET', KEYS[1]) or 0), now)
local latest = now + ARGV[1] * ARGV[2]
local wait = math.min(due, latest) - now - ARGV[1] * (ARGV[2] - 1)
if wait > 0 and due <= latest then
    return {tostring(wait), tostring(due - now)}
elseif wait > 0 then  -- the limit was lower before
    due = latest
else
    due = due + ARGV[1]
end
redis.call('SET', KEYS[1], string.format('%.6f', due), 'PX', math.ceil((due - now) * 1000))
return {tostring(math.max(wait, 0)), tostring(due - now)}
"""

SOCKET = {"socket_timeout": 0.25, "socket_connect_timeout": 0.25}
"""Socket options, in seconds. They are short, because each request waits for the answer."""
SILENT_SECONDS = 2.0
"""Time after an error of Redis in which it is not asked, in seconds."""
TENANTS = 10_000
"""Number of tenants that a process counts for itself."""
EXACTNESS = 1e-6
"""Part of a request that is lost in the conversion of times."""
LONGEST_SECONDS = 86_400.0
"""Time for which a process remembers a tenant, in seconds."""


RATE = "farm_rate"
"""Key of a request's scope: the limit of its tenant's requests, and what is left of it."""


class Rate(NamedTuple):
    """Limit of a tenant's requests."""

    per_second: float
    burst: int
    """Number of requests that may arrive at once."""


class Taken(NamedTuple):
    """Answer to a request."""

    wait: float
    """Seconds after which it may come again. 0: it was counted."""
    full_in: float
    """Seconds until `burst` requests may come at once again."""

    def left(self, rate: Rate) -> int:
        """Return the number of requests that may come now."""
        return max(0, math.floor(rate.burst - self.full_in * rate.per_second + EXACTNESS))


class RequestRates:
    """Requests of tenants that have a limit. Several threads share it."""

    def __init__(self, settings: Settings) -> None:
        client = redis_place(settings.redis_url.get_secret_value()).client(**SOCKET)
        self._take = client.register_script(TAKE)
        self._silent_until = 0.0
        self._refused_until: TTLCache[tuple[uuid.UUID, Rate], float]
        self._refused_until = TTLCache(TENANTS, LONGEST_SECONDS)
        self._due: TTLCache[uuid.UUID, float] = TTLCache(TENANTS, LONGEST_SECONDS)
        self._lock = threading.Lock()

    def take(self, tenant_id: uuid.UUID, rate: Rate) -> Taken:
        """Count a request, unless it comes too soon."""
        refused = self._refused_until.get((tenant_id, rate), 0.0) - time.monotonic()
        if refused > 0:  # a flood of such requests costs Redis nothing
            return Taken(refused, rate.burst / rate.per_second)
        taken = self._take_there(tenant_id, rate) or self._take_here(tenant_id, rate)
        if taken.wait:
            with self._lock:
                self._refused_until[tenant_id, rate] = time.monotonic() + taken.wait
        return taken

    def _take_there(self, tenant_id: uuid.UUID, rate: Rate) -> Taken | None:
        """Count in Redis. Return None if it does not answer, or did not a moment ago."""
        with self._lock:
            now = time.monotonic()
            if now < self._silent_until:
                return None
            if self._silent_until > 0:  # one thread tries, and others go on without Redis
                self._silent_until = now + SILENT_SECONDS
        try:
            arguments = [1 / rate.per_second, rate.burst]
            told: Any = self._take([f"farm:requests:{tenant_id}"], arguments)
        except (redis.RedisError, OSError) as error:
            self._silent_until = time.monotonic() + SILENT_SECONDS
            log.warning("Redis does not count requests, so this process does: %s", error)
            return None
        self._silent_until = 0.0
        return Taken(*(float(str(each, "ascii")) for each in told))

    def _take_here(self, tenant_id: uuid.UUID, rate: Rate) -> Taken:
        interval = 1 / rate.per_second
        with self._lock:
            now = time.monotonic()
            due = max(self._due.get(tenant_id, now), now)
            due = min(due, now + interval * rate.burst)  # the limit may have been lower before
            wait = due - now - interval * (rate.burst - 1)
            due = due if wait > 0 else due + interval
            self._due[tenant_id] = due
            return Taken(max(wait, 0.0), due - now)
