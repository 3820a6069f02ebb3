"""The supervisor, with small programs that end, linger or fail."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from farm.local import StackError
from farm.local.child import Program, Stage
from farm.local.processes import MARK, leftovers
from farm.local.supervisor import Supervisor
from tests.support.waiting import wait_until

Script = Callable[..., Program]
WAIT_SECONDS = 20


@pytest.fixture
def script(tmp_path: Path) -> Script:
    def make(name: str, code: str, stage: Stage = Stage.WORKER, **more: Any) -> Program:
        argv = [sys.executable, "-S", "-c", code]
        env = {"PATH": os.environ["PATH"], MARK: str(tmp_path)}
        return Program(name, argv, env, tmp_path / f"{name}.log", stage, cwd=tmp_path, **more)

    return make


def says_up(program: Program) -> bool:
    return program.log.is_file() and "up" in program.log.read_text()


def test_a_child_that_keeps_ending_waits_longer_and_shows_its_log(
    script: Script, caplog: pytest.LogCaptureFixture
) -> None:
    with Supervisor() as supervisor:
        child = supervisor.start(
            script("worker demo-1", "print('no weights'); raise SystemExit(3)")
        )
        wait_until(lambda: child.restarts == 3, WAIT_SECONDS, "it was started four times")
    lines = [row.getMessage() for row in caplog.records if row.name == "farm.local.child"]
    assert lines[:3] == [
        f"worker demo-1 ended (exit code 3); it is started again in {delay} s"
        for delay in ("0.2", "0.4", "0.8")
    ]
    assert lines[3].startswith("worker demo-1 keeps ending")
    assert lines[3].endswith("no weights")


def test_a_child_that_never_gets_ready_is_reported_with_its_log(script: Script) -> None:
    with Supervisor() as supervisor:
        program = script("api", "raise SystemExit('no such option')", ready=lambda: False)
        child = supervisor.start(program, lasting=False)
        with pytest.raises(
            StackError, match=r"api ended at its start \(exit code 1\)(.|\n)*no such"
        ):
            supervisor.ready(child, WAIT_SECONDS)


def test_stages_are_stopped_in_order(script: Script, tmp_path: Path) -> None:
    note = tmp_path / "ended"
    code = (
        "import signal, sys; from pathlib import Path\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (open({str(note)!r}, 'a')"
        ".write(NAME + chr(10)), sys.exit()))\n"
        "print('up', flush=True)\nwhile True: signal.pause()\n"
    )
    with Supervisor() as supervisor:
        programs = [
            script(stage.name, f"NAME = {stage.name!r}\n{code}", stage) for stage in reversed(Stage)
        ]
        for program in programs:
            supervisor.start(program)
        wait_until(lambda: all(map(says_up, programs)), WAIT_SECONDS, "all are up")
    assert note.read_text().split() == [stage.name for stage in Stage]


def test_a_deaf_child_and_what_it_started_are_killed(script: Script, tmp_path: Path) -> None:
    code = (
        "import signal, subprocess, sys\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(600)'])\n"
        "print('up', flush=True)\nwhile True: signal.pause()\n"
    )
    program = script("deaf", code, grace=0.2)
    with Supervisor() as supervisor:
        supervisor.start(program)
        wait_until(lambda: says_up(program), WAIT_SECONDS, "it is up")
        assert len(leftovers(tmp_path)) == 2
    wait_until(lambda: not leftovers(tmp_path), WAIT_SECONDS, "the group is gone")


def test_what_a_crashed_child_started_ends_with_it(script: Script, tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, signal\n"
        "subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(600)'])\n"
        "print('up', flush=True); signal.pause()\n"
    )
    program = script("parent", code)
    with Supervisor() as supervisor:
        child = supervisor.start(program)
        wait_until(lambda: says_up(program), WAIT_SECONDS, "it is up")
        before = set(leftovers(tmp_path))
        child.kill()
        wait_until(lambda: child.restarts == 1, WAIT_SECONDS, "it was started again")
        wait_until(lambda: not before & set(leftovers(tmp_path)), WAIT_SECONDS, "the old are gone")


def test_hastening_cuts_the_grace_short(script: Script) -> None:
    code = (
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('up', flush=True)\nwhile True: signal.pause()\n"
    )
    program = script("slow", code, grace=600.0)
    with Supervisor() as supervisor:
        supervisor.start(program)
        wait_until(lambda: says_up(program), WAIT_SECONDS, "it is up")
        supervisor.hasten()
