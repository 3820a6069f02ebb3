"""The child: it owns the device, pins the pipeline, and answers bells."""

from __future__ import annotations

import logging
import time

from farm.config import load_settings
from farm.context import open_farm
from farm.errors import FarmError, Unavailable
from farm.families.devices import prepare_torch
from farm.families.loading import free_what_is_left
from farm.store import workers
from farm.store.engine import transaction
from workers.identity import announced_identity
from workers.line import RenderLine
from workers.warming import warm_up

log = logging.getLogger(__name__)

LOAD_AGAIN_SECONDS = 10.0
MOST_SECONDS = 300.0
"""Between tries to load a pipeline: twice as long each time, up to this."""


class Child:
    """Everything the spawned process holds between two bells."""

    def __init__(self) -> None:
        self._identity = announced_identity()
        self._farm = open_farm(load_settings())
        self._line: RenderLine | None = None
        self._tried = float("-inf")
        self._pause = LOAD_AGAIN_SECONDS

    def start(self) -> None:
        """Pin the pipeline, before the first bell."""
        try:
            self._load()
        except Unavailable as error:
            log.warning("%s: %s", self._identity.name, error)

    def answer(self) -> None:
        """Answer a bell: render until the lane is empty."""
        try:
            if self._line is None and time.monotonic() - self._tried > self._pause:
                self._load()
            if self._line is not None:
                self._render(self._line)
        except Unavailable as error:
            log.warning("%s waits for the next bell: %s", self._identity.name, error)

    def _render(self, line: RenderLine) -> None:
        self._say("rendering")
        try:
            line.run()
        finally:
            self._say("idle")

    def _load(self) -> None:
        self._tried = time.monotonic()
        pipeline = self._identity.pipeline
        self._say("loading")
        try:
            prepare_torch(self._farm.settings.torch_threads)
            offer = self._farm.offer(pipeline)
            loaded = offer.family.load(offer.pipeline)
            warmth = warm_up(offer, loaded)
        except Exception as error:
            log.exception("%s cannot load pipeline %s", self._identity.name, pipeline)
            self._pause = min(2 * self._pause, MOST_SECONDS)
            free_what_is_left()
            # What a library says may tell of this machine: that stays in the log.
            told = error.message if isinstance(error, FarmError) else type(error).__name__
            self._say("failed", problem=told)
            return
        seconds = time.monotonic() - self._tried
        log.info(
            "%s loaded %s on %s in %.1f s", self._identity.name, pipeline, loaded.device, seconds
        )
        self._line = RenderLine(self._farm, self._identity, offer, loaded, warmth)
        self._say("idle", device=loaded.device)

    def _say(self, state: str, *, device: str | None = None, problem: str | None = None) -> None:
        with transaction(self._farm.store) as connection:
            workers.set_state(connection, self._identity.id, state, device=device, problem=problem)
