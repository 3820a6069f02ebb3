"""Bells: Celery messages that wake a lane. A hint, never the truth.

Losing or repeating one changes nothing: what may be claimed stands in Postgres, and the janitor
rings again for every lane where something waits.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import redis
from celery import Celery
from kombu.exceptions import OperationalError

from farm.config import Settings
from farm.errors import Unavailable
from farm.redis_address import redis_place

log = logging.getLogger(__name__)

RENDER_TASK = "farm.render"
"""Never renamed in one step: a worker discards a task that it does not know."""

EXPORTER_TASK = "farm.exporter"
EXPORTER_LANE = "exporter"
"""Of what needs no device: writing datasets"""

MAX_BELLS = 2
"""Bells left waiting on a lane: more would wake nobody else, and Redis stays small."""

PATIENT = {"socket_timeout": 5, "socket_connect_timeout": 5, "health_check_interval": 5}
"""For a worker, which waits for bells: a half-open connection is noticed within these seconds, one
after the other."""

HASTY = {"socket_timeout": 1, "socket_connect_timeout": 1}
"""For whoever rings: nobody waits long for a hint."""

HEARING_SECONDS = 0.25
"""How long a bell is waited for at a time: less than the socket's patience"""

SILENT_SECONDS = 3.0
"""How long nothing is rung after Redis did not answer."""


def lane(pipeline: str) -> str:
    """Name the Celery queue of a pipeline."""
    return f"render.{pipeline}"


def urgent_lane(pipeline: str) -> str:
    """Name the list of bells that a worker listens to while it renders something else."""
    return f"urgent.{pipeline}"


def make_app(settings: Settings, socket: Mapping[str, int] = PATIENT) -> Celery:
    """Build the Celery app that rings bells, or that a worker answers them with."""
    place = redis_place(settings.redis_url.get_secret_value())
    app = Celery("farm", broker=place.broker, set_as_current=False)
    app.conf.update(
        task_ignore_result=True,
        task_store_errors_even_if_ignored=False,
        task_serializer="json",
        accept_content=["json"],
        # A bell is acknowledged before the work: leases, not messages, say what must be redone.
        task_acks_late=False,
        # A busy worker holds no bell back from an idle one.
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
    """Rings lanes; one a process."""

    def __init__(self, settings: Settings) -> None:
        self.app = make_app(settings, HASTY)
        place = redis_place(settings.redis_url.get_secret_value())
        self._redis: Any = place.client(**HASTY)
        self._silent_until = float("-inf")

    def ring(self, pipeline: str, *, urgent: bool = False) -> bool:
        """Wake one worker of a lane; returns whether Redis took the bell.

        An outage is logged and no more: the janitor rings again.

        Args:
            pipeline: the lane's.
            urgent: wake also one that renders something less urgent. Should that bell be lost: it
                asks Postgres, now and then.
        """
        if urgent and not self._add(
            urgent_lane(pipeline), lambda queue: self._redis.rpush(queue, b"")
        ):
            return False
        return self._ring(RENDER_TASK, lane(pipeline))

    def ring_chores(self) -> bool:
        """Wake one exporter; returns whether Redis took the bell."""
        return self._ring(EXPORTER_TASK, EXPORTER_LANE)

    def _ring(self, task: str, queue: str) -> bool:
        return self._add(
            queue,
            lambda queue: self.app.send_task(task, queue=queue, ignore_result=True, retry=False),
        )

    def _add(self, queue: str, add: Callable[[str], object]) -> bool:
        """Add a bell to a queue that has few; returns whether Redis answered."""
        if time.monotonic() < self._silent_until:
            return False
        try:
            if self._redis.llen(queue) < MAX_BELLS:
                add(queue)
        except (redis.RedisError, OperationalError, OSError) as error:
            log.warning("A bell of %s was not rung: %s", queue, error)
            self._silent_until = time.monotonic() + SILENT_SECONDS
            return False
        return True

    def await_urgent(self, pipeline: str) -> bool:
        """Wait a little for a bell that was rung as urgent; returns whether there was one.

        Raises:
            Unavailable: Redis does not answer.
        """
        try:
            return self._redis.blpop([urgent_lane(pipeline)], timeout=HEARING_SECONDS) is not None
        except (redis.RedisError, OSError) as error:
            raise Unavailable(f"Redis does not answer: {error}") from error

    def answers(self) -> bool:
        """Whether Redis answers."""
        try:
            return bool(self._redis.ping())
        except (redis.RedisError, OSError):
            return False

    def close(self) -> None:
        """Give back the connections."""
        self.app.close()
        self._redis.close()
