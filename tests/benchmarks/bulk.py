"""Row g: a million distinct prompts from a file, and a million frames to the end.

`farm submit --from` is compared with copying one realistic row per frame into the same Postgres.
Frames are null renders. All their pictures except the last ones are discarded.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from farm.local import commands
from farm.process import cores
from tests.benchmarks.figures import Row, Series, in_turn, percentile
from tests.benchmarks.stand import BenchFarm, BenchServers, wait_closely

PROMPTS = 1_000_000
STORED = 50_000
STOPPING = 25_000
"""Maximum number of frames that workers render between the signal to stop and their end."""
SHORT = 4_000
SHORT_STORED = 1_000
BATCH = 256
LEAST = 2.0
MAX_MEMORY = 300.0
"""Maximum memory of a process, in MB."""
MAX_CALL_MS = 100.0
MIN_CLAIM = 0.9
LOOK_SECONDS = 0.5
WORDS = ("old", "small", "bright", "dark", "red", "green", "blue", "castle", "harbour", "forest")
"""Words from which prompts are generated."""

# The table of a farm that stores a row for each frame from the start.
CREATE = """
CREATE TABLE copied (
    id uuid PRIMARY KEY, job_id uuid NOT NULL, ordinal bigint NOT NULL, state text NOT NULL,
    priority smallint NOT NULL, prompt text NOT NULL, negative_prompt text NOT NULL,
    seed bigint NOT NULL, params jsonb NOT NULL, attempts smallint NOT NULL DEFAULT 0,
    created_at timestamptz NOT NULL DEFAULT now());
CREATE INDEX copied_job ON copied (job_id, state)
"""
COPY = """
COPY copied (id, job_id, ordinal, state, priority, prompt, negative_prompt, seed, params) FROM STDIN
"""
PARAMS = json.dumps({"width": 32, "height": 32, "steps": 1, "cfg": 7.5, "sampler": "ddim"})
SIZES = """
SELECT pg_total_relation_size('frames') + pg_total_relation_size('events')
       + pg_total_relation_size('input_parts') + pg_total_relation_size('requeued_frames')
"""


def rows(stand: BenchServers, short: bool) -> list[Row]:
    """Measure the submission, then the run."""
    prompts = SHORT if short else PROMPTS
    path = stand.folder.path / "prompts.jsonl"
    write_prompts(path, prompts)
    with stand.site() as site, site.api() as (url, key), memory_of(url) as api_memory:
        submitted = submission(stand, site, path, prompts, (url, key), short)
    submitted.series.append(Series("the API's memory", [api_memory.last], "MB"))
    if not 0 < api_memory.last <= MAX_MEMORY:
        submitted.problems.append(f"the API took {api_memory.last:.0f} MB")
    return [submitted, run(stand, path, prompts, short)]


def write_prompts(path: Path, count: int) -> None:
    """Write a file of distinct prompts of about a hundred characters."""
    drawn = random.Random(7)
    with path.open("w") as file:
        for number in range(count):
            words = " ".join(drawn.choices(WORDS, k=16))
            file.write(json.dumps({"prompt": f"{words}, number {number}"}) + "\n")


@dataclass
class Memory:
    """Peak memory of a process, in MB. 0 if the machine does not report it."""

    pid: int
    last: float = 0.0

    def most(self) -> float:
        """Read the memory again. After the process's end the last value counts."""
        with suppress(OSError):
            status = Path(f"/proc/{self.pid}/status").read_text()
            for line in status.splitlines():
                if line.startswith("VmHWM"):
                    self.last = int(line.split()[1]) / 1000
        return self.last


@dataclass
class Command:
    """`farm submit --from` as users run it, with its peak memory."""

    env: dict[str, str]
    memory: list[float] = field(default_factory=list)

    def submit(self, path: Path, name: str) -> str:
        words = ["submit", "--from", str(path), "--name", name, "--pipeline", "null"]
        words += ["--priority", "bulk", "--set", "width=32", "--set", "height=32"]
        words += ["--steps", "1", "--set", "step_seconds=0.0", "--json"]
        argv = [sys.executable, "-m", "farm.cli", *words]
        with subprocess.Popen(argv, env=self.env, stdout=subprocess.PIPE) as process:
            memory = Memory(process.pid)
            while process.poll() is None:
                memory.most()
                time.sleep(LOOK_SECONDS / 10)
            assert process.stdout is not None
            out = process.stdout.read()
        assert process.returncode == 0, out
        self.memory.append(memory.last)
        return str(json.loads(out.splitlines()[-1])["id"])


def submission(
    stand: BenchServers,
    site: BenchFarm,
    path: Path,
    prompts: int,
    api: tuple[str, str],
    short: bool,
) -> Row:
    """Submit distinct prompts by the command line, and by COPY."""
    row = Row(
        "g",
        "A million prompts from a file",
        f"{prompts:,} distinct prompts of about 100 characters, one line of JSON each, by `farm "
        "submit --from`. The time is until the job is accepted, with the command's own start. "
        "Compared with one row per frame, by COPY into the same Postgres. The row has id, job, "
        "ordinal, state, priority, prompts, seed, parameters and time; it is indexed by id, and "
        "by job and state.",
    )
    url, key = api
    env = {**site.env, "FARM_API_URL": url, "FARM_API_KEY": key}
    command = Command(commands.environment(stand.folder, env))
    site.connection.execute(CREATE)
    turns = iter(range(10))

    def submit() -> float:
        started = time.monotonic()
        job_id = command.submit(_another(path, next(turns)), "bench")
        seconds = time.monotonic() - started
        assert site.rows("SELECT total FROM jobs WHERE id = %s", job_id) == [(prompts,)]
        site.connection.execute("UPDATE jobs SET open = false WHERE id = %s", (job_id,))
        return prompts / seconds

    def copy() -> float:
        job, started = uuid.uuid4(), time.monotonic()
        with (
            site.connection.cursor() as cursor,
            cursor.copy(COPY) as copied,
            path.open() as file,
        ):
            for ordinal, line in enumerate(file):
                prompt = json.loads(line)["prompt"]
                row_id = uuid.uuid4()
                copied.write_row((row_id, job, ordinal, "waiting", 2, prompt, "", ordinal, PARAMS))
        return prompts / (time.monotonic() - started)

    row.series = in_turn({"farm submit": submit, "COPY": copy}, 1 if short else 3, "prompts/s")
    row.add_ratio("farm submit", "COPY", least=None if short else LEAST)
    most = max(command.memory)
    row.series.append(Series("the command's memory", command.memory, "MB"))
    if most > MAX_MEMORY:
        row.problems.append(f"the command took {most:.0f} MB")
    return row


def _another(path: Path, number: int) -> Path:
    """Write the same file with another first line: equal lines would be the same input."""
    other = path.with_name(f"prompts-{number}.jsonl")
    with path.open() as source, other.open("w") as target:
        next(source)
        target.write(json.dumps({"prompt": f"the first of {number}"}) + "\n")
        for line in source:
            target.write(line)
    return other


@contextmanager
def memory_of(url: str) -> Iterator[Memory]:
    """Measure the peak memory of the API at an address during the block."""
    port = url.rpartition(":")[2]
    found = [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if (words := _words(path))[-2:] == ["--port", port] and "api" in words
    ]
    memory = Memory(found[0] if found else 0)
    yield memory
    memory.most()


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().strip("\0").split("\0")
    except OSError:
        return []


@dataclass
class Looks:
    """Call times of a client that watches a job, in ms."""

    url: str
    key: str
    job_id: str
    page: list[float] = field(default_factory=list)
    job: list[float] = field(default_factory=list)
    frames: list[float] = field(default_factory=list)
    """Durations in ms, as in the two fields above."""
    _over: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def watching(self) -> Iterator[None]:
        thread = threading.Thread(target=self._look)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def _look(self) -> None:
        at = f"/v1/jobs/{self.job_id}"
        name = f"farm_key_{self.url.rpartition(':')[2]}"
        headers = {"Authorization": f"Bearer {self.key}", "Cookie": f"{name}={self.key}"}
        with httpx.Client(base_url=self.url, headers=headers, timeout=30) as client:
            while not self._over.wait(LOOK_SECONDS):
                for path, times in (
                    ("/", self.page),
                    (at, self.job),
                    (f"{at}/frames?state=succeeded&limit=50", self.frames),
                ):
                    started = time.monotonic()
                    assert client.get(path).status_code == 200
                    times.append((time.monotonic() - started) * 1000)


def run(stand: BenchServers, path: Path, prompts: int, short: bool) -> Row:
    """Render all frames of the job. The pictures of the last ones are stored."""
    stored = SHORT_STORED if short else STORED
    most = prompts - stored - (0 if short else STOPPING)
    row = Row(
        "g2",
        "A million frames to the end",
        f"The same prompts as null renders, with a worker for every core. A client reads the page, "
        f"the job and its frames twice a second. The pictures of all but the last {stored:,} are "
        "discarded. Claims are timed by their events. Compared are the first and the last tenth "
        "of the frames that were done before the workers that discard began to stop.",
    )
    with ExitStack() as stack:
        site = stack.enter_context(stand.site(discard_images=True))
        url, key = stack.enter_context(site.api())
        env = {**site.env, "FARM_API_URL": url, "FARM_API_KEY": key}
        job_id = Command(commands.environment(stand.folder, env)).submit(path, "run")
        before = site.rows(SIZES)[0][0]
        looks = Looks(url, key, job_id)
        stack.enter_context(looks.watching())
        started = time.monotonic()
        with ExitStack() as workers:
            for _ in range(cores()):
                workers.enter_context(site.worker_at_work("null"))
            wait_closely(lambda: _done(site, job_id) >= most, "most are done")
            _judge_claims(row, site, job_id, most, short)
        discarded = _done(site, job_id)
        if not short and discarded > prompts - stored:
            row.problems.append(f"only {prompts - discarded:,} frames were left to store")
        row.series.append(
            Series("discarded", [discarded / (time.monotonic() - started)], "frames/s")
        )
        again = time.monotonic()
        for _ in range(cores()):
            stack.enter_context(site.worker_at_work("null", FARM_DISCARD_IMAGES="false"))
        wait_closely(lambda: _done(site, job_id) == prompts, "all are done")
        if discarded < prompts:  # a short run may end before it is observed
            rate = (prompts - discarded) / (time.monotonic() - again)
            row.series.append(Series("stored", [rate], "frames/s"))
        bytes_per_frame = (site.rows(SIZES)[0][0] - before) / prompts
        row.series.append(Series("Postgres", [bytes_per_frame], "bytes/frame"))
        for name in ("page", "job", "frames"):
            times = getattr(looks, name)
            row.series.append(Series(f"p99 of a call: {name}", [percentile(times, 99)], "ms"))
            if not short and percentile(times, 99) > MAX_CALL_MS:
                row.problems.append(f"{name}: p99 {percentile(times, 99):.0f} ms")
        _audit(row, stand, site, discarded)
    return row


def _done(site: BenchFarm, job_id: str) -> int:
    time.sleep(0.05)
    return int(site.rows("SELECT succeeded FROM jobs WHERE id = %s", job_id)[0][0])


CLAIMS = """
SELECT extract(epoch FROM max(at) - min(at))::float / (count(*) - 1)
FROM events WHERE job_id = %s AND kind = 'frames.claimed'
  AND (data -> 'frames' -> 0 ->> 0)::bigint BETWEEN %s AND %s
"""


def _judge_claims(row: Row, site: BenchFarm, job_id: str, frames: int, short: bool) -> None:
    """Compare the first and the last tenth, before workers stop and release their frames."""
    share = frames // (2 if short else 10)
    for name, first in (("claims at first", 0), ("claims at last", frames - share)):
        seconds = site.rows(CLAIMS, job_id, first, first + share)[0][0]
        row.series.append(Series(name, [1 / seconds], "claims/s"))
    row.add_ratio("claims at last", "claims at first", least=None if short else MIN_CLAIM)


def _audit(row: Row, stand: BenchServers, site: BenchFarm, discarded: int) -> None:
    env = commands.environment(stand.folder, site.env)
    done = subprocess.run(
        commands.farm("audit", "--json", "--no-artifacts"),
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    told: Any = done.stdout.strip().splitlines()[-1:] or done.stderr
    line = f"`farm audit --no-artifacts`: exit {done.returncode}"
    (row.problems if done.returncode else row.notes).append(
        f"{line}; {discarded:,} frames were discarded" + (f": {told}" if done.returncode else "")
    )
