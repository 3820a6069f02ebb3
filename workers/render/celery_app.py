"""The Celery app of a worker: its one task, and the setup of a child process."""

from __future__ import annotations

import os
import signal
import threading

from celery.signals import setup_logging, worker_process_init, worker_process_shutdown

from farm.bells import RENDER_TASK, make_app
from farm.config import load_settings
from farm.process import set_up_logs
from workers.render.batch_log import BatchLog
from workers.render.child import RenderProcess
from workers.render.identity import KNOCK, announced_identity
from workers.render.scratch import Scratch

settings = load_settings()
app = make_app(settings)
app.conf.include = [__name__]

_child: list[RenderProcess] = []
_at_work = threading.Lock()


@setup_logging.connect
def _set_up_logs(**_: object) -> None:
    set_up_logs(settings.log_level)


@worker_process_init.connect
def _start_child(**_: object) -> None:
    # The parent handles a SIGTERM to the whole group: it lets the batch finish first.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    scratch = Scratch(settings.scratch_dir, announced_identity().id)
    batch_log = BatchLog(scratch.log(os.getpid()))
    batch_log.listen()
    _child[:] = [RenderProcess(batch_log=batch_log)]
    signal.signal(KNOCK, lambda *_: _answer())
    with _at_work:
        _child[0].start()


@worker_process_shutdown.connect
def _end_child(**_: object) -> None:
    for child in _child:
        child.close()


@app.task(name=RENDER_TASK, ignore_result=True)
def render() -> None:
    """Answer a bell."""
    _answer()


def _answer() -> None:
    """Answer a bell or a knock. Both run in the main thread; a knock may interrupt a bell."""
    if not _at_work.acquire(blocking=False):
        return
    try:
        if not _child[0].answer():
            _child[0].close()
            os._exit(os.EX_TEMPFAIL)  # the pool starts another child in its place
    finally:
        _at_work.release()
