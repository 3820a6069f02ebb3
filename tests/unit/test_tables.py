"""Random tables in three kinds of files: each frame has its row's values, and else the job's."""

from __future__ import annotations

import csv
import json
import tempfile
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from farm.cli.submission.prompt_file import Parameters, PromptFile
from farm.config import Settings
from farm.domain.inputs import LineSettings, StoredInput, unpack
from farm.domain.spec import FullSpec, frame_spec
from farm.services.input_upload import InputReader
from farm.services.job_validation import check_job, full_spec
from tests.unit.test_spec import OFFER

OF_COLUMNS: dict[str, st.SearchStrategy[Any]] = {
    "steps": st.integers(1, 60),
    "width": st.integers(1, 16).map(lambda number: number * 16),
    "height": st.integers(1, 16).map(lambda number: number * 16),
    "guidance_scale": st.sampled_from([1.0, 2.5, 7.0]),
    "sampler": st.sampled_from(["ddim", "euler", None]),
    "eta": st.sampled_from([0.0, 0.5]),
    "seed": st.integers(0, 2**63 - 100),
    "negative_prompt": st.sampled_from(["blurred", "dark"]),
    "key": st.uuids().map(str),
}
PARAMETERS = {"steps", "width", "height", "guidance_scale", "sampler", "eta"}


@st.composite
def tables(draw: st.DrawFn) -> list[dict[str, Any]]:
    names = draw(st.lists(st.sampled_from([*OF_COLUMNS]), unique=True))
    rows = draw(st.integers(1, 12))
    return [
        {"prompt": f"star {number}"} | {name: draw(st.none() | OF_COLUMNS[name]) for name in names}
        for number in range(rows)
    ]


def written(rows: list[dict[str, Any]], kind: str, folder: Path) -> Path:
    path = folder / f"table.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0]])
            writer.writeheader()
            writer.writerows(rows)
    return path


def stored(read: InputReader) -> StoredInput:
    """Return the facts that the database keeps of an input."""
    facts = read.facts
    return StoredInput(
        uuid.uuid4(),
        read.sha256,
        facts.lines,
        facts.bytes,
        facts.shown,
        facts.top_seed,
        facts.prompt_bytes,
        facts.keys,
        facts.negatives,
        datetime.now(UTC),
        None,
        sorted({name for each in facts.settings for name in each.values}),
        "ann",
    )


JOB = {"steps": 9, "guidance_scale": 4.0, "height": 96, "negative_prompt": "grey"}


@settings(max_examples=150)
@given(tables(), st.sampled_from(["csv", "jsonl", "parquet"]), st.booleans())
def test_each_frame_has_the_values_of_its_row_and_else_the_jobs(
    rows: list[dict[str, Any]], kind: str, repeatable: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder, InputReader(Settings()) as read:
        file = PromptFile(written(rows, kind, Path(folder)))
        file.parameters = Parameters(OFFER.params_type.json_schema()["properties"], str)
        for block in file.blocks():
            read.feed(block)
        read.end()
        lines = [line for _, part in read.parts() for line in unpack(part)]
        facts, found = read.facts, stored(read)
    body = {"pipeline": "demo", "input": str(found.id), "repeatable": repeatable, **JOB}
    of_lines = LineSettings(facts.settings, facts.of_lines) if found.fields else None
    job = full_spec(check_job(body, Settings()), OFFER, Settings(), found, of_lines)
    job = FullSpec.model_validate_json(FullSpec.model_validate(job.stored()).model_dump_json())
    for ordinal, (row, line) in enumerate(zip(rows, lines, strict=True)):
        given = {name: value for name, value in row.items() if value is not None}
        frame = frame_spec(job, ordinal, line)
        assert (frame.prompt, line.key) == (row["prompt"], given.get("key"))
        assert frame.seed == given.get("seed", frame.seed)
        for name in (*PARAMETERS, "negative_prompt"):
            default = JOB.get(name, OFFER.params_type.model_fields[name].default)
            assert frame.params[name] == given.get(name, default)
