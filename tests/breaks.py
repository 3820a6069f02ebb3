"""`python -m tests.breaks`: breaks the code in one place at a time, and finds the test that fails.

A seed chooses the places from lines that tests cover, five in each area. A quicker suite is still
good if it finds the breaks that the slower one found. So list the places once, then break the same
places in both trees. Each tree needs the coverage that `pytest --cov-context=test` measured:

    python -m tests.breaks --tree OLD --data OLD.coverage --list --json places.jsonl
    python -m tests.breaks --tree OLD --data OLD.coverage --from places.jsonl --json old.jsonl
    python -m tests.breaks --tree NEW --data NEW.coverage --from places.jsonl --json new.jsonl

Only a copy of the tree is broken. tests/breaks.jsonl holds the thirty places of seed 15, chosen
by the coverage of commit 4e47772, at the paths where their code stands now. Two of them have gone:
place 15 is the same question in spool.py, and place 27 is the check of destinations, which replaced
that of buckets.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import fmean

from coverage import CoverageData
from typer import echo

AN_AREA = 5
MAX_TESTS = 150
"""Maximum number of tests to run for a line."""
CHILDREN = ("tests/acceptance/", "tests/integration/test_child.py")
"""Tests of code that only child processes execute. Coverage does not record their test."""
PYTEST = [sys.executable, "-u", "-m", "pytest", "-p", "no:cacheprovider", "-q"]
LEFT_OUT = shutil.ignore_patterns(
    ".venv", ".git", ".cache", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info", "farm-data"
)

AREAS = {
    "claiming": "farm/store/claim.py farm/store/sql/claim.sql workers/render/claims.py",
    "completing": "farm/store/frames.py farm/store/sql/complete.sql farm/store/sql/tally.sql "
    "farm/store/tally.py workers/render/committing.py",
    "tail": "workers/render/finishing.py workers/render/spool.py workers/render/batch.py",
    "refusals": "api/errors.py api/request_body.py api/auth.py api/routes/jobs.py "
    "api/routes/inputs.py farm/services/job_validation.py",
    "families": "farm/pipelines/families/*.py",
    "exports": "farm/services/exports/service.py farm/services/exports/*.py farm/store/exports.py",
}
ALONE = {
    "farm/store/frames.py": "complete|complete_batches|already_complete|fail|end_attempts"
    "|_(results|reuse|lock|shrink|ending|reroll|columns|fences)",
    "api/routes/jobs.py": "submit|list_jobs|job_page|_storable",
    "api/routes/inputs.py": "upload|list_inputs|_read|_blocks|_next",
}
"""Functions, as a pattern, of files of which only a part belongs to their area."""
WORDING = {"__repr__", "__str__", "_tell_dropped"}
"""Functions that only build the text of a log message."""

CLAIM = ("farm/store/claim.py", "rows = connection.execute(")
COMPLETE = ("farm/store/frames.py", "connection.execute(text(COMPLETE)")
FINISH = ("farm/store/frames.py", "connection.execute(FINISH")
TALLY = ("farm/store/tally.py", "        TALLY,")
CALLERS: Mapping[str, Sequence[tuple[str, str]]] = {
    "leader": [CLAIM, ("farm/store/leases.py", "execute(REPORT_STEP")],
    "complete": [COMPLETE, FINISH],
    "remember": [("farm/store/frames.py", '"digests": arrays')],
    "added": [TALLY],
    "tally": [TALLY, CLAIM, COMPLETE, FINISH],
}
"""Python lines that run a function in SQL. Default: CLAIM."""

SWAPS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "and": "or"}
SWAPS |= {"or": "and", "in": "not in", "not in": "in", "is": "is not", "is not": "is"}
SQL_SWAPS = {
    r"(?<= )=(?= )": "<>",
    r"(?<= )<(?= )": "<=",
    r"(?<= )>(?= )": ">=",
    r"\bAND\b(?! \d+ PRECEDING)": "OR",
    r"\+ 1\b": "+ 2",
    r"\bNOT ": "",
    r"\b(?i:least)(?=\()": "greatest",
}
COMPARES = re.compile(r"\b(WHERE|AND|OR|ON|IF|WHEN)\b")
"""Keywords before an `=` that compares and does not assign."""

Function = ast.FunctionDef | ast.AsyncFunctionDef
Node = ast.stmt | ast.expr
Break = tuple[int, str, str]
"""Offset in a text, the old text there, and its replacement."""


@dataclass(frozen=True)
class Place:
    """A place in the code, and the change that breaks it."""

    area: str
    file: str
    function: str
    line: int
    column: int
    text: str
    """The whole line."""
    old: str
    new: str
    lines: Sequence[int] = ()
    """Line numbers of the broken part, then the first line of its statement. Empty in SQL."""

    @property
    def what(self) -> str:
        old, new = (" ".join(text.split())[:60] for text in (self.old, self.new))
        line = f" in {self.text.strip()[:70]}" if "\n" not in self.old and len(old) < 9 else ""
        return f"{old} -> {new or 'nothing'}{line}"

    def start(self, text: str) -> int:
        return sum(len(line) + 1 for line in text.split("\n")[: self.line - 1]) + self.column

    def within(self, text: str) -> Place | None:
        """Find the place in a text that may have moved. Return None if it is not found."""
        found = [at for at, line in enumerate(text.split("\n"), 1) if line == self.text]
        if self.line not in found and len(found) != 1:
            return None
        moved = 0 if self.line in found else found[0] - self.line
        lines = [line + moved for line in self.lines]
        there = replace(self, line=self.line + moved, lines=lines)
        return there if text.startswith(self.old, there.start(text)) else None


def places_in(area: str, file: str, text: str) -> Iterator[Place]:
    """List every place where a file can be broken."""
    found = sql_breaks(text) if file.endswith(".sql") else python_breaks(file, text)
    for function, (start, old, new), lines in found:
        line, column = text.count("\n", 0, start), start - text.rfind("\n", 0, start) - 1
        whole = text.split("\n")[line]
        yield Place(area, file, function, line + 1, column, whole, old, new, lines)


def sql_breaks(text: str) -> Iterator[tuple[str, Break, list[int]]]:
    function, heading, start = "", False, 0
    for line in text.split("\n"):
        if begun := re.match(r"CREATE FUNCTION pg_temp\.(\w+)", line):
            function, heading = begun[1], True
        code = "" if heading else line.partition("--")[0]
        heading = heading and "$$" not in line
        for pattern, new in SQL_SWAPS.items():
            for match in re.finditer(pattern, code):
                if match[0] != "=" or COMPARES.search(code[: match.start()]):
                    yield function, (start + match.start(), match[0], new), []
        start += len(line) + 1


def python_breaks(file: str, text: str) -> Iterator[tuple[str, Break, list[int]]]:
    top = ast.parse(text).body
    methods = [each for node in top if isinstance(node, ast.ClassDef) for each in node.body]
    for function in (*top, *methods):
        if not isinstance(function, Function) or function.name in WORDING:
            continue
        if any(
            ast.unparse(each).startswith(("cache", "lru_cache")) for each in function.decorator_list
        ):
            continue  # runs once a process, so coverage records only one test
        if re.fullmatch(ALONE.get(file, ".*"), function.name):
            for node, statement in executed(function):
                lines = [*range(node.lineno, (node.end_lineno or 0) + 1), statement.lineno]
                for at in node_breaks(node, text):
                    yield function.name, at, lines


def node_breaks(node: Node, text: str) -> Iterator[Break]:
    match node:
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
            start, old = segment(test, text)
            yield start, old, f"not ({old})"
        case ast.Compare(left=left, comparators=others):
            yield from swaps([left, *others], text)
        case ast.BoolOp(values=values):
            yield from swaps(values, text)
        case ast.Expr(value=ast.Call() | ast.Await(value=ast.Call())):
            yield gone(node, text, "pass")
        # Callers rarely distinguish False from None.
        case ast.Return(value=value) if value and getattr(value, "value", True):
            yield gone(node, text, "return None")
        case ast.Constant(value=int(number)) if not isinstance(number, bool):
            yield gone(node, text, str(number + 1))


def gone(node: Node, text: str, new: str) -> Break:
    """Replace a node by another text with the same number of lines."""
    start, old = segment(node, text)
    return start, old, new + "\n" * old.count("\n")


def swaps(parts: Sequence[ast.expr], text: str) -> Iterator[Break]:
    for left, right in pairwise(parts):
        start, before = segment(left, text)
        between = text[start + len(before) : segment(right, text)[0]]
        if (old := between.strip(" ()\n")) in SWAPS:
            yield start + len(before) + between.index(old), old, SWAPS[old]


def segment(node: Node, text: str) -> tuple[int, str]:
    """Return a node's offset in a text, and its source."""
    lines = text.split("\n")[: node.lineno]
    before = lines.pop().encode()[: node.col_offset].decode()
    start = sum(len(line) + 1 for line in lines) + len(before)
    return start, ast.get_source_segment(text, node) or ""


def executed(function: Function) -> Iterator[tuple[Node, ast.stmt]]:
    """Yield the effective nodes of a function with their statements: no types, logs or messages."""
    todo: list[tuple[ast.AST, ast.stmt]] = [(each, each) for each in function.body]
    for node, statement in todo:
        if is_told(node):
            continue
        if isinstance(node, Node):
            yield node, statement
        below: Sequence[ast.AST | None] = [*ast.iter_child_nodes(node)]
        if isinstance(node, Function):
            below = node.body
        elif isinstance(node, ast.AnnAssign):
            below = [node.value]
        todo += [
            (each, each if isinstance(each, ast.stmt) else statement) for each in below if each
        ]


def is_told(node: ast.AST) -> bool:
    """Return True if a node is only a message to a person, or a hint for mypy."""
    match node:
        case ast.Raise() | ast.Assert() | ast.JoinedStr() | ast.Import() | ast.ImportFrom():
            return True
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id="log" | "warnings")))):
            return True
        case ast.If(body=body, orelse=[]):
            return all(is_told(each) and not isinstance(each, ast.Raise) for each in body)
    return False


class Seen:
    """The tests that execute a place, by coverage.py's data."""

    def __init__(self, data: Path, recorded_in: Path) -> None:
        self._data = CoverageData(str(data))
        self._data.read()
        self._root = recorded_in
        self._files: dict[str, Mapping[int, list[str]]] = {}

    def tests(self, place: Place, tree: Path) -> set[str]:
        """Return names of tests and files. An empty name means child processes."""
        if place.lines:
            own = self._at(place.file, place.lines[:-1])
            return own or self._at(place.file, place.lines[-1:])
        names = set[str]()
        for file, text in CALLERS.get(place.function, [CLAIM]):
            lines = (tree / file).read_text().split("\n")
            names |= self._at(file, [at for at, line in enumerate(lines, 1) if text in line])
        return names

    def _at(self, file: str, lines: Sequence[int]) -> set[str]:
        if file not in self._files:
            self._files[file] = self._data.contexts_by_lineno(str(self._root / file))
        contexts = {name for line in lines for name in self._files[file].get(line, ())}
        # Fixtures set up for a file's first test may serve its other tests.
        whole = {file_of(name) for name in contexts if name.endswith("|setup")}
        return whole | {name.rpartition("|")[0] for name in contexts}


def drawn(sources: Path, seen: Seen, seed: int) -> list[Place]:
    """Choose five places in each area, no two in the same function."""
    chosen: list[Place] = []
    for area, patterns in AREAS.items():
        paths = [path for each in patterns.split() for path in sorted(sources.glob(each))]
        found = [
            place
            for path in paths
            for place in places_in(area, path.relative_to(sources).as_posix(), path.read_text())
            if seen.tests(place, sources)
        ]
        Random(f"{seed} {area}").shuffle(found)
        one: dict[tuple[str, str], Place] = {}
        for place in found:
            one.setdefault((place.file, place.function), place)
        chosen += [*one.values()][:AN_AREA]
    return chosen


class Trial:
    """A copy of a tree. Breaks one place after another in it, and runs the place's tests."""

    def __init__(self, copy: Path, seen: Seen, options: argparse.Namespace) -> None:
        self._copy = copy
        self._seen = seen
        self._options = options
        told = [json.loads(line) for line in options.durations.open()] if options.durations else []
        self._walls: dict[str, float] = {
            each["id"]: each["wall"] for each in told if "wall" in each
        }
        failed = {each["id"] for each in told if each.get("outcome") == "failed"}
        code, output = self._run("--collect-only", seconds=300.0)
        if code != 0:
            raise SystemExit(f"--tree: {options.tree} has no tests:\n{output[-2000:]}")
        listed = [line for line in output.splitlines() if re.match(r"tests/\S+::", line)]
        # A test that fails with nothing broken proves nothing.
        self._known = [name for name in listed if name in (self._walls or listed)]
        self._known = [name for name in self._known if name not in failed]

    def tests(self, place: Place) -> list[str]:
        """List the tests to run for a place: quick files first, in each file quick tests first."""
        names = self._seen.tests(place, self._copy)
        found = [name for name in self._known if {name, file_of(name)} & names]
        if names == {""}:
            found = [name for name in self._known if name.startswith(CHILDREN)]
        files = {file_of(name) for name in names}
        found = found or [name for name in self._known if file_of(name) in files]
        Random(f"{self._options.seed} {place.file} {place.text}").shuffle(found)
        one = {file_of(name): name for name in found}
        rest = [name for name in found if name not in one.values()]
        chosen = [*one.values(), *rest[: max(0, MAX_TESTS - len(one))]]
        # A file's tests stay together, so that their shared fixtures are made once.
        walls: dict[str, list[float]] = {file: [] for file in one}
        for name in chosen:
            walls[file_of(name)].append(self._walls.get(name, 1.0))
        order = {file: (fmean(each), file) for file, each in walls.items()}
        return sorted(chosen, key=lambda name: (order[file_of(name)], self._walls.get(name, 1.0)))

    def row(self, place: Place) -> dict[str, object]:
        """Break a place, and return the test that fails."""
        there = place.within((self._copy / place.file).read_text())
        tests = self.tests(there) if there else []
        caught, seconds = None if there else "not in this tree", 0.0
        while there and tests:
            started = time.monotonic()
            with self._broken(there):
                caught = catcher(*self._run("-x", "--timeout", "300", *tests), tests)
            seconds = round(time.monotonic() - started, 1)
            if not self._options.confirm or caught not in tests or self._run(caught)[0] == 0:
                break
            tests.remove(caught)  # it fails with nothing broken
            caught = None
        row: dict[str, object] = {"area": place.area, "file": place.file}
        row |= {"line": (there or place).line, "what": place.what, "caught_by": caught}
        return row | {"seconds": seconds, "tests": len(tests)}

    @contextmanager
    def _broken(self, place: Place) -> Iterator[None]:
        path = self._copy / place.file
        text = path.read_text()
        start = place.start(text)
        try:
            self._write(path, text[:start] + place.new + text[start + len(place.old) :])
            yield
        finally:
            self._write(path, text)
            shutil.rmtree(self._copy / ".hypothesis", ignore_errors=True)  # its failed examples

    def _write(self, path: Path, text: str) -> None:
        path.write_text(text)
        # A .pyc file stores its source's time in whole seconds only.
        Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)

    def _run(self, *words: str, seconds: float | None = None) -> tuple[int | None, str]:
        """Run pytest. Return its exit code, or None on a timeout, and its output."""
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(
                [*PYTEST, *words],
                cwd=self._copy,
                env=os.environ | {"PYTHONPATH": str(self._copy)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            code = None
            try:
                with suppress(subprocess.TimeoutExpired):
                    code = process.wait(seconds or self._options.seconds)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            output.seek(0)
            return code, output.read()


def catcher(code: int | None, output: str, tests: Sequence[str]) -> str | None:
    """Return the test that failed, or another outcome of the run. None if all passed."""
    for line in re.findall(r"^(?:FAILED|ERROR) (tests/.*)$", output, re.MULTILINE):
        if named := [name for name in tests if f"{line} - ".startswith(f"{name} - ")]:
            return max(named, key=len)
    others = {None: "timeout", 0: None, 2: "collection", 4: "collection"}
    return others.get(code, f"exit code {code}")


def file_of(test: str) -> str:
    return test.partition("::")[0]


def main() -> int:
    options = parsed()
    tree: Path = options.tree.resolve()
    seen = Seen(options.data, options.recorded_in or tree)
    if options.known:
        places = [Place(**json.loads(line)) for line in options.known.open()]
    else:
        places = drawn((options.sources or tree).resolve(), seen, options.seed)
    places = places[options.places]
    if options.list:
        for place in places:
            tell([f"{place.file}:{place.line}", place.area, place.function, place.what])
            keep(options.json, asdict(place))
        return 0
    with tempfile.TemporaryDirectory(prefix="farm-breaks-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)  # if this user is root, Postgres runs as another user
        copy = Path(folder) / "tree"
        shutil.copytree(tree, copy, ignore=LEFT_OUT)
        trial = Trial(copy, seen, options)
        tell(["place", "area", "broken", "caught by", "seconds"])
        tell(["---"] * 5)
        for row in map(trial.row, places):
            caught = row["caught_by"] or "not caught"
            where = f"{row['file']}:{row['line']}"
            tell([where, row["area"], row["what"], caught, row["seconds"]])
            keep(options.json, row)
    return 0


def tell(cells: Sequence[object]) -> None:
    echo(f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |")


def keep(path: Path | None, content: Mapping[str, object]) -> None:
    if path is not None:
        with path.open("a") as file:
            file.write(json.dumps(content) + "\n")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.breaks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--tree", type=Path, default=Path(), help="tree whose tests are run")
    add("--sources", type=Path, help="tree of the places, if it is another one")
    add("--data", type=Path, required=True, help="data of coverage.py, with a context per test")
    add("--recorded-in", type=Path, help="tree that the data names, if it is another")
    add("--durations", type=Path, help="JSON lines with id and wall of the allowed tests")
    add("--from", type=Path, dest="known", help="file that --list --json wrote")
    add("--seed", type=int, default=15, help="seed that chooses places, and tests if too many")
    add("--places", type=span, default=slice(None), help="some places, for example 3 or 1-15")
    add("--seconds", type=float, default=600.0, help="maximum time of a place")
    add("--confirm", action="store_true", help="ignore tests that also fail with nothing broken")
    add("--list", action="store_true", help="only print the places")
    add("--json", type=Path, help="file to which a JSON line per place is appended")
    return parser.parse_args()


def span(text: str) -> slice:
    first, _, last = text.partition("-")
    return slice(int(first) - 1, int(last or first))


if __name__ == "__main__":
    sys.exit(main())
