"""The courier: a process that makes messages of events, and delivers them to webhooks.

Several may run. A delivery is leased for the time of an attempt, so two of them send the same one
only if a courier was killed in the middle of it, or if Postgres was away too long. A receiver
knows it by its `webhook-id`.
"""

from __future__ import annotations

import asyncio
import logging
import random
import signal
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TypeVar

from anyio import CapacityLimiter, to_thread

from farm.config import Settings
from farm.context import Farm, open_farm
from farm.domain.webhook_addresses import parse_networks, parse_target
from farm.errors import InvalidRequest, Unavailable
from farm.process import beat, set_ready
from farm.services.webhooks import sending
from farm.services.webhooks.messages import EVENTS_AT_ONCE, make_messages
from farm.services.webhooks.sending import Answer, Resolve
from farm.store import events
from farm.store import webhooks as stored
from farm.store.engine import one_statement, transaction
from farm.store.webhooks import Claimed

log = logging.getLogger(__name__)

T = TypeVar("T")

POLL_SECONDS = 0.2
"""Interval in which it looks for events and for due deliveries, in seconds."""
REST_SECONDS = 1.0
"""Pause after Postgres did not answer, in seconds."""
MAX_IN_FLIGHT = 128
"""Attempts of one courier at the same time."""
END_SECONDS = sending.SECONDS + 2
"""Time in which attempts may end when it stops, in seconds."""
THREADS = 4
"""Threads in which it asks Postgres."""
PER_TENANT = 32
"""Attempts for one tenant at the same time, and those that one claim adds."""
RECORDING_TRIES = 10
"""Tries to record an outcome, a second apart: within its lease."""

MINUTE, HOUR = 60.0, 3600.0
DELAYS = (
    5.0,
    5 * MINUTE,
    30 * MINUTE,
    2 * HOUR,
    5 * HOUR,
    10 * HOUR,
    14 * HOUR,
    20 * HOUR,
    24 * HOUR,
)
"""Times between the ten attempts at a message, in seconds: 75.5 hours in all."""
JITTER = 0.2
"""Largest part by which a time is shortened or lengthened at random."""
LONGEST_WAIT = HOUR
"""Longest time for which a receiver may put off the next attempt, in seconds."""
GONE = 410
NOT_THE_ENDPOINT = {400, 401, 403, 404, 405, 406, 409, 411, 412, 413, 414, 415, 422, 431}
"""Statuses that may be about this one message. They do not park the endpoint."""
SLOW_DOWN = {429, 503}


class Courier:
    """Makes messages and delivers them. Used in one event loop."""

    def __init__(self, farm: Farm, look_up: Resolve = sending.resolve) -> None:
        self._farm = farm
        self._networks = parse_networks(farm.settings.webhook_networks)
        self._look_up = look_up
        self._threads = CapacityLimiter(THREADS)
        self._in_flight: Counter[uuid.UUID] = Counter()
        self._attempts: set[asyncio.Task[object]] = set()
        self._freed = asyncio.Event()

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set, then let the attempts in progress end."""
        set_ready(self._farm.settings.run_dir, ready=True)
        await asyncio.gather(self._loop(self._make, stop), self._loop(self._send, stop))
        if self._attempts:
            await asyncio.wait(self._attempts, timeout=END_SECONDS)

    async def _loop(self, work: Callable[[], Awaitable[bool]], stop: asyncio.Event) -> None:
        """Repeat some work. An outage of Postgres is logged, and does not end it."""
        while not stop.is_set():
            rest = POLL_SECONDS
            try:
                if await work():
                    continue
            except Unavailable as error:
                log.warning("The courier waits for Postgres: %s", error)
                rest = REST_SECONDS
            except Exception:
                log.exception("The courier failed.")
                rest = REST_SECONDS
            try:
                async with asyncio.timeout(rest):
                    await stop.wait()
            except TimeoutError:
                pass

    async def _make(self) -> bool:
        """Make messages. Return True if there may be more."""
        beat(self._farm.settings.run_dir)
        return await self._in_thread(make_messages, self._farm) == EVENTS_AT_ONCE

    async def _send(self) -> bool:
        """Begin attempts. Return True if there may be more."""
        room = MAX_IN_FLIGHT - len(self._attempts)
        if room <= 0:
            self._freed.clear()
            await self._freed.wait()
            return True
        busy = [tenant for tenant, number in self._in_flight.items() if number >= PER_TENANT]
        claimed = await self._in_thread(self._claim, busy, room)
        for each in claimed:
            self._in_flight[each.tenant_id] += 1
            self._attempts.add(asyncio.create_task(self._deliver(each)))
        return bool(claimed)

    def _claim(self, busy: list[uuid.UUID], limit: int) -> list[Claimed]:
        with one_statement(self._farm.store) as connection:
            return stored.claim(connection, busy, limit)

    async def _deliver(self, claimed: Claimed) -> None:
        try:
            answer = await self._answer(claimed)
            tries = RECORDING_TRIES  # then the lease ends, and the message is sent again
            while tries and not await self._is_recorded(claimed, answer):
                tries -= 1
                await asyncio.sleep(REST_SECONDS)
        except Exception:
            log.exception("Delivery %d was not recorded.", claimed.id)
        finally:
            task = asyncio.current_task()
            if task is not None:
                self._attempts.discard(task)
            self._in_flight[claimed.tenant_id] -= 1
            self._in_flight += Counter()  # drops those with none
            self._freed.set()

    async def _is_recorded(self, claimed: Claimed, answer: Answer) -> bool:
        try:
            await self._in_thread(self._record, claimed, answer)
        except Unavailable as error:
            log.warning("Delivery %d is not recorded yet: %s", claimed.id, error)
            return False
        return True

    async def _answer(self, claimed: Claimed) -> Answer:
        try:
            return await self.attempt(claimed)
        except Exception:
            log.exception("Delivery %d could not be sent.", claimed.id)
            return Answer(0, error="the farm could not send it")

    async def attempt(self, claimed: Claimed) -> Answer:
        """Send a message once. The time of the signature is that of this attempt."""
        try:
            target = parse_target(claimed.url, self._networks)
        except InvalidRequest as error:  # the networks of the operator have changed
            return Answer(0, error=error.message)
        secrets = [key for key in (claimed.secret, claimed.secret_before) if key is not None]
        attempt = claimed.tries + 1
        headers = sending.headers_of(claimed.message_id, claimed.body, secrets, attempt=attempt)
        return await sending.send(target, headers, claimed.body, self._networks, self._look_up)

    def _record(self, claimed: Claimed, answer: Answer) -> None:
        pace = self._farm.settings.webhook_pace
        counts = answer.error is not None and answer.status not in NOT_THE_ENDPOINT
        asked = min(answer.retry_after or 0.0, LONGEST_WAIT) if answer.status in SLOW_DOWN else 0.0
        with transaction(self._farm.store) as connection:
            webhook = stored.record(
                connection,
                claimed,
                succeeded=answer.error is None,
                status=answer.status,
                error=answer.error,
                answer=answer.text,
                milliseconds=answer.milliseconds,
                next_seconds=_next_seconds(claimed, asked, pace),
                wait_seconds=asked,
                counts=counts,
                drop=answer.status == GONE,
                pace=pace,
            )
            if webhook is None or answer.error is None:
                return
            about = {"webhook": str(claimed.webhook_id), "reason": answer.error}
            if webhook.state == "disabled" != webhook.state_before:
                events.append(connection, webhook.tenant_id, "webhook.disabled", about)
            elif webhook.failures_before < webhook.failures == stored.FAILING_FAILURES:
                events.append(connection, webhook.tenant_id, "webhook.failing", about)
        log.info("Delivery %d of %s: %s", claimed.id, claimed.message_id, answer.error)

    async def _in_thread(self, function: Callable[..., T], *args: object) -> T:
        return await to_thread.run_sync(function, *args, limiter=self._threads)


def _next_seconds(claimed: Claimed, asked: float, pace: float) -> float | None:
    """Return the time until the next attempt, if this one fails. None: there is none."""
    if claimed.parked:
        return 0.0  # it waits until its endpoint is tried again, or is disabled
    if claimed.tries >= len(DELAYS):
        return None
    delay = DELAYS[claimed.tries] * pace * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311
    return max(delay, asked)


def run_courier(settings: Settings) -> int:
    """Run a courier until SIGTERM. Return the exit code."""
    farm = open_farm(settings)

    async def work() -> None:
        stop = asyncio.Event()
        for name in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(name, stop.set)
        await Courier(farm).run(stop)

    try:
        asyncio.run(work())
    finally:
        farm.close()
    return 0
