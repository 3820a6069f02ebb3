"""The spec: pure functions from a job and an ordinal to a frame."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field
from pydantic_core import to_json

from farm.config import DEMO_CATALOG, Settings
from farm.domain.spec import (
    MAX_SEED,
    FullSpec,
    Line,
    Priority,
    batch_key,
    chosen_bucket,
    derived_seed,
    frame_spec,
)
from farm.errors import CatalogError, InvalidRequest
from farm.pipelines.catalog import load_catalog
from farm.pipelines.params import Params
from farm.pipelines.resolve import resolve_pipeline
from farm.services.job_validation import check_job, full_spec

OFFER = resolve_pipeline("demo", load_catalog(DEMO_CATALOG).pipelines["demo"])
SETTINGS = Settings()


def plan(**fields: Any) -> FullSpec:
    body = {"pipeline": "demo", "prompts": ["a red star"], **fields}
    return full_spec(check_job(body, SETTINGS), OFFER, SETTINGS)


def refusal(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        plan(**fields)
    return caught.value


@pytest.mark.parametrize(
    "other",
    [
        {"steps": 7},
        {"negative_prompt": "blurred"},
        {"priority": "interactive"},
        {"bucket": 2},
        {"repeatable": False},
        {"images_per_prompt": 2},
        {"prompts": ["a red star", "a ring"]},
        {"grid": {"steps": [7, 9]}},
    ],
)
def test_a_job_is_not_taken_for_an_earlier_one_with_other_settings(other: dict[str, Any]) -> None:
    earlier: dict[str, Any] = {"seed": 1, "images_per_prompt": 8}
    plan(**earlier)
    alone = replace(OFFER, checked={})
    body = {"pipeline": "demo", "prompts": ["a red star"], **earlier, **other}
    assert plan(**{**earlier, **other}) == full_spec(check_job(body, SETTINGS), alone, SETTINGS)


def test_what_is_refused_is_not_remembered() -> None:
    offer = replace(OFFER, checked={})
    job = check_job({"pipeline": "demo", "prompts": ["a"], "width": 16_384}, SETTINGS)
    with pytest.raises(InvalidRequest):
        full_spec(job, offer, SETTINGS)
    assert offer.checked == {}


def test_long_settings_are_not_remembered() -> None:
    offer = replace(OFFER, checked={})
    for text in ("blurred", "blurred " * 500):
        body = {"pipeline": "demo", "prompts": ["a"], "negative_prompt": text}
        full_spec(check_job(body, SETTINGS), offer, SETTINGS)
    assert len(offer.checked) == 1


@given(
    grid=st.integers(1, 5),
    prompts=st.integers(1, 7),
    images=st.integers(1, 6),
    seed=st.none() | st.integers(0, 1000),
)
def test_an_ordinal_is_grid_then_prompt_then_image(
    grid: int, prompts: int, images: int, seed: int | None
) -> None:
    texts = [f"prompt {number}" for number in range(prompts)]
    job = plan(
        prompts=texts,
        images_per_prompt=images,
        seed=seed,
        grid={"steps": [10 + number for number in range(grid)]},
    )
    assert job.total == grid * prompts * images
    seeds = set()
    for g in range(grid):
        for p in range(prompts):
            for k in range(images):
                ordinal = (g * prompts + p) * images + k
                frame = frame_spec(job, ordinal, Line(texts[job.prompt_index(ordinal)]))
                assert frame.prompt == f"prompt {p}"
                assert frame.params["steps"] == 10 + g
                if seed is not None:
                    assert frame.seed == seed + k
                seeds.add(frame.seed)
    if seed is None:
        assert len(seeds) == job.total


def test_ordinals_outside_the_job_are_refused() -> None:
    job = plan(images_per_prompt=3)
    for ordinal in (-1, 3):
        with pytest.raises(IndexError):
            frame_spec(job, ordinal, Line(""))


def test_a_derived_seed_never_changes() -> None:
    """The values are pinned: other values would change the pictures of existing jobs."""
    assert derived_seed(31, 0, 63) == 7220534278658160695
    assert derived_seed(31, 1, 63) == 7890612522400008144
    assert derived_seed(31, 0, 53) == 7220534278658160695 >> 10


@given(st.integers(0, MAX_SEED), st.integers(0, 2**40))
def test_derived_seeds_fit_a_generator_and_javascript(job_seed: int, ordinal: int) -> None:
    assert 0 <= derived_seed(job_seed, ordinal, 63) <= MAX_SEED
    drawn = derived_seed(job_seed, ordinal, 53)
    assert int(float(drawn)) == drawn


def test_every_default_is_filled_in() -> None:
    job = plan()
    assert job.point(0).params == {
        "width": 64,
        "height": 64,
        "negative_prompt": "",
        "steps": 25,
        "guidance_scale": 2.5,
        "guidance_rescale": 0.0,
        "sampler": "ddim",
        "eta": 0.0,
        "clip_skip": None,
        "prompt_syntax": "plain",
    }


def test_a_job_survives_storage() -> None:
    job = plan(grid={"steps": [1, 2], "guidance_scale": [1.0, 2.5]}, labels={"a": "b"})
    again = FullSpec.model_validate_json(job.model_dump_json())
    assert again == job
    assert list(again.grid) == ["steps", "guidance_scale"]


VALUES = {
    "steps": st.integers(1, 40),
    "guidance_scale": st.floats(0.0, 20.0, width=16) | st.integers(0, 20),
    "width": st.sampled_from([64, 96, 128]),
    "negative_prompt": st.text("ab\u00e9\u2603", max_size=3),
}


@given(
    st.lists(st.sampled_from(sorted(VALUES)), unique=True, max_size=3).flatmap(
        lambda names: st.fixed_dictionaries(
            {name: st.lists(VALUES[name], min_size=1, max_size=4) for name in names}
        )
    )
)
def test_every_grid_survives_storage(grid: dict[str, list[Any]]) -> None:
    job = plan(grid=grid)
    again = FullSpec.model_validate_json(to_json(job.stored()))
    assert again.total == job.total
    for ordinal in range(job.total):
        one, other = (frame_spec(each, ordinal, Line("a ring")) for each in (job, again))
        assert one.model_dump_json() == other.model_dump_json(), "the order is in a picture's text"
    assert again.model_dump(exclude={"points"}) == job.model_dump(exclude={"points"})


def test_a_large_grid_is_stored_about_as_small_as_it_was_sent() -> None:
    grid = {
        "steps": [*range(10, 20)],
        "guidance_scale": [number / 2 for number in range(10)],
        "eta": [number / 10 for number in range(10)],
    }
    fields = {"grid": grid, "negative_prompt": 1000 * "no blur "}
    job = plan(**fields)
    assert len(job.points) == 1000
    assert len(to_json(job.stored())) < 1.5 * len(json.dumps(fields))


@pytest.mark.parametrize(
    ("priority", "bucket", "frames", "expected"),
    [
        ("interactive", 8, 100, 1),
        ("normal", 8, 100, 8),
        ("bulk", 8, 5, 8),
        ("bulk", 8, 4, 4),
        ("bulk", 8, 3, 4),
        ("bulk", 8, 1, 1),
        ("bulk", 1, 100, 1),
    ],
)
def test_the_bucket_chosen(priority: str, bucket: int, frames: int, expected: int) -> None:
    assert chosen_bucket(Priority.parse(priority), bucket, frames) == expected


def test_a_bucket_counts_the_frames_that_can_share_it() -> None:
    job = plan(
        images_per_prompt=2,
        grid={"negative_prompt": ["", "blue"], "steps": [5, 6]},
        repeatable=True,
    )
    # frames that can share a batch come in pairs, so a larger bucket would never be full
    assert {point.bucket for point in job.every_point()} == {2}
    assert [end for end, _, _ in job.runs] == [2, 4, 6, 8]
    together = plan(
        images_per_prompt=2,
        grid={"steps": [5, 6], "negative_prompt": ["", "blue"]},
        repeatable=True,
    )
    assert [end for end, _, _ in together.runs] == [4, 8]
    assert {point.bucket for point in together.every_point()} == {4}


def test_what_a_batch_shares_decides_its_key() -> None:
    scalars = {"steps": 5, "width": 64}
    key = batch_key("demo", 4, scalars, 320)
    assert key == batch_key("demo", 4, {"width": 64, "steps": 5}, 320)
    assert len({key, batch_key("demo", 8, scalars, 320), batch_key("other", 4, scalars, 320)}) == 3
    assert key != batch_key("demo", 4, {**scalars, "steps": 6}, 320)
    assert key.endswith(".320")
    one, two = plan(negative_prompt="blue", bucket=4), plan(seed=5, bucket=4)
    assert one.point(0).batch_key == two.point(0).batch_key


@pytest.mark.parametrize(
    ("fields", "repeatable"),
    [
        ({}, False),
        ({"seed": 0}, True),
        ({"bucket": 2}, True),
        ({"seed": 1, "repeatable": False}, False),
        ({"repeatable": True}, True),
    ],
)
def test_a_seed_or_a_bucket_makes_a_job_repeatable(
    fields: dict[str, Any], repeatable: bool
) -> None:
    job = plan(priority="interactive", **fields)
    assert job.repeatable is repeatable
    key, bucket = job.point(0).batch_key, job.point(0).bucket
    assert key.endswith("~64x64") is not repeatable
    assert bucket == (fields.get("bucket", 1) if repeatable else 8)
    # Priority and number of frames decide nothing then, so all such jobs share batches.
    same = plan(priority="bulk", images_per_prompt=100, **fields).point(0).batch_key
    assert (same == key) is (not repeatable or "bucket" in fields)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"pipeline": 5}, "pipeline"),
        ({"prompts": []}, "prompts"),
        ({"prompts": "a red star"}, "prompts"),
        ({"prompts": ["a", 5]}, "prompts.1"),
        ({"prompts": ["a", "b\x00c"]}, "prompts"),
        ({"prompts": ["\ud800"]}, "prompts"),
        ({"prompts": ["x" * 2_000_000]}, "prompts.0"),
        ({"negative_prompt": "x" * 2_000_000}, "negative_prompt"),
        ({"negative_prompt": "\x00"}, "negative_prompt"),
        ({"images_per_prompt": 0}, "images_per_prompt"),
        ({"images_per_prompt": 1_000_000_000}, "images_per_prompt"),
        ({"images_per_prompt": True}, "images_per_prompt"),
        ({"images_per_prompt": 10**4299, "prompts": ["x"] * 20}, "images_per_prompt"),
        ({"seed": -1}, "seed"),
        ({"seed": MAX_SEED + 1}, "seed"),
        ({"seed": MAX_SEED, "images_per_prompt": 2}, "seed"),
        ({"width": 65}, "width"),
        ({"width": 0}, "width"),
        ({"width": "64"}, "width"),
        ({"width": 4096, "height": 4096}, "width"),
        ({"steps": 0}, "steps"),
        ({"steps": 1_000_000}, "steps"),
        ({"steps": 25.5}, "steps"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"guidance_scale": float("inf")}, "guidance_scale"),
        ({"guidance_scale": None}, "guidance_scale"),
        ({"sampler": "magic"}, "sampler"),
        ({"colour": "red"}, "colour"),
        ({"grid": {"colour": ["red"]}}, "grid.colour"),
        ({"grid": {"steps": []}}, "grid.steps"),
        ({"grid": {"steps": [5, 0]}}, "grid.steps"),
        ({"grid": {"steps": [5] * 2000}}, "grid"),
        ({"priority": "now"}, "priority"),
        ({"bucket": 0}, "bucket"),
        ({"bucket": 257}, "bucket"),
        ({"max_attempts": 11}, "max_attempts"),
        ({"labels": {"a": 5}}, "labels.a"),
        ({"labels": {"a": "\x00"}}, "labels"),
        ({"labels": {str(n): "" for n in range(33)}}, "labels"),
    ],
)
def test_bad_input_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    error = refusal(**fields)
    assert error.param == param
    assert param.split(".")[0] in error.message
    assert len(error.message) < 2000


def test_a_job_must_be_an_object() -> None:
    bodies: list[Any] = [[], "job", None, 5]
    for body in bodies:
        with pytest.raises(InvalidRequest, match="JSON object"):
            check_job(body, SETTINGS)


def test_prompts_in_any_script_stay_as_they_are() -> None:
    prompts = ["نجمة حمراء", "赤い星 🌟", "כוכב", "e\u0301", " spaces  kept "]
    assert check_job({"pipeline": "demo", "prompts": prompts}, SETTINGS).prompts == prompts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pipelines = 5", "pipelines"),
        ("[pipelines]", "pipelines"),
        ("not toml", "not TOML"),
        ('[pipelines.a]\nsource = "x"\ncolour = "red"', "pipelines.a.colour"),
        ("[pipelines.a]", "pipelines.a.source"),
        ('[pipelines.a]\nsource = "x"\nbucket = { "default" = 0 }', "bucket"),
        ('[pipelines."a b"]\nsource = "x"', "a b"),
    ],
)
def test_a_bad_catalog_says_where(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "pipelines.toml"
    path.write_text(text)
    with pytest.raises(CatalogError, match=message):
        load_catalog(path)


def test_a_catalog_in_json_has_the_same_entries(tmp_path: Path) -> None:
    """Numbers may be 4.0: templates of Kubernetes write them so."""
    (tmp_path / "checkpoint").mkdir()
    toml, json_file = tmp_path / "pipelines.toml", tmp_path / "pipelines.json"
    toml.write_text(
        '[pipelines.a]\nsource = "checkpoint"\nrefiner = "x/y"\nbucket = { "64x64" = 4 }\n'
        "defaults = { steps = 30 }\n"
    )
    entry = {
        "source": "checkpoint",
        "refiner": "x/y",
        "bucket": {"64x64": 4.0},
        "defaults": {"steps": 30},
    }
    json_file.write_text(json.dumps({"pipelines": {"a": entry}}))
    ours, theirs = load_catalog(toml), load_catalog(json_file)
    assert ours == theirs
    assert theirs.pipelines["a"].checkpoint == str(tmp_path / "checkpoint")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[pipelines.a]", "is not JSON: Expecting value: line 1 column 2"),
        ("[]", "valid dictionary"),
        ('{"pipelines": {"a": {"source": "x", "colour": "red"}}}', r"pipelines\.a\.colour"),
    ],
)
def test_a_bad_catalog_in_json_says_where(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "pipelines.json"
    path.write_text(text)
    with pytest.raises(CatalogError, match=message):
        load_catalog(path)


def test_a_missing_catalog_says_which(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match=r"pipelines\.toml"):
        load_catalog(tmp_path / "pipelines.toml")


def test_a_missing_family_or_checkpoint_is_said(tmp_path: Path) -> None:
    path = tmp_path / "pipelines.toml"
    model = DEMO_CATALOG.parent / "model"
    path.write_text(
        f'[pipelines.a]\nsource = "{model}"\nfamily = "nope"\n'
        f'[pipelines.b]\nsource = "{model}"\n'
        f'[pipelines.c]\nsource = "{tmp_path}"\n'
        f'[pipelines.d]\nsource = "{model}"\ndefaults = {{ "steps" = 0 }}\n'
    )
    pipelines = load_catalog(path).pipelines
    with pytest.raises(CatalogError, match="nope"):
        resolve_pipeline("a", pipelines["a"])
    assert resolve_pipeline("b", pipelines["b"]).family.name == "stable_diffusion"
    with pytest.raises(CatalogError, match=r"model_index\.json"):
        resolve_pipeline("c", pipelines["c"])
    with pytest.raises(CatalogError, match=r"defaults\.steps"):
        resolve_pipeline("d", pipelines["d"])


class Wide(Params):
    """Parameters of a family without its own limit."""

    width: int = Field(default=64)
    height: int = Field(default=64)


@pytest.mark.parametrize(("form", "limit"), [("jpeg", 65_535), ("webp", 16_383)])
@pytest.mark.parametrize("side", ["width", "height"])
def test_a_picture_that_its_format_cannot_hold_is_refused(form: str, limit: int, side: str) -> None:
    pipeline = OFFER.pipeline.model_copy(update={"max_pixels": 10**9})
    resolved = replace(OFFER, pipeline=pipeline, family_params=Wide, params_type=Wide)

    def submitted(**fields: Any) -> FullSpec:
        body = {"pipeline": OFFER.name, "prompts": ["a star"], "format": form, **fields}
        return full_spec(check_job(body, SETTINGS), resolved, SETTINGS)

    assert submitted(**{side: limit}).format == form
    words = f"{side} is {limit + 1} pixels; the limit of format {form} is {limit}"
    with pytest.raises(InvalidRequest, match=words) as caught:
        submitted(**{side: limit + 1})
    assert caught.value.param == side
    with pytest.raises(InvalidRequest) as caught:
        submitted(grid={side: [64, limit + 1]})
    assert caught.value.param == f"grid.{side}"


def test_the_format_is_the_frames_and_not_the_batchs() -> None:
    given = {"pipeline": OFFER.name, "prompts": ["a star"]}
    specs = {
        form: full_spec(check_job({**given, "format": form}, SETTINGS), OFFER, SETTINGS)
        for form in ("png", "jpeg", "webp")
    }
    assert len({spec.point(0).batch_key for spec in specs.values()}) == 1
    assert {form: frame_spec(spec, 0, Line("x")).format for form, spec in specs.items()} == {
        form: form for form in specs
    }
    stored = specs["png"].model_dump(exclude={"format"})
    assert FullSpec.model_validate(stored).format == "png"
    with pytest.raises(InvalidRequest, match="format: Input should be 'png', 'jpeg' or 'webp'"):
        check_job({**given, "format": "tiff"}, SETTINGS)
