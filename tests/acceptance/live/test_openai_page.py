"""Every Python example of docs/openai.md runs, on the farm, with OpenAI's client."""

from __future__ import annotations

import base64
import hashlib
import io
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from PIL import Image, ImageStat

from tests.acceptance.farms import LiveFarm
from tests.support.docs_page import Block, blocks, executed

PAGE = Path(__file__).parents[3] / "docs" / "openai.md"
EXAMPLES = {
    next(name for name in ("steps", "Idempotency-Key", "stream=True") if name in block.text): block
    for block in blocks("python", PAGE)
}


@pytest.fixture
def run(
    live: LiveFarm,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Any:
    monkeypatch.setenv("OPENAI_BASE_URL", f"{live.farm.url}/openai/v1")
    monkeypatch.setenv("OPENAI_API_KEY", live.farm.api_key)
    monkeypatch.chdir(tmp_path)

    def example(block: Block) -> tuple[list[str], dict[str, Any]]:
        scope = executed(block)
        scope["client"].close()
        return capsys.readouterr().out.splitlines(), scope

    return example


def test_pictures_are_those_of_the_same_job(run: Any, live: LiveFarm, tmp_path: Path) -> None:
    printed, scope = run(EXAMPLES["steps"])
    frames = live.frames(scope["answer"].id)
    job = live.submit(
        pipeline="demo",
        prompts=["a red star on a blue background"],
        images_per_prompt=2,
        seed=7,
        steps=12,
    )
    assert live.ended(job["id"])["status"] == "succeeded"
    same = live.frames(job["id"])
    assert [frame["bucket"] for frame in frames] == [frame["bucket"] for frame in same]
    assert printed == [f"{frame['ordinal']} {frame['seed']} {frame['sha256']}" for frame in same]
    for frame in same:
        content = (tmp_path / f"{frame['ordinal']}.png").read_bytes()
        assert hashlib.sha256(content).hexdigest() == frame["sha256"]


def test_a_key_makes_two_calls_one_job(run: Any) -> None:
    assert run(EXAMPLES["Idempotency-Key"])[0] == ["True"]


def test_a_stream_sends_each_picture(run: Any, tmp_path: Path) -> None:
    printed, _ = run(EXAMPLES["stream=True"])
    assert [line.split()[0] for line in sorted(printed)] == ["0", "1"]
    for line in printed:
        index, digest = line.split()
        content = (tmp_path / f"{index}.png").read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest


def test_a_long_rendering_shows_previews(live: LiveFarm) -> None:
    key = live.farm.api_key
    with OpenAI(base_url=f"{live.farm.url}/openai/v1", api_key=key) as client:
        events = list(
            client.images.generate(
                model="demo",
                prompt="a red star on a blue background",
                stream=True,
                partial_images=2,
                extra_body={"seed": 7, "steps": 400},
            )
        )
    *partial, last = events
    assert last.type == "image_generation.completed"
    assert {event.type for event in partial} == {"image_generation.partial_image"}
    assert 1 <= len(partial) <= 2
    pictures = [
        Image.open(io.BytesIO(base64.b64decode(event.b64_json))).convert("RGB")
        for event in [*partial[-1:], last]
    ]
    assert pictures[0].size == pictures[1].size == (64, 64)
    means = [ImageStat.Stat(picture).mean for picture in pictures]
    away = max(abs(one - other) for one, other in zip(*means, strict=True))
    assert away < 60, "its colours are like those of the result"
