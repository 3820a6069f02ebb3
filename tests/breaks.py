"""`python -m tests.breaks`: breaks the code in one place at a time, and looks which test sees it.

The places are drawn with a seed from lines that tests cover, five in each area. A quicker suite
still does its work where it sees what the slower one saw. So list the places once, then break
these very ones in either tree, each with the coverage that `pytest --cov-context=test` measured:

    python -m tests.breaks --tree OLD --data OLD.coverage --list --json places.json
    python -m tests.breaks --tree OLD --data OLD.coverage --from places.json --json old.json
    python -m tests.breaks --tree NEW --data NEW.coverage --from places.json --json new.json

A tree is copied first, and never changed itself.
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
MOST_TESTS = 150
"""Of those that cover a line"""
PYTEST = [sys.executable, "-u", "-m", "pytest", "-p", "no:cacheprovider", "-q"]
LEFT_OUT = shutil.ignore_patterns(
    ".venv", ".git", ".cache", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info", "farm-data"
)
CHILDREN = ("tests/acceptance/", "tests/integration/test_child.py")
"""The tests of what only child processes execute: coverage does not tell for which test"""

ENDING = (
    "complete|finish|already_complete|fail|end_attempts"
    "|_(results|reuse|lock|shrink|ending|redraw|columns|fences)"
)
AREAS: Mapping[str, Mapping[str, str]] = {
    "claiming": {
        "farm/store/claim.py": "",
        "farm/store/sql/claim.sql": "",
        "workers/claims.py": "",
    },
    "completing": {
        "farm/store/frames.py": ENDING,
        "farm/store/sql/complete.sql": "",
        "farm/store/sql/tally.sql": "",
        "farm/store/tally.py": "",
        "workers/ending.py": "",
    },
    "tail": {"workers/tail.py": "", "workers/spool.py": ""},
    "refusals": {
        "api/errors.py": "",
        "api/body.py": "",
        "api/auth.py": "",
        "api/jobs.py": "submit|list_jobs|job_page|_storable",
        "api/inputs.py": "upload|list_inputs|_read|_blocks|_next",
        "farm/submission.py": "",
    },
    "families": {"farm/families/*.py": ""},
    "exports": {"farm/exports.py": "", "farm/datasets/*.py": "", "farm/store/exports.py": ""},
}
"""Area: its files, and of each the functions that belong there, where not all do"""
UNSEEN = {"__repr__", "__str__", "_tell_dropped"}
"""Functions that only word what a log says"""

CLAIM = ("farm/store/claim.py", "rows = connection.execute(")
COMPLETE = ("farm/store/frames.py", "connection.execute(text(COMPLETE)")
FINISH = ("farm/store/frames.py", "connection.execute(FINISH")
TALLY = ("farm/store/tally.py", "        TALLY,")
CALLERS: Mapping[str, Sequence[tuple[str, str]]] = {
    "leader": [CLAIM, ("farm/store/leases.py", "execute(TOUCH")],
    "complete": [COMPLETE, FINISH],
    "remember": [("farm/store/frames.py", '"digests": arrays')],
    "added": [TALLY],
    "tally": [TALLY, CLAIM, COMPLETE, FINISH],
}
"""A function in SQL: the lines in Python that run it; CLAIM for any other"""

SWAPS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "and": "or"}
SWAPS |= {"or": "and", "in": "not in", "not in": "in", "is": "is not", "is not": "is"}
SQL_SWAPS = [
    (r"(?<= )=(?= )", "<>"),
    (r"(?<= )<(?= )", "<="),
    (r"(?<= )>(?= )", ">="),
    (r"\bAND\b(?! \d+ PRECEDING)", "OR"),
    (r"\+ 1\b", "+ 2"),
    (r"\bNOT ", ""),
    (r"\b(?i:least)(?=\()", "greatest"),
]
CONDITION = re.compile(r"\b(WHERE|AND|OR|ON|IF|WHEN)\b")
"""One stands before a `=` that compares; any other assigns"""

Break = tuple[int, str, str]
"""Where in a text, what stands there, and what comes in its place"""


@dataclass(frozen=True)
class Place:
    """Where the code is broken, and how."""

    area: str
    file: str
    function: str
    line: int
    column: int
    text: str
    """The whole line"""
    old: str
    new: str
    lines: tuple[int, ...] = ()
    """What is executed when it is, and last the line where its statement begins; none in SQL"""

    @property
    def what(self) -> str:
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        return f"{old[:70]} -> {new[:70] or 'nothing'}"

    def within(self, text: str) -> Place | None:
        """Where it lies in a text that may have moved; None where it is not to be found."""
        lines = text.split("\n")
        found = [number for number, line in enumerate(lines, 1) if line == self.text]
        if self.line not in found and len(found) != 1:
            return None
        moved = 0 if self.line in found else found[0] - self.line
        there = replace(
            self, line=self.line + moved, lines=tuple(line + moved for line in self.lines)
        )
        return there if text.startswith(self.old, there.start(text)) else None

    def start(self, text: str) -> int:
        return sum(len(line) + 1 for line in text.split("\n")[: self.line - 1]) + self.column


class Source:
    """A file's text, and the places in it where it can be broken."""

    def __init__(self, area: str, root: Path, path: Path, names: str) -> None:
        self._area = area
        self._file = path.relative_to(root).as_posix()
        self._names = names
        self._text = path.read_text()
        self._lines = self._text.split("\n")

    def places(self) -> Iterator[Place]:
        return self._in_sql() if self._file.endswith(".sql") else self._in_python()

    def _in_sql(self) -> Iterator[Place]:
        function, head, start = "", False, 0
        for line in self._lines:
            if begun := re.match(r"CREATE FUNCTION pg_temp\.(\w+)", line):
                function, head = begun[1], True
            code = "" if head else line.partition("--")[0]
            head = head and "$$" not in line
            for pattern, new in SQL_SWAPS:
                for match in re.finditer(pattern, code):
                    if match[0] != "=" or CONDITION.search(code[: match.start()]):
                        yield self._place(function, (start + match.start(), match[0], new))
            start += len(line) + 1

    def _in_python(self) -> Iterator[Place]:
        for function in functions(ast.parse(self._text)):
            if function.name in UNSEEN or not re.fullmatch(self._names or ".*", function.name):
                continue
            for node, statement in executed(function):
                lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
                for at in self._breaks(node):
                    yield self._place(function.name, at, (*lines, statement.lineno))

    def _breaks(self, node: ast.stmt | ast.expr) -> Iterator[Break]:
        match node:
            case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
                start, old = self._segment(test)
                yield start, old, f"not ({old})"
            case ast.Compare(left=left, comparators=others):
                yield from self._swaps([left, *others])
            case ast.BoolOp(values=values):
                yield from self._swaps(values)
            case ast.Expr(value=ast.Call() | ast.Await(value=ast.Call())):
                start, old = self._segment(node)
                yield start, old, "pass" + "\n" * old.count("\n")
            case ast.Return(value=ast.expr() as value) if not is_nothing(value):
                start, old = self._segment(node)
                yield start, old, "return None" + "\n" * old.count("\n")
            case ast.Constant(value=int() as value) if not isinstance(value, bool):
                start, old = self._segment(node)
                yield start, old, str(value + 1)

    def _swaps(self, parts: Sequence[ast.expr]) -> Iterator[Break]:
        for left, right in pairwise(parts):
            start, text = self._segment(left)
            between = self._text[start + len(text) : self._segment(right)[0]]
            if (old := between.strip(" ()\n")) in SWAPS:
                yield start + len(text) + between.index(old), old, SWAPS[old]

    def _segment(self, node: ast.stmt | ast.expr) -> tuple[int, str]:
        text = ast.get_source_segment(self._text, node) or ""
        before = self._lines[node.lineno - 1].encode()[: node.col_offset].decode()
        return sum(len(line) + 1 for line in self._lines[: node.lineno - 1]) + len(before), text

    def _place(self, function: str, at: Break, lines: tuple[int, ...] = ()) -> Place:
        start, old, new = at
        line, column = self._text.count("\n", 0, start), start - self._text.rfind("\n", 0, start)
        return Place(
            self._area,
            self._file,
            function,
            line + 1,
            column - 1,
            self._lines[line],
            old,
            new,
            lines,
        )


def functions(module: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """A module's functions and methods."""
    for node in module.body:
        for each in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef):
                yield each


def executed(
    function: ast.FunctionDef | ast.AsyncFunctionDef,
) -> Iterator[tuple[ast.stmt | ast.expr, ast.stmt]]:
    """What of a function does something, each with its statement: no types, logs or messages."""
    todo: list[tuple[ast.AST, ast.stmt]] = [(statement, statement) for statement in function.body]
    for node, statement in todo:
        if isinstance(node, ast.stmt | ast.expr) and is_told(node):
            continue
        if isinstance(node, ast.stmt | ast.expr):
            yield node, statement
        below: Sequence[ast.AST | None] = [*ast.iter_child_nodes(node)]
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            below = node.body
        elif isinstance(node, ast.AnnAssign):
            below = [node.value]
        todo += [
            (each, each if isinstance(each, ast.stmt) else statement) for each in below if each
        ]


def is_told(node: ast.stmt | ast.expr) -> bool:
    """Whether a node only says something, to a person or to mypy."""
    match node:
        case ast.Raise() | ast.Assert() | ast.JoinedStr() | ast.Import() | ast.ImportFrom():
            return True
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id="log" | "warnings")))):
            return True
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return True
        case ast.If(body=body, orelse=[]):
            return all(is_told(each) and not isinstance(each, ast.Raise) for each in body)
    return False


def is_nothing(value: ast.expr) -> bool:
    """Whether whoever asks cannot tell a value from None."""
    return isinstance(value, ast.Constant) and not value.value


class Seen:
    """Which tests execute a line, by coverage.py's data."""

    def __init__(self, data: Path, root: Path) -> None:
        self._data = CoverageData(str(data))
        self._data.read()
        self._root = root
        self._files: dict[str, Mapping[int, list[str]]] = {}

    def tests(self, place: Place, tree: Path) -> set[str]:
        """The tests that execute a place; an empty name stands for child processes."""
        if place.lines:
            own = self._at(place.file, place.lines[:-1])
            return own or self._at(place.file, place.lines[-1:])
        callers = CALLERS.get(place.function, [CLAIM])
        return {name for caller in callers for name in self._callers(tree, *caller)}

    def _callers(self, tree: Path, file: str, text: str) -> set[str]:
        lines = (tree / file).read_text().split("\n")
        return self._at(file, [number for number, line in enumerate(lines, 1) if text in line])

    def _at(self, file: str, lines: Sequence[int]) -> set[str]:
        if file not in self._files:
            self._files[file] = self._data.contexts_by_lineno(str(self._root / file))
        contexts = self._files[file]
        return {name.rpartition("|")[0] for line in lines for name in contexts.get(line, [])}


def drawn(sources: Path, seen: Seen, seed: int) -> list[Place]:
    """Five places in each area, no two of them in one function."""
    chosen: list[Place] = []
    for area, files in AREAS.items():
        found = [
            place
            for pattern, names in files.items()
            for path in sorted(sources.glob(pattern))
            for place in Source(area, sources, path, names).places()
            if seen.tests(place, sources)
        ]
        Random(f"{seed} {area}").shuffle(found)
        by_function = {(place.file, place.function): place for place in reversed(found)}
        chosen += [place for place in found if place in by_function.values()][:AN_AREA]
    return chosen


class Trial:
    """A copy of a tree, in which one place after another is broken and its tests are run."""

    def __init__(self, copy: Path, seen: Seen, options: argparse.Namespace) -> None:
        self._copy = copy
        self._seen = seen
        self._seed: int = options.seed
        self._seconds: float = options.seconds
        self._confirm: bool = options.confirm
        told = [json.loads(line) for line in options.durations.open()] if options.durations else []
        self._walls: dict[str, float] = {
            each["id"]: each["wall"] for each in told if "wall" in each
        }
        failed = {each["id"] for each in told if each.get("outcome") == "failed"}
        ran = self._run("--collect-only", "-q")[1].splitlines()
        # What failed with nothing broken shows nothing.
        self._known = [name for name in ran if name not in failed and name in (self._walls or ran)]

    def tests(self, place: Place) -> list[str]:
        """The tests to run for a place: quick files first, and in each the quick tests."""
        names = self._seen.tests(place, self._copy)
        found = [name for name in self._known if name in names]
        if names == {""}:
            found = [name for name in self._known if name.startswith(CHILDREN)]
        files = {file_of(name) for name in names}
        found = found or [name for name in self._known if file_of(name) in files]
        Random(f"{self._seed} {place.file} {place.text}").shuffle(found)
        one = {file_of(name): name for name in found}
        rest = [name for name in found if name not in one.values()]
        chosen = [*one.values(), *rest][: max(MOST_TESTS, len(one))]
        # A file's tests stay together: what they share is made once.
        walls: dict[str, list[float]] = {}
        for name in chosen:
            walls.setdefault(file_of(name), []).append(self._walls.get(name, 1.0))
        means = {file: (fmean(those), file) for file, those in walls.items()}
        return sorted(chosen, key=lambda name: (means[file_of(name)], self._walls.get(name, 1.0)))

    def row(self, place: Place) -> dict[str, str | int | float | None]:
        """Break a place, and tell which test sees it."""
        there = place.within((self._copy / place.file).read_text())
        tests = self.tests(there) if there else []
        started, caught = time.monotonic(), None if there else "not in this tree"
        if there and tests:
            with self._broken(there):
                caught = catcher(*self._run("-x", "--timeout", "300", *tests), tests)
        seconds = round(time.monotonic() - started, 1)
        if self._confirm and caught in tests and self._run("-x", str(caught))[0]:
            caught = f"{caught}, which fails unbroken too"
        return {
            "area": place.area,
            "file": place.file,
            "line": (there or place).line,
            "what": place.what,
            "caught_by": caught,
            "seconds": seconds,
            "tests": len(tests),
        }

    @contextmanager
    def _broken(self, place: Place) -> Iterator[None]:
        path = self._copy / place.file
        compiled = Path(importlib.util.cache_from_source(path))
        text = path.read_text()
        start = place.start(text)
        try:
            path.write_text(text[:start] + place.new + text[start + len(place.old) :])
            compiled.unlink(missing_ok=True)  # the time of a change is told in whole seconds there
            yield
        finally:
            path.write_text(text)
            compiled.unlink(missing_ok=True)
            shutil.rmtree(self._copy / ".hypothesis", ignore_errors=True)  # its failed examples

    def _run(self, *words: str) -> tuple[int | None, str]:
        """Run pytest; gives its exit code, None where it took too long, and what it said."""
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
            try:
                code: int | None = process.wait(self._seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # and what a test left behind
                process.wait()
            output.seek(0)
            return code, output.read()


def catcher(code: int | None, output: str, tests: Sequence[str]) -> str | None:
    """The test that failed, or what else became of a run; None where all passed."""
    for told in re.findall(r"^(?:FAILED|ERROR) (tests/.*)$", output, re.MULTILINE):
        named = [name for name in tests if f"{told} - ".startswith(f"{name} - ")]
        if named:
            return max(named, key=len)
    if code is None:
        return "timeout"
    return {0: None, 1: "a test", 2: "collection", 4: "collection"}.get(code, f"exit code {code}")


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
            echo(f"| {place.file}:{place.line} | {place.area} | {place.what} | {place.function} |")
            keep(options.json, asdict(place))
        return 0
    with tempfile.TemporaryDirectory(prefix="farm-breaks-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)  # Postgres runs as another user where this is root
        copy = Path(shutil.copytree(tree, Path(folder) / "tree", ignore=LEFT_OUT))
        trial = Trial(copy, seen, options)
        echo("| place | area | broken | caught by | seconds |\n| --- | --- | --- | --- | --- |")
        for place in places:
            row = trial.row(place)
            caught = row["caught_by"] or "not caught"
            where = f"{row['file']}:{row['line']}"
            echo(f"| {where} | {row['area']} | `{row['what']}` | {caught} | {row['seconds']} |")
            keep(options.json, row)
    return 0


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
    parser.add_argument("--tree", type=Path, default=Path(), help="whose tests are run")
    parser.add_argument("--sources", type=Path, help="the tree to draw from, where it is another")
    parser.add_argument("--data", type=Path, required=True, help="coverage.py's, with contexts")
    parser.add_argument("--recorded-in", type=Path, help="the tree that the data names, if another")
    parser.add_argument("--durations", type=Path, help="a line of JSON a test: its id and wall")
    parser.add_argument("--from", type=Path, dest="known", help="places that --list wrote")
    parser.add_argument("--seed", type=int, default=15, help="what draws the places and tests")
    parser.add_argument("--places", type=span, default=slice(None), help="such as 3 or 1-15")
    parser.add_argument("--seconds", type=float, default=600.0, help="a place may take")
    parser.add_argument("--confirm", action="store_true", help="run what failed again, unbroken")
    parser.add_argument("--list", action="store_true", help="show the places, and break nothing")
    parser.add_argument("--json", type=Path, help="a file to append an object a place to")
    return parser.parse_args()


def span(text: str) -> slice:
    first, _, last = text.partition("-")
    return slice(int(first) - 1, int(last or first))


if __name__ == "__main__":
    sys.exit(main())
