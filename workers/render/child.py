"""The child process: owns the device, keeps the pipeline loaded, and answers bells."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from farm.config import load_settings
from farm.context import Farm, open_farm
from farm.errors import FarmError, Unavailable, one_line
from farm.pipelines.disk_cache import configure
from farm.pipelines.family import uses_torch
from farm.pipelines.resolve import resolve_pipeline
from farm.pipelines.runtime.devices import even_threads, prepare_torch
from farm.pipelines.runtime.loading import free_what_is_left
from farm.process import collect_usually, set_ready, switch_often
from farm.rendering.warmup import slot_test, warm_up
from farm.store import workers
from farm.store.engine import transaction
from workers.render.assembly import assemble
from workers.render.batch_log import BatchLog
from workers.render.identity import Identity, announced_identity
from workers.render.loop import RenderLoop
from workers.render.scratch import Scratch

log = logging.getLogger(__name__)

LOAD_AGAIN_SECONDS = 10.0
MAX_SECONDS = 300.0
"""Maximum pause between two tries to load a pipeline, in seconds. It doubles each time."""
MAX_CHARACTERS = 500
"""Maximum length of a worker's problem text, in characters."""


class RenderProcess:
    """State of the child process between two bells."""

    def __init__(
        self,
        farm: Farm | None = None,
        identity: Identity | None = None,
        clock: Callable[[], float] = time.monotonic,
        batch_log: BatchLog | None = None,
    ) -> None:
        self._identity = identity or announced_identity()
        self._farm = farm or open_farm(load_settings())
        self._scratch = Scratch(self._farm.settings.scratch_dir, self._identity.id)
        self._clock = clock
        self._batch_log = batch_log
        self._loop: RenderLoop | None = None
        self._pause = LOAD_AGAIN_SECONDS
        self._due = float("-inf")
        """Time of the next try to load, on the monotonic clock."""

    def start(self) -> None:
        """Load the pipeline before the first bell.

        If the previous child died while it loaded, this one might too. So it waits first.
        """
        switch_often()  # the finisher's threads compute while the device's thread needs it
        try:
            ended = self._scratch.unfinished_loads()
            if ended:
                self._pause = min(LOAD_AGAIN_SECONDS * 2.0 ** min(ended - 1, 30), MAX_SECONDS)
                self._fail_to_load("Its process ended while it loaded the pipeline.")
            else:
                self._load()
        except Unavailable as error:
            log.warning("%s: %s", self._identity.name, error)

    def answer(self) -> bool:
        """Answer a bell: render until the lane is empty.

        Returns:
            True if this process may continue. False if a new process must replace it: memory ran
            out, or an error occurred that no batch caused.
        """
        try:
            if self._loop is None and self._clock() >= self._due:
                self._load()
            if self._loop is not None:
                self._render(self._loop)
        except Unavailable as error:
            log.warning("%s waits for the next bell: %s", self._identity.name, error)
        except Exception:
            log.exception("%s failed; a new process replaces it", self._identity.name)
            return False
        return self._loop is None or not self._loop.out_of_memory

    def close(self) -> None:
        """Send the last spans of the traces."""
        self._farm.close_traces()

    def _render(self, loop: RenderLoop) -> None:
        self._say("rendering")
        try:
            loop.run()
        finally:
            self._say("idle")

    def _load(self) -> None:
        """Try to load the pipeline. On failure record the problem, and try later.

        The parent knocks for the later try.
        """
        self._say("loading")
        self._scratch.begin_load()
        problem = self._load_pipeline()
        self._scratch.end_load()
        if problem is not None:
            free_what_is_left()  # not earlier: the error referred to the loaded parts
            self._fail_to_load(problem)

    def _fail_to_load(self, problem: str) -> None:
        self._due = self._clock() + self._pause
        self._pause = min(2 * self._pause, MAX_SECONDS)
        self._say("failed", problem=problem)

    def _load_pipeline(self) -> str | None:
        """Load the pipeline. Return an error message, or None on success."""
        name, pipeline, started = self._identity.name, self._identity.pipeline, self._clock()
        try:
            configure(self._farm.settings.cache_dir)
            # Read again for each try: the checkpoint may have changed.
            resolved = resolve_pipeline(pipeline, self._farm.entry(pipeline))
            if uses_torch(resolved.family):
                prepare_torch(even_threads(self._farm.settings.torch_threads))
            loaded = resolved.family.load(resolved.pipeline)
            collect_usually()
            compiled_shapes = warm_up(resolved, loaded)
            slots = slot_test(resolved, loaded)
            assembly = assemble(
                self._farm,
                self._identity,
                resolved,
                loaded,
                compiled_shapes,
                slots,
                self._batch_log,
            )
        except FarmError as error:
            problem = one_line(error.message, MAX_CHARACTERS)
            log.error("%s cannot load pipeline %s: %s", name, pipeline, problem)  # noqa: TRY400
            log.debug("%s: traceback of this error", name, exc_info=True)
            return problem
        except Exception as error:
            log.exception("%s cannot load pipeline %s", name, pipeline)
            # A message of a library may contain details of this machine: it stays in the log.
            return type(error).__name__
        seconds = self._clock() - started
        log.info("%s loaded %s on %s in %.1f s", name, pipeline, loaded.device, seconds)
        self._loop = assembly.loop
        # A new process takes longer: it also starts and imports modules.
        self._say("idle", device=loaded.device, load_seconds=max(seconds, time.process_time()))
        return None

    def _say(
        self,
        state: str,
        *,
        device: str | None = None,
        problem: str | None = None,
        load_seconds: float | None = None,
    ) -> None:
        set_ready(self._farm.settings.run_dir, ready=state in ("idle", "rendering"))
        with transaction(self._farm.store) as connection:
            workers.set_state(
                connection,
                self._identity.id,
                state,
                device=device,
                problem=problem,
                load_seconds=load_seconds,
            )
