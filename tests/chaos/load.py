"""The load: jobs submitted over HTTP. Each is repeated with its key until it is accepted."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any
from uuid import UUID

import httpx

from tests.chaos.stack import Stack
from tests.chaos.truth import DatabaseProbe

BACKLOG = 48
"""Number of frames kept waiting or running."""
MAX_ATTEMPTS = 10
SUBMIT_SECONDS = 60.0
REPEATED = 0.15
"""Share of accepted jobs that are submitted a second time."""
KINDS: list[dict[str, Any]] = [
    {},
    {"seed": None},
    {"seed": 7, "repeatable": False, "reuse": True},
]
"""Kinds of steady jobs: repeatable, and two whose buckets are chosen at the claim."""
TABLES = 0.25
"""Share of steady jobs whose frames are lines of a table, in groups of equal settings."""
NULL: dict[str, Any] = {
    "pipeline": "null",
    "width": 32,
    "height": 32,
    "steps": 4,
    "step_seconds": 0.03,
}
DEMO: dict[str, Any] = {"pipeline": "demo", "width": 64, "height": 64, "steps": 3}


@dataclass(frozen=True)
class Accepted:
    """A job whose submission was answered with a 2xx."""

    id: UUID
    key: str
    total: int
    poison: frozenset[int] = frozenset()
    """Ordinals that must not succeed."""


class Load:
    """The jobs of one row: submits them, and records the accepted ones."""

    def __init__(self, stack: Stack, name: str, seed: str, api_key: str | None = None) -> None:
        self.accepted: list[Accepted] = []
        self.problems: list[str] = []
        self.name = name
        self.step_seconds: float = NULL["step_seconds"]
        self.poison_attempts = 3
        self._stack = stack
        self._random = Random(seed)
        self._truth = DatabaseProbe(stack.servers.database_url)
        self._http = httpx.Client(
            headers={"Authorization": f"Bearer {api_key or stack.api_key}"},
            timeout=5,
            trust_env=False,
        )
        self._numbers = 0
        self._lock = threading.Lock()
        self._over = threading.Event()

    def close(self) -> None:
        self._http.close()
        self._truth.close()

    def null(self, frames: int, **fields: Any) -> Accepted:
        """Submit a job for the null lane."""
        body = {**NULL, "step_seconds": self.step_seconds, "images_per_prompt": frames}
        return self.submit({**body, "prompts": ["noise"], **fields})

    def table(self, frames: int, **fields: Any) -> Accepted:
        """Submit a job for the null lane whose lines differ in steps and width."""
        lines = [
            {"prompt": "noise", "steps": self._random.choice([3, 4, 5])}
            | ({"width": 64} if self._random.random() < 0.3 else {})
            for _ in range(frames)
        ]
        content = "".join(json.dumps(line) + "\n" for line in lines)
        apis = self._random.sample(sorted(self._stack.apis), len(self._stack.apis))
        found = self._until_answered("/v1/inputs", apis, content=content)
        body = {**NULL, "step_seconds": self.step_seconds, "input": found["id"]}
        return self.submit({**body, **fields})

    def demo(self, frames: int) -> Accepted:
        """Submit a job for the demo's lane."""
        return self.submit({**DEMO, "prompts": ["a red star"], "images_per_prompt": frames})

    def poison(self, word: str, frames: int = 8) -> Accepted:
        """Submit a job with one random frame that triggers the failpoint of a word."""
        bad = self._random.randrange(frames)
        prompts = [word if index == bad else "noise" for index in range(frames)]
        body = {**NULL, "prompts": prompts, "max_attempts": self.poison_attempts}
        return self.submit(body, poison={bad})

    def submit(
        self,
        body: dict[str, Any],
        poison: set[int] | None = None,
        first: str | None = None,
    ) -> Accepted:
        """Submit a job until it is accepted, to both APIs in turn, beginning with `first`."""
        with self._lock:
            self._numbers += 1
            key = f"{self.name}-{self._numbers}"
            apis = self._random.sample(sorted(self._stack.apis), len(self._stack.apis))
            repeats = self._random.random() < REPEATED
        if first is not None:
            apis.sort(key=lambda api: api != first)
        body = {"max_attempts": MAX_ATTEMPTS, "seed": self._numbers * 1000, **body}
        body["labels"] = {"row": self.name}
        job = self._until_accepted(body, key, apis)
        accepted = Accepted(UUID(job["id"]), key, job["total"], frozenset(poison or ()))
        self.accepted.append(accepted)
        if repeats:
            again = self._until_accepted(body, key, apis[::-1])["id"]
            if again != job["id"]:
                self.problems.append(f"key {key} gave the jobs {job['id']} and {again}")
        return accepted

    def _until_accepted(self, body: dict[str, Any], key: str, apis: list[str]) -> Any:
        headers = {"Idempotency-Key": key}
        return self._until_answered("/v1/jobs", apis, json=body, headers=headers)

    def _until_answered(self, path: str, apis: list[str], **call: Any) -> Any:
        deadline, turn = time.monotonic() + SUBMIT_SECONDS, 0
        while True:
            url = self._stack.apis[apis[turn % len(apis)]]
            turn += 1
            try:
                response = self._http.post(f"{url}{path}", **call)
                if response.is_success:
                    return response.json()
                answer = f"{response.status_code} {response.text[:200]}"
                if response.is_client_error:
                    raise AssertionError(f"{path} was refused: {answer}")
            except httpx.TransportError as error:
                answer = repr(error)
            if time.monotonic() > deadline:
                raise AssertionError(f"{path} was not accepted: {answer}")
            time.sleep(0.1)

    @contextmanager
    def steady(self) -> Iterator[None]:
        """Submit jobs while the block runs, as fast as frames are done."""
        thread = threading.Thread(target=self._submit_on, name=f"load {self.name}")
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def _submit_on(self) -> None:
        try:
            while not self._over.is_set():
                if self._truth.outstanding() < BACKLOG:
                    kind, frames = self._random.choice(KINDS), self._random.randint(6, 30)
                    if self._random.random() < TABLES:
                        self.table(frames, **kind)
                    else:
                        self.null(frames, **kind)
                else:
                    self._over.wait(0.1)
        except Exception as error:
            self.problems.append(f"the load ended: {error}")
