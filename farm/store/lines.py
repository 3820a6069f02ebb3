"""Prompts of frames: each is a prompt of the frame's job, or a line of the job's input."""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import suppress

from cachetools import LRUCache
from sqlalchemy import Connection, text

from farm.domain.inputs import LINES_PER_PART, StoredInput, StoredLines, unpack
from farm.domain.spec import FullSpec, Line
from farm.store import arrays
from farm.store.inputs import read_parts

Parts = MutableMapping[tuple[uuid.UUID, int], StoredLines]
"""Cache of parts of inputs, by input and index of the part's first line."""


def part_cache(most_bytes: int) -> Parts:
    """Return a cache of parts that takes at most this memory. A job with groups reads many."""
    cache: LRUCache[tuple[uuid.UUID, int], StoredLines] = LRUCache(
        most_bytes, getsizeof=lambda part: part.size
    )
    return cache


PROMPTS = text("""
SELECT w.job_id, w.place, c.prompts[w.place - c.first + 1] AS prompt
FROM unnest(CAST(:job_ids AS uuid[]), CAST(:places AS bigint[])) AS w (job_id, place)
CROSS JOIN LATERAL (
    SELECT first, prompts FROM job_prompts c
    WHERE c.job_id = w.job_id AND c.first <= w.place ORDER BY c.first DESC LIMIT 1
) c
""")


def lines_of(
    connection: Connection,
    jobs: Mapping[uuid.UUID, FullSpec],
    frames: Iterable[tuple[uuid.UUID, int]],
    known: Parts | None = None,
) -> dict[tuple[uuid.UUID, int], Line]:
    """Read the lines that some frames use.

    Args:
        connection: a connection to the frames' database.
        jobs: the frames' jobs.
        frames: (job, ordinal) of each frame.
        known: a cache of input parts, to which new parts are added.

    Returns:
        The lines, by job and `prompt_index` of the ordinal.
    """
    own: list[tuple[uuid.UUID, int]] = []
    named: defaultdict[tuple[uuid.UUID, int], list[tuple[uuid.UUID, int]]] = defaultdict(list)
    for job_id, ordinal in frames:
        place = jobs[job_id].prompt_index(ordinal)
        input_id = jobs[job_id].input
        if input_id is None:
            own.append((job_id, place))
        else:
            named[input_id, place - place % LINES_PER_PART].append((job_id, place))
    found = _prompts(connection, own) if own else {}
    if named:
        parts = _parts(connection, [*named], {} if known is None else known)
        for (input_id, first), places in named.items():
            lines = parts[input_id, first]
            found.update({place: lines[place[1] - first] for place in places})
    return found


def all_lines(connection: Connection, stored_input: StoredInput) -> Iterator[tuple[int, Line]]:
    """Read a whole input, part by part. Yield each line with its index."""
    for first in range(0, stored_input.lines, LINES_PER_PART):
        [part] = read_parts(connection, [(stored_input.id, first)]).values()
        yield from enumerate(unpack(part), first)


def _prompts(
    connection: Connection, wanted: Iterable[tuple[uuid.UUID, int]]
) -> dict[tuple[uuid.UUID, int], Line]:
    places = sorted(set(wanted))
    values = {
        "job_ids": arrays.ids(job_id for job_id, _ in places),
        "places": arrays.numbers(place for _, place in places),
    }
    rows = connection.execute(PROMPTS, values)
    return {(row.job_id, row.place): Line(row.prompt) for row in rows}


def _parts(
    connection: Connection, wanted: list[tuple[uuid.UUID, int]], known: Parts
) -> dict[tuple[uuid.UUID, int], StoredLines]:
    here = {part: lines for part in wanted if (lines := known.get(part)) is not None}
    missing = [part for part in wanted if part not in here]
    if missing:
        for part, content in read_parts(connection, missing).items():
            here[part] = StoredLines(content)
            with suppress(ValueError):  # one part is larger than the cache
                known[part] = here[part]
    return here
