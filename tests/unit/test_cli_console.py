"""Output of the commands: numbers, times, text from other sources."""

from __future__ import annotations

import pytest
import typer
from PIL import Image, ImageFont
from rich.console import Console

from farm.cli.commands.compare import trials_of
from farm.cli.commands.doctor import marks
from farm.cli.commands.workers import doing
from farm.cli.terminal import console as terminal
from farm.cli.terminal.console import clean, columns, note, one_line, say, show_table, tail
from farm.cli.terminal.contact_sheet import (
    CELL,
    GAP,
    HEAD_LINE,
    MARGIN,
    PAPER,
    Row,
    contact_sheet,
    wrapped,
)
from farm.cli.terminal.job_progress import Bar, Lines, busyness, detail, finished, headline, summary
from farm.client.objects import Batch, JobData, Worker
from farm.client.views import file_name
from farm.humanize import pace, percent, size

JOB: JobData = {
    "id": "4f2a81c3-0000-4000-8000-000000000000",
    "tenant": "default",
    "pipeline": "demo",
    "status": "running",
    "paused": False,
    "priority": "normal",
    "total": 1200,
    "counts": {"waiting": 1180, "running": 8, "succeeded": 11, "dead": 1, "cancelled": 0},
    "progress": 0.01,
    "pace": 0.5,
    "eta_seconds": 90.0,
    "labels": {},
    "bytes": 0,
    "failures": {},
    "waiting_because": None,
    "created_at": "2026-01-01T00:00:00Z",
    "started_at": "2026-01-01T00:00:00Z",
    "finished_at": None,
    "spec": {"prompts": ["a star"], "prompt_count": 1},
}
WORKER: Worker = {
    "id": "7d0c5b1e-0000-4000-8000-000000000000",
    "name": "w0",
    "pipeline": "demo",
    "state": "idle",
    "draining": False,
    "device": "cpu",
    "seen_at": "2026-01-01T00:00:00Z",
    "succeeded": 0,
    "busy": None,
    "batch": None,
    "problem": None,
}


def test_sizes() -> None:
    assert [size(n) for n in (812, 4096, 3 * 2**30, 2**42)] == [
        "812 bytes",
        "4.0 KiB",
        "3.0 GiB",
        "4.0 TiB",
    ]


def test_text_from_elsewhere_cannot_steer_the_terminal() -> None:
    assert clean("a\x1b[2Jb\x07\x9bc\td\ne") == "a\ufffd[2Jb\ufffd\ufffdc\td\ne"
    assert clean("نجمة 🌟 [bold]") == "نجمة 🌟 [bold]"
    assert one_line("  two\n lines ") == "two lines"
    assert one_line("x" * 70, 10) == "x" * 9 + "…"


@pytest.mark.parametrize("name", ["gpu[/]-1", "[red]x[/red]", "\x1b]52;c;eA==\x07", "a\u202eb"])
def test_a_cell_of_a_table_cannot_steer_the_terminal(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    table = columns("name", "state")
    table.add_row(name, "idle")
    show_table(table)
    told = capsys.readouterr().out
    assert clean(name) in told
    assert not {"\x1b", "\x07", "\u202e"} & set(told)


@pytest.mark.parametrize(
    "prompt", ["a [cat:dog:0.5] :smile:", "<lora:x:0.8>", ":red_heart: :no:", "(a:1.2)"]
)
def test_a_prompt_is_shown_letter_by_letter(
    capsys: pytest.CaptureFixture[str], prompt: str
) -> None:
    """A word between colons is not shown as an emoji."""
    table = columns("prompt", "more")
    table.add_row(prompt, tail(prompt))
    say(prompt)
    note(prompt)
    show_table(table)
    told = capsys.readouterr()
    assert (told.out.count(prompt), told.err.count(prompt)) == (3, 1)


def test_the_last_column_alone_gives_way() -> None:
    table = columns("job", "prompt")
    table.add_row("4f2a81c3", tail("[bold] a very long prompt that goes on and on"))
    console = Console(width=24)
    with console.capture() as capture:
        console.print(table)
    assert "4f2a81c3  [bold] a very…" in capture.get()


def test_a_job_in_words() -> None:
    assert finished(JOB) == 12
    assert headline(JOB).plain == "running  12/1,200  30.0 frames/min  1 min 30 s left"
    unknown: JobData = {**JOB, "paused": True, "pace": None, "eta_seconds": None}
    assert headline(unknown).plain == "paused  12/1,200"
    assert detail(JOB) == "1,180 waiting, 8 running, 11 succeeded, 1 dead"
    stored: JobData = {**JOB, "bytes": 4096, "failures": {"worker_lost": 3, "render_error": 1}}
    assert detail(stored).endswith(
        "1 dead, 4.0 KiB. failed attempts: 3 worker lost, 1 render error"
    )
    assert detail({**JOB, "waiting_because": "It is paused."}).endswith("1 dead. It is paused.")
    ended: JobData = {**JOB, "status": "partial", "finished_at": "2026-01-01T00:00:12Z"}
    assert summary(ended) == "partial: 11 of 1,200 frames in 12 s (1 dead)"
    assert summary({**JOB, "status": "cancelled", "started_at": None}) == (
        "cancelled: 11 of 1,200 frames (1 dead)"
    )


def test_a_pace_has_something_before_the_point() -> None:
    paces = (6783.0, 1.0, 0.07, 0.001)
    assert [pace(each) for each in paces] == [
        "6,783.0 frames/s",
        "1.0 frames/s",
        "4.2 frames/min",
        "3.6 frames/h",
    ]


def test_lines_tell_only_what_is_new(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines()
    for progress, why in ((0.0, "No worker."), (0.0, "No worker."), (0.04, None), (0.2, None)):
        lines.show({**JOB, "progress": progress, "waiting_because": why})
    told = capsys.readouterr()
    assert told.out == ""
    assert [line.endswith("No worker.") for line in told.err.splitlines()] == [True, False, False]


def test_the_bar_draws_a_job() -> None:
    bar = Bar()
    console = Console(width=100, force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(bar)
        bar.show({**JOB, "waiting_because": "why \x1b[2J not"})
        console.print(bar)
    drawn = capture.get()
    assert "4f2a81c3" in drawn
    assert "30.0 frames/min" in drawn
    assert "\x1b[2J" not in drawn


def test_how_busy_the_workers_of_a_job_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert [percent(share) for share in (None, 0.0, 0.974, 1.0)] == ["—", "0%", "97%", "100%"]
    workers: list[Worker] = [
        {**WORKER, "name": f"w{number}", "busy": share}
        for number, share in enumerate((0.974, None, 0.5, 1.0, 0.0, 0.1, 0.2))
    ]
    assert busyness(workers, "demo") == "busy: w0 97%, w2 50%, w3 100%, w4 0%, 2 more"
    assert busyness(workers[:2], "demo") == "busy: w0 97%"
    assert busyness(workers, "other") == busyness(workers[1:2], "demo") == ""
    Lines().show(JOB, "busy: w0 97%")
    assert capsys.readouterr().err.endswith("  busy: w0 97%\n")
    bar, console = Bar(), Console(width=100, force_terminal=True, color_system=None)
    bar.show(JOB, "busy: w0 97%")
    with console.capture() as capture:
        console.print(bar)
    assert "\n  busy: w0 97%" in capture.get()


def test_what_a_worker_does() -> None:
    assert doing(WORKER) == ""
    assert doing({**WORKER, "problem": "no\nmemory"}) == "no memory"
    batch: Batch = {"frames": 8, "step": 3, "steps": 25}
    assert doing({**WORKER, "batch": batch}) == "8 frames, step 3 of 25"
    assert doing({**WORKER, "batch": {**batch, "steps": 0}}) == "8 frames, starting"


def test_marks_without_unicode() -> None:
    assert marks("utf-8")[True][0] == "✓"
    for encoding in ("ascii", "latin-1", "ANSI_X3.4-1968"):
        assert all(mark.isascii() for mark, _style in marks(encoding).values())


def test_a_picture_is_named_by_its_frame() -> None:
    assert file_name({"ordinal": 12, "seed": 31}) == "12-31.png"
    assert file_name({"ordinal": 12, "seed": 31, "format": "jpeg"}) == "12-31.jpg"
    assert file_name({"ordinal": 12, "seed": 31, "format": "webp"}) == "12-31.webp"


def test_a_narrow_terminal_cuts_no_id(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "PIPE_WIDTH", 60)
    table = columns("id", "tenant", "why")
    name, tenant = "5d0a3b0a-2ad3-4b7e-9d4c-8e0f3c2f5e11", "a-tenant-with-a-long-name" * 3
    table.add_row(name, tenant, tail("a reason that is long " * 9))
    show_table(table)
    [_, row] = capsys.readouterr().out.splitlines()
    assert row.startswith(f"{name}  {tenant}  a reason")
    assert row.rstrip().endswith("…")


def test_the_contact_sheet_holds_every_picture() -> None:
    colours = [(200, 30, 40), (30, 60, 200)]
    rows = [
        Row(prompt, [Image.new("RGB", (64, 64), colour) for colour in colours])
        for prompt in ("a red star on a blue background", "two")
    ]
    sheet = contact_sheet("the farm", "demo", ["seed 1", "seed 2"], rows)
    bottom = sheet.height - MARGIN - CELL // 2
    right = sheet.width - MARGIN - CELL // 2
    assert sheet.getpixel((right, bottom)) == colours[1]
    assert sheet.getpixel((right - CELL - GAP, bottom - CELL - GAP)) == colours[0]
    assert sheet.getpixel((2, 2)) == (250, 249, 246)


def test_the_contact_sheet_shows_shapes_and_what_is_missing() -> None:
    red = (200, 30, 40)
    row = Row("a star", [Image.new("RGB", (64, 32), red), None])
    plain = contact_sheet("the farm", "demo", ["a", "b"], [row])
    heads = ["a pipeline with a long name, steps=10\nseed 1", "b"]
    sheet = contact_sheet("the farm", "demo", heads, [row])
    assert sheet.width == plain.width
    assert sheet.height == plain.height + 2 * HEAD_LINE
    middle = sheet.height - MARGIN - CELL // 2
    left = sheet.width - MARGIN - CELL - GAP - CELL // 2
    assert sheet.getpixel((left, middle)) == red
    for dx, dy in ((0, CELL // 2 - 10), (CELL + GAP, 40)):  # above a wide picture; no picture
        assert sheet.getpixel((left + dx, middle - dy)) == PAPER


@pytest.mark.parametrize(
    ("pipelines", "settings", "names"),
    [
        ("sd15, sdxl,sd15", [], ["sd15", "sdxl"]),
        (
            "sd15,sdxl",
            ["steps=10 sampler=euler", "steps=20"],
            [
                *("sd15, steps=10, sampler=euler", "sd15, steps=20"),
                *("sdxl, steps=10, sampler=euler", "sdxl, steps=20"),
            ],
        ),
        ("sd15", ["steps=1", "steps=1"], ["sd15, steps=1"]),
        ("sd15", ['negative_prompt="a b"'], ["sd15, negative_prompt=a b"]),
    ],
)
def test_each_pipeline_is_tried_with_each_set_of_settings(
    pipelines: str, settings: list[str], names: list[str]
) -> None:
    assert [each.name for each in trials_of(pipelines, settings)] == names


def test_each_trial_has_a_folder() -> None:
    words = [
        "steps=10",
        'sampler="a b"',
        'sampler="a-b"',
        f"sampler={'x' * 300}1",
        f"sampler={'x' * 300}2",
    ]
    folders = [each.folder for each in trials_of("sd15", words)]
    assert folders[0] == "sd15-steps=10"
    assert len(set(folders)) == len(folders)
    assert max(map(len, folders)) < 100


@pytest.mark.parametrize(
    ("pipelines", "settings"), [(" ,", []), ("sd15", ["steps"]), ("sd15", ['a="b'])]
)
def test_a_wrong_trial_is_refused(pipelines: str, settings: list[str]) -> None:
    with pytest.raises(typer.BadParameter):
        list(trials_of(pipelines, settings))


def test_labels_are_broken_between_words() -> None:
    font = ImageFont.load_default(18)
    lines = wrapped("a red star on a blue background", 120, font)
    assert " ".join(lines) == "a red star on a blue background"
    assert len(lines) > 1
    assert all(font.getlength(line) <= 120 for line in lines)
    assert wrapped("", 120, font) == []
