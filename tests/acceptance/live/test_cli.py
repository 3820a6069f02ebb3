"""The command line against a whole farm. Commands run in this process where possible."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from farm.cli.commands.demo import IMAGES, PROMPTS
from farm.cli.terminal.contact_sheet import CELL, GAP, LABEL_WIDTH, MARGIN
from farm.demo.training.check import read_picture
from farm.demo.training.pictures import Combo
from farm.pipelines.runtime.devices import torch_threads
from tests.acceptance.farms import LiveFarm
from tests.support.cli_runner import Outcome, farm, farm_process, inherited
from tests.support.waiting import wait_until

LONG = ("--images", "200", "--steps", "25")
ARABIC = "نجمة حمراء على خلفية زرقاء 🌟"

Run = Callable[..., Outcome]


@pytest.fixture
def run(live: LiveFarm, tmp_path: Path) -> Run:
    """Run a command in an empty folder, with only FARM_DATA set."""
    return _against(live, tmp_path, farm)


@pytest.fixture
def run_process(live: LiveFarm, tmp_path: Path) -> Run:
    """Run a command in a separate process, as users do."""
    return _against(live, tmp_path, farm_process)


def _against(live: LiveFarm, folder: Path, runner: Run) -> Run:
    def command(*words: str, stdin: str = "", **env: str) -> Outcome:
        data = {"FARM_DATA": str(live.farm.data)}
        outcome = runner(*words, env=data | env, cwd=folder, stdin=stdin)
        assert "Traceback" not in outcome.out + outcome.err
        return outcome

    return command


@pytest.fixture(scope="module")
def rendered(live: LiveFarm) -> dict[str, Any]:
    """Return a finished job of two prompts times three images."""
    job = live.submit(prompts=["a red star", ARABIC], images_per_prompt=3, seed=31, steps=3)
    return live.ended(job["id"])


def test_submit_and_watch(run_process: Run, live: LiveFarm) -> None:
    words = ["submit", "a red star", ARABIC, "--images", "2", "--seed", "7", "--steps", "3"]
    words += ["--grid", "guidance_scale=2,4", "--label", "made=here", "--watch"]
    plain = run_process(*words)
    assert plain.code == 0
    assert re.search(r"Job \S+: 8 frames of demo, normal priority\.", plain.out)
    assert "succeeded: 8 of 8 frames" in plain.out
    outcome = run_process(*words, "--json")
    assert outcome.code == 0
    assert outcome.out.count("\n") == 1
    job = live.get(f"/v1/jobs/{outcome.json['id']}")
    assert outcome.json == job
    assert job["spec"]["prompts"] == ["a red star", ARABIC]
    assert job["spec"]["grid"] == {"guidance_scale": [2, 4]}
    assert job["labels"] == {"made": "here"}


def test_a_job_from_standard_input_is_made_once(run_process: Run, run: Run) -> None:
    body = json.dumps({"pipeline": "demo", "prompts": [ARABIC], "steps": 2, "seed": 3})
    words = ["submit", "--from", "-", "--set", "steps=3", "--idempotency-key", "k1", "--json"]
    first, second = run_process(*words, stdin=body), run(*words, stdin=body)
    assert (first.code, second.code) == (0, 0)
    assert first.json["id"] == second.json["id"]
    assert first.json["spec"]["steps"] == 3
    other = run(*words, stdin=body.replace("3}", "4}"))
    assert other.code == 1
    assert other.err.startswith("Error: ")
    assert other.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--width", "65"], "width"),
        (["--steps", "0"], "steps"),
        (["--pipeline", "nothing"], "'nothing'"),
        (["--set", "nonsense=1"], "'nonsense'"),
        (["--grid", "sampler=ddim,magic"], "sampler"),
        (["--guidance-scale", "nan"], "JSON"),
    ],
)
def test_bad_jobs_are_one_line_naming_the_field(run: Run, words: list[str], named: str) -> None:
    outcome = run("submit", "x", *words)
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith("Error: ")
    assert outcome.err.count("\n") == 1
    assert named in outcome.err


def test_get_fetches_what_is_missing_and_checks_it(
    run: Run, live: LiveFarm, rendered: dict[str, Any], tmp_path: Path
) -> None:
    beginning = rendered["id"][:8]
    first = run("get", beginning, "--dest", "pictures")
    assert first.code == 0
    assert first.out.startswith("6 pictures in pictures (")
    for frame in live.frames(rendered["id"]):
        content = (tmp_path / "pictures" / f"{frame['ordinal']}-{frame['seed']}.png").read_bytes()
        assert hashlib.sha256(content).hexdigest() == frame["sha256"]
    assert len(list((tmp_path / "pictures").iterdir())) == 6
    good = tmp_path / "pictures" / "0-31.png"
    bad = tmp_path / "pictures" / "5-33.png"
    bad.write_bytes(bad.read_bytes()[:100])
    untouched = good.stat().st_mtime_ns
    again = run("get", beginning, "--dest", "pictures", "--json")
    assert again.code == 0
    assert again.json == rendered
    assert good.stat().st_mtime_ns == untouched
    assert live.image(rendered["id"], 5) == bad.read_bytes()
    assert "5 already there" not in again.out


def test_replay_says_identical_and_differs(
    run: Run, live: LiveFarm, rendered: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(live.image(rendered["id"], 4))
    with torch_threads(1):  # in this process, which has already imported torch
        same = run("replay", str(path))
    assert (same.code, same.out.split()[0]) == (0, "identical"), same.out + same.err
    picture = read_image(path)
    text = PngImagePlugin.PngInfo()
    for name in ("farm", "parameters"):
        text.add_itxt(name, picture.info[name])
    red, green, blue = picture.getpixel((9, 5))  # type: ignore[misc]
    picture.putpixel((9, 5), (red ^ 1, green, blue))
    picture.save(path, pnginfo=text)
    with torch_threads(1):
        other = farm("replay", str(path), "--json")
    assert other.code == 1
    assert other.json["difference"] == {
        "pixels": 1,
        "largest": 1,
        "first": [9, 5],
        "box": [9, 5, 10, 6],
    }


def test_replay_of_a_file_without_metadata_takes_the_job(
    run: Run, live: LiveFarm, tmp_path: Path
) -> None:
    job = live.submit(prompts=["a red star"], seed=5, steps=3, metadata="none")
    assert live.ended(job["id"])["status"] == "succeeded"
    path = tmp_path / "picture.png"
    path.write_bytes(live.image(job["id"], 0))
    assert run("replay", str(path)).code == 1, "the file says nothing"
    with torch_threads(1):
        same = run("replay", job["id"][:8], "0")
    assert (same.code, same.out.split()[0]) == (0, "identical"), same.out + same.err


def test_a_cancelled_job_is_exit_code_3(run: Run) -> None:
    job = run("submit", "a red star", *LONG, "--json").json
    paused = run("pause", job["id"][:6], "--json")
    assert paused.json["paused"] is True
    assert run("resume", job["id"]).out.startswith(f"Job {job['id'][:8]} is resumed")
    assert run("cancel", job["id"]).code == 0
    watched = run("watch", job["id"], "--json")
    assert (watched.code, watched.json["status"]) == (3, "cancelled")
    got = run("get", job["id"], "--dest", "some")
    assert got.code == 3
    assert "The job is cancelled" in got.err
    again = run("retry", job["id"])
    assert again.code == 1
    assert "cancelled" in again.err


def test_lists(run: Run, live: LiveFarm, rendered: dict[str, Any]) -> None:
    table = run("jobs").out
    assert re.search(rf"^{rendered['id'][:8]}  succeeded  +100% .* a red star \(\+1\)", table, re.M)
    found = run("jobs", "--label", "made=here", "--status", "succeeded", "--json").json
    assert {job["labels"]["made"] for job in found["data"]} <= {"here"}
    assert run("jobs", "--limit", "1", "--json").json["next"] is not None
    assert run("jobs", "--pipeline", "nothing").out == "No job matches.\n"
    assert ARABIC in run("job", rendered["id"]).out
    assert run("job", rendered["id"], "--json").json == rendered
    (worker,) = run("workers", "--json").json["data"]
    assert worker["name"] in run("workers").out


def test_doctor_finds_all_well(run: Run, run_process: Run) -> None:
    outcome = run("doctor")
    assert outcome.code == 0, outcome.out
    assert outcome.out.splitlines()[-1] == "All checks passed."
    assert "✓ s3" in outcome.out
    plain = run_process("doctor", PYTHONIOENCODING="ascii", FARM_API_KEY="farm_wrong")
    assert plain.code == 1
    assert "FAIL api" in plain.out
    assert plain.out.splitlines()[-1] == "1 check of 14 failed."


def test_a_wrong_key_is_one_line(run: Run) -> None:
    outcome = run("jobs", FARM_API_KEY="farm_wrong")
    assert (outcome.code, outcome.err) == (1, "Error: This API key is unknown or revoked.\n")


def test_a_watch_outlives_the_api(live: LiveFarm) -> None:
    job = live.submit(prompts=["a red star"], images_per_prompt=80, steps=6)
    watching = subprocess.Popen(
        [sys.executable, "-m", "farm.cli", "watch", job["id"]],
        env=inherited() | {"FARM_DATA": str(live.farm.data)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert watching.stderr is not None
    # A farm that never answered gets a shorter timeout.
    assert job["id"][:8] in watching.stderr.readline()
    live.halfway(job["id"])
    api = live.farm.children["api"]
    restarts = api.restarts
    api.kill()
    out, err = watching.communicate(timeout=580)
    wait_until(lambda: api.restarts > restarts and api.serves(), 60, "the API is back")
    assert watching.returncode == 0, err
    assert "80 of 80 frames" in out


def test_on_a_terminal_a_bar_is_drawn_and_ctrl_c_leaves_the_job(live: LiveFarm, run: Run) -> None:
    job = live.submit(prompts=["a red star"], images_per_prompt=200, steps=25)
    ours, theirs = pty.openpty()
    env = {"FARM_DATA": str(live.farm.data), "TERM": "xterm-256color", "COLUMNS": "120"}
    # A process in the background ignores Ctrl-C, and its children would too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    watching = subprocess.Popen(
        [sys.executable, "-m", "farm.cli", "watch", job["id"]],
        env=os.environ | env,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        process_group=0,
    )
    signal.signal(signal.SIGINT, before)
    os.close(theirs)
    shown = b""

    def drawn() -> bool:
        nonlocal shown
        shown += os.read(ours, 4096)
        return b" 200" in shown or b"/200" in shown

    wait_until(drawn, 30, "the bar was drawn")
    watching.send_signal(signal.SIGINT)
    reader = threading.Thread(target=lambda: _drain(ours))
    reader.start()
    assert watching.wait(30) == 130
    reader.join()
    os.close(ours)
    assert "━" in shown.decode(errors="replace")
    assert live.get(f"/v1/jobs/{job['id']}")["status"] in {"queued", "running"}
    assert run("cancel", job["id"]).code == 0


def _drain(terminal: int) -> None:
    """Read the remaining output: a process with a full pipe cannot end."""
    try:
        while os.read(terminal, 4096):
            pass
    except OSError:  # its other end is closed
        return


def test_trials_are_compared_on_a_sheet(run: Run, live: LiveFarm, tmp_path: Path) -> None:
    words = ("a red star", ARABIC, "--try", "steps=2", "--try", "steps=3")
    more = ("--images", "2", "--seed", "31", "--set", "guidance_scale=2", "--json")
    told = run("compare", *words, *more).json
    assert [job["spec"]["steps"] for job in told["jobs"]] == [2, 3]
    assert {job["labels"]["compare"] for job in told["jobs"]} == {told["label"]}
    assert {job["spec"]["guidance_scale"] for job in told["jobs"]} == {2}
    folder = tmp_path / "comparison"
    assert told["sheet"] == str(folder.resolve() / "contact-sheet.png")
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*.png")}
    names = ("0-31.png", "1-32.png", "2-31.png", "3-32.png")
    assert files == {
        "contact-sheet.png",
        *(f"demo-steps={steps}/{name}" for steps in (2, 3) for name in names),
    }
    with Image.open(told["sheet"]) as sheet:
        assert sheet.width == 2 * MARGIN + LABEL_WIDTH + 4 * (CELL + GAP) - GAP
        for column in range(4):
            file = folder / f"demo-steps={2 + column // 2}" / names[2 + column % 2]
            with Image.open(file) as picture:
                middle = picture.convert("RGB").resize((CELL, CELL), Image.Resampling.LANCZOS)
            x = MARGIN + LABEL_WIDTH + column * (CELL + GAP) + CELL // 2
            y = sheet.height - MARGIN - CELL // 2
            assert sheet.getpixel((x, y)) == middle.getpixel((CELL // 2, CELL // 2))


def test_nothing_is_submitted_if_one_trial_is_wrong(run: Run, live: LiveFarm) -> None:
    before = run("jobs", "--json").json
    wrong = run("compare", "a star", "--try", "steps=2", "--try", "steps=0")
    assert wrong.code == 1
    assert "demo, steps=0: steps" in wrong.err
    wrong = run("compare", "a star", "--pipelines", "demo,nothing")
    assert (wrong.code, "nothing: " in wrong.err) == (1, True)
    assert run("jobs", "--json").json == before
    for word in ("--set", "--try"):
        shared = run("compare", "a star", word, "seed=5")
        assert (shared.code, "seed: all trials share it" in " ".join(shared.err.split())) == (
            2,
            True,
        )
    wide = run("compare", "a star", "--images", "61")
    assert (wide.code, "60 columns" in " ".join(wide.err.split())) == (2, True)


def test_demo_uses_the_farm_that_runs(
    run: Run, live: LiveFarm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("farm.cli.commands.demo.PROMPTS", some := PROMPTS[:2])
    outcome = run("demo", "--dest", "pictures")
    assert outcome.code == 0, outcome.err
    assert f"Using the running farm: {live.farm.url}" in outcome.out
    check_demo(tmp_path / "pictures", some)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "pictures").glob("*-*.png")}
    assert run("demo", "--dest", "pictures").code == 0
    times.pop(tmp_path / "pictures" / "contact-sheet.png")
    assert times == {path: path.stat().st_mtime_ns for path in times}
    assert live.get("/readyz")["ready"]


def test_demo_from_nothing(tmp_path: Path) -> None:
    outcome = farm_process("demo", env={}, cwd=tmp_path)
    assert outcome.code == 0, outcome.out + outcome.err
    assert "No farm runs on farm-data" in outcome.err
    sheet = str(tmp_path.resolve() / "demo-pictures" / "contact-sheet.png")
    assert sheet in outcome.out
    assert "farm up" in outcome.out
    check_demo(tmp_path / "demo-pictures", PROMPTS)
    assert processes_naming(tmp_path) == []
    away = farm_process("jobs", env={"FARM_DATA": "farm-data"}, cwd=tmp_path)
    assert away.code == 1
    assert "Is `farm up` running?" in away.err


def read_image(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.copy()


def check_demo(folder: Path, prompts: Sequence[str]) -> None:
    """Check that every picture is there, and that almost all show their prompt."""
    pictures = {path.name: read_image(path) for path in folder.glob("*-*.png")}
    sheet = pictures.pop("contact-sheet.png")
    assert sheet.width > 600
    assert len(pictures) == len(prompts) * IMAGES
    right = 0
    for name, picture in pictures.items():
        words = prompts[int(name.split("-")[0]) // IMAGES].split()
        right += read_picture(picture) == Combo(shape=words[2], colour=words[1], ground=words[5])
    assert right >= 0.8 * len(pictures)


def processes_naming(folder: Path) -> list[str]:
    """List the live processes with the folder in their command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if bytes(folder) in command:
            found.append(command.replace(b"\0", b" ").decode())
    return found
