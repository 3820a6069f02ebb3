"""Bells: Celery messages that wake the workers of a lane. A bell is only a hint.

A lost or repeated bell changes nothing. Postgres holds the frames that may be claimed, and the
janitor rings again for every lane with waiting frames.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

import redis
from celery import Celery
from kombu.exceptions import OperationalError

from farm.config import Settings
from farm.errors import Unavailable
from farm.redis_address import redis_place

log = logging.getLogger(__name__)

RENDER_TASK = "farm.render"
"""Name of the bell's task. Never rename it in one step: workers discard unknown tasks."""

EXPORTER_TASK = "farm.exporter"
"""Name of the exporter's task. The rule of RENDER_TASK holds from the first release on."""
EXPORTER_LANE = "exporter"
"""Lane of the work that needs no device: writing datasets."""

MAX_BELLS = 2
"""Maximum number of waiting bells on a lane. More would wake no other worker and fill Redis."""

PATIENT = {"socket_timeout": 5, "socket_connect_timeout": 5, "health_check_interval": 5}
"""Socket options of a worker, in seconds. A half-open connection is detected within their sum."""

HASTY = {"socket_timeout": 1, "socket_connect_timeout": 1}
"""Socket options for ringing, in seconds. They are short, because a bell is only a hint."""

HEARING_SECONDS = 0.25
"""Length of one wait for a bell, in seconds. Shorter than the socket timeout."""

JOINED_SECONDS = 0.02
"""Interval in which a queue is rung once. Further bells are joined into one at its end. Seconds."""

SILENT_SECONDS = 3.0
"""Pause in ringing after Redis did not answer, in seconds."""


def lane(pipeline: str) -> str:
    """Name the Celery queue of a pipeline."""
    return f"render.{pipeline}"


def urgent_lane(pipeline: str) -> str:
    """Name the list of urgent bells, which a worker also reads while it renders something else."""
    return f"urgent.{pipeline}"


def make_app(settings: Settings, socket: Mapping[str, int] = PATIENT) -> Celery:
    """Build the Celery app, for ringing bells or for a worker that receives them."""
    place = redis_place(settings.redis_url.get_secret_value())
    app = Celery("farm", broker=place.broker, set_as_current=False)
    app.conf.update(
        task_ignore_result=True,
        task_store_errors_even_if_ignored=False,
        task_serializer="json",
        accept_content=["json"],
        # A bell is acknowledged before the work: leases, not messages, decide what is redone.
        task_acks_late=False,
        # A busy worker must not hold back a bell that an idle worker could receive.
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        worker_pool_start_method="spawn",
        worker_proc_alive_timeout=3600,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_send_task_events=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={**place.options, **socket},
        broker_use_ssl=place.tls,
    )
    return app


class Bells:
    """Rings the bells of lanes. One instance per process."""

    def __init__(self, settings: Settings) -> None:
        self.app = make_app(settings, HASTY)
        place = redis_place(settings.redis_url.get_secret_value())
        self._redis = place.client(**HASTY)
        self._silent_until = float("-inf")
        self._lock = threading.Lock()
        self._adding: dict[str, threading.Lock] = {}
        """Locks by queue, held while bells are counted and one is added, so that threads of this
        process do not add too many."""
        self._rung_at: dict[str, float] = {}
        """Time of the last bell by queue, on the monotonic clock."""
        self._late: dict[str, Callable[[], object]] = {}
        """Bells by queue that wait for the end of their interval."""
        self._timers: dict[str, threading.Timer] = {}
        """Last timer by queue. It may have ended."""

    def ring(self, pipeline: str, *, urgent: bool = False) -> bool:
        """Wake one worker of a lane. Return True unless Redis did not accept the bell.

        A bell within 20 ms of the last one is rung at the end of that time.

        An outage is only logged, because the janitor rings again.

        Args:
            pipeline: the pipeline of the lane.
            urgent: also wake a worker that renders something less urgent. If that bell is lost, the
                worker still finds the work: it also checks Postgres now and then.
        """
        if urgent and not self._add(
            urgent_lane(pipeline), lambda queue: self._redis.rpush(queue, b"")
        ):
            return False
        return self._ring(RENDER_TASK, lane(pipeline))

    def ring_exporter(self) -> bool:
        """Wake one exporter. Return True if Redis accepted the bell."""
        return self._ring(EXPORTER_TASK, EXPORTER_LANE)

    def _ring(self, task: str, queue: str) -> bool:
        return self._add(
            queue,
            lambda queue: self.app.send_task(task, queue=queue, ignore_result=True, retry=False),
        )

    def _add(self, queue: str, add: Callable[[str], object]) -> bool:
        """Add a bell now, or at the end of its queue's interval.

        Return True unless Redis did not answer.
        """
        with self._lock:
            adding = self._adding.setdefault(queue, threading.Lock())
            now = time.monotonic()
            due = self._rung_at.get(queue, float("-inf")) + JOINED_SECONDS
            if queue in self._late:
                return True
            if now < due:
                timer = threading.Timer(due - now, self._add_late, [queue])
                timer.daemon = True
                with suppress(RuntimeError):  # no more threads: it is rung now
                    timer.start()
                    self._late[queue] = lambda: self._add_now(queue, add)
                    self._timers[queue] = timer
                    return True
            self._rung_at[queue] = now
        with adding:
            return self._add_now(queue, add)

    def _add_late(self, queue: str) -> None:
        with self._adding[queue]:  # until then, further bells are joined with this one
            with self._lock:
                add = self._late.pop(queue, None)
                self._rung_at[queue] = time.monotonic()
            if add is not None:
                add()

    def _add_now(self, queue: str, add: Callable[[str], object]) -> bool:
        """Add a bell if the queue has few. Return True if Redis answered."""
        if time.monotonic() < self._silent_until:
            return False
        try:
            if self._redis.llen(queue) < MAX_BELLS:
                add(queue)
        except (redis.RedisError, OperationalError, OSError) as error:
            log.warning("The bell of %s was not rung: %s", queue, error)
            self._silent_until = time.monotonic() + SILENT_SECONDS
            return False
        return True

    def await_urgent(self, pipeline: str) -> bool:
        """Wait briefly for an urgent bell. Return True if there was one.

        Raises:
            Unavailable: Redis does not answer.
        """
        try:
            return self._redis.blpop([urgent_lane(pipeline)], timeout=HEARING_SECONDS) is not None
        except (redis.RedisError, OSError) as error:
            raise Unavailable(f"Redis does not answer: {error}") from error

    def answers(self) -> bool:
        """Return True if Redis answers."""
        try:
            return bool(self._redis.ping())
        except (redis.RedisError, OSError):
            return False

    def close(self) -> None:
        """Ring the bells that wait, and close the connections."""
        with self._lock:
            late = list(self._late)
            timers = list(self._timers.values())
        for queue in late:
            self._add_late(queue)
        for timer in timers:  # one may be ringing just now
            timer.cancel()
            timer.join()
        self.app.close()
        self._redis.close()
