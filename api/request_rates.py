"""Requests a second of each tenant, counted in Redis for all API processes together.

While Redis does not answer, each process counts for itself. The algorithm is the generic cell rate
algorithm: one time for each tenant, https://en.wikipedia.org/wiki/Generic_cell_rate_algorithm.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from typing import NamedTuple

import redis
from cachetools import TTLCache

from farm.config import Settings
from farm.redis_address import redis_place

log = logging.getLogger(__name__)

# KEYS: of the tenant. ARGV: seconds between two requests, and number of requests at once. Returns
# the seconds to wait, as text. Redis's clock is used, so those of the processes may differ.
TAKE = """
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1000000
local due = math.max(tonumber(redis.call('GET', KEYS[1]) or 0), now)
local latest = now + ARGV[1] * ARGV[2]
local wait = math.min(due, latest) - now - ARGV[1] * (ARGV[2] - 1)
if wait > 0 and due <= latest then
    return tostring(wait)
elseif wait > 0 then  -- the limit was lower before
    due = latest
else
    due = due + ARGV[1]
end
redis.call('SET', KEYS[1], string.format('%.6f', due), 'PX', math.ceil((due - now) * 1000))
return tostring(math.max(wait, 0))
"""

SOCKET = {"socket_timeout": 0.25, "socket_connect_timeout": 0.25}
"""Socket options, in seconds. They are short, because each request waits for the answer."""
SILENT_SECONDS = 2.0
"""Time after an error of Redis in which it is not asked, in seconds."""
TENANTS = 10_000
"""Number of tenants that a process counts for itself."""
LONGEST_SECONDS = 86_400.0
"""Time for which a process remembers a tenant, in seconds."""


class Rate(NamedTuple):
    """Limit of a tenant's requests."""

    per_second: float
    burst: int
    """Number of requests that may arrive at once."""


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

    def take(self, tenant_id: uuid.UUID, rate: Rate) -> float:
        """Count a request. Return 0, or the seconds after which it may come again."""
        refused = self._refused_until.get((tenant_id, rate), 0.0) - time.monotonic()
        if refused > 0:  # a flood of such requests costs Redis nothing
            return refused
        wait = self._take_there(tenant_id, rate)
        wait = self._take_here(tenant_id, rate) if wait is None else wait
        if wait:
            with self._lock:
                self._refused_until[tenant_id, rate] = time.monotonic() + wait
        return wait

    def _take_there(self, tenant_id: uuid.UUID, rate: Rate) -> float | None:
        """Count in Redis. Return None if it does not answer, or did not a moment ago."""
        with self._lock:
            now = time.monotonic()
            if now < self._silent_until:
                return None
            if self._silent_until > 0:  # one thread tries, and others go on without Redis
                self._silent_until = now + SILENT_SECONDS
        try:
            arguments = [1 / rate.per_second, rate.burst]
            told = self._take([f"farm:requests:{tenant_id}"], arguments)
        except (redis.RedisError, OSError) as error:
            self._silent_until = time.monotonic() + SILENT_SECONDS
            log.warning("Redis does not count requests, so this process does: %s", error)
            return None
        self._silent_until = 0.0
        return float(str(told, "ascii"))

    def _take_here(self, tenant_id: uuid.UUID, rate: Rate) -> float:
        interval = 1 / rate.per_second
        with self._lock:
            now = time.monotonic()
            due = max(self._due.get(tenant_id, now), now)
            due = min(due, now + interval * rate.burst)  # the limit may have been lower before
            wait = due - now - interval * (rate.burst - 1)
            self._due[tenant_id] = due if wait > 0 else due + interval
            return max(wait, 0.0)
