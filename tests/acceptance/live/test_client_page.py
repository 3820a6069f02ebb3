"""Every example of docs/client.md runs, on the farm."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import re
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from farm.domain.webhook_signatures import new_secret, shown, signed_headers
from tests.acceptance.farms import LiveFarm
from tests.support.docs_page import Block, blocks, executed

PAGE = Path(__file__).parents[3] / "docs" / "client.md"
EXAMPLES = {block.text.splitlines()[0] + str(block.line): block for block in blocks("python", PAGE)}
RECEIVER = next(block for block in EXAMPLES.values() if "@app.post" in block.text)


@pytest.fixture
def run(
    live: LiveFarm,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Any:
    monkeypatch.setenv("FARM_API_URL", live.farm.url)
    monkeypatch.setenv("FARM_API_KEY", live.farm.api_key)
    monkeypatch.chdir(tmp_path)

    def example(block: Block) -> tuple[str, dict[str, Any]]:
        scope = executed(block)
        if close := getattr(scope.get("farm"), "close", None):
            close()
        return capsys.readouterr().out, scope

    return example


def named(words: str) -> Block:
    [found] = [block for block in EXAMPLES.values() if words in block.text]
    return found


def test_images_are_downloaded(run: Any, live: LiveFarm, tmp_path: Path) -> None:
    printed, scope = run(named("images_per_prompt=2, seed=7"))
    frames = live.frames(scope["job"].id)
    assert printed.splitlines() == [
        f"{frame['ordinal']}-{frame['seed']}.png {frame['seed']} {frame['sha256']}"
        for frame in frames
    ]
    for frame in frames:
        content = (tmp_path / f"{frame['ordinal']}-{frame['seed']}.png").read_bytes()
        assert hashlib.sha256(content).hexdigest() == frame["sha256"]


def test_asyncio(run: Any) -> None:
    printed, _ = run(named("asyncio.run"))
    assert printed.splitlines() == ["0-7.png", "0-7.png"]


def test_once_only(run: Any) -> None:
    assert run(named("again = "))[0] == "True\n"


def test_waiting(run: Any) -> None:
    printed, _ = run(named("WaitTimeout"))
    assert printed.startswith("succeeded {")


def test_watching(run: Any) -> None:
    printed, _ = run(named("match event.kind"))
    lines = printed.splitlines()
    assert lines[0].startswith("now ")
    assert lines[-1] == "job.succeeded"
    stored = [json.loads(line.removeprefix("stored ")) for line in lines if "stored" in line]
    assert sorted(itertools.chain(*stored)) == [0, 1, 2]


def test_many_jobs(run: Any) -> None:
    assert run(named("submit_many"))[0] == "1017 succeeded\n1018 succeeded\n"


def test_errors(run: Any) -> None:
    first, second = run(block := named("steps=0"))[0].splitlines()
    assert f"print(error.message)  # {first}" in block.text
    param, code, request_id, key = second.split()
    assert (param, code, len(key)) == ("steps", "invalid_request", 32)
    assert request_id != "None"


def test_the_receiver(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = new_secret()
    monkeypatch.setenv("FARM_WEBHOOK_SECRET", shown(secret))
    _, scope = run(RECEIVER)
    body = b'{"type": "job.succeeded", "timestamp": "", "data": {"id": "x"}}'
    headers = signed_headers("msg_1", int(time.time()), body, [secret])
    assert _posted(scope["app"], body, headers) == 204
    assert _posted(scope["app"], body + b" ", headers) == 401


def _posted(app: Any, body: bytes, headers: dict[str, str]) -> int:
    async def post() -> int:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return (await client.post("/hooks/farm", content=body, headers=headers)).status_code

    return asyncio.run(post())


def test_each_example_is_tested_here() -> None:
    tested = Path(__file__).read_text()
    assert len(EXAMPLES) == len(re.findall(r"run\((?:block := )?(?:named\(\"|RECEIVER\))", tested))
