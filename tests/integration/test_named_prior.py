"""Kandinsky from its decoder's name alone: the decoder's model card names the prior."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from farm.errors import CatalogError
from farm.pipelines.resolve import resolve_pipeline
from tests.integration.test_failed_loads import run_alone
from tests.support.checkpoint_sandbox import CheckpointSandbox, clear
from tests.support.drawing import bare, picture

pytestmark = [
    # diffusers' own samplers hand torch tensors to numpy.array,
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
    # and its combined pipeline of Kandinsky calls the decoder in a deprecated way.
    pytest.mark.filterwarnings("ignore:`callback_steps`:FutureWarning"),
]

ALONE = 'source = "kandinsky22_decoder"'
NAMED = f'{ALONE}\nprior = "kandinsky22_prior"'
CARD = "kandinsky22_decoder/README.md"


@pytest.fixture
def bench(bench: CheckpointSandbox) -> CheckpointSandbox:
    bench.take("kandinsky22_decoder", "kandinsky22_prior")
    return bench


def write_card(bench: CheckpointSandbox, front_matter: str) -> None:
    bench.write(CARD, f"---\nlicense: apache-2.0\n{front_matter}\n---\n# Decoder\n".encode())


@pytest.mark.parametrize("form", ["prior:\n- kandinsky22_prior", "prior: kandinsky22_prior"])
def test_the_prior_of_the_model_card_gives_the_same_picture(
    bench: CheckpointSandbox, form: str
) -> None:
    expected = picture(bench, NAMED, prior_steps=2)
    write_card(bench, form)
    assert (picture(bench, ALONE, prior_steps=2) == expected).all()


def test_provenance_is_that_of_an_entry_that_names_the_prior(bench: CheckpointSandbox) -> None:
    write_card(bench, "prior:\n- kandinsky22_prior")
    names = []
    for words in (NAMED, ALONE):
        resolved = resolve_pipeline("x", bench.entry(words))
        names.append(resolved.family.load(resolved.pipeline).weights)
    assert names[0] == names[1]


def test_the_entry_counts_more_than_the_model_card(bench: CheckpointSandbox) -> None:
    write_card(bench, "prior:\n- no-such/prior")
    resolved = resolve_pipeline("x", bench.entry(NAMED))
    assert resolved.pipeline.parts["prior"].source == "kandinsky22_prior"


def test_the_picture_is_that_of_diffusers_own_combined_pipeline(bench: CheckpointSandbox) -> None:
    """The Auto class reads the decoder's folder, and finds the prior by the same model card."""
    write_card(bench, f"prior:\n- {bench.folder / 'kandinsky22_prior'}\n- some-org/second")
    ours = picture(bench, ALONE)
    assert ours.std() > 1.0, "flat pictures prove nothing"
    assert (ours == bare(bench.folder / "kandinsky22_decoder")).all()


REFUSED = {
    "no model card": (None, "kandinsky22_decoder needs a prior, .* has no README.md that names on"),
    "a model card without a prior": ("tags: [text-to-image]", "needs a prior.* Set `prior`, for"),
    "a prior that is not there": (
        "prior:\n- ./gone",
        "The prior that kandinsky22_decoder names in its README.md cannot be found. Set `prior` in",
    ),
    "a prior of another form": ("prior: [5]", "`prior` in README.md is not the name of a checkp"),
    "a model card that is no YAML": ("prior: [", "README.md cannot be read: "),
    "a prior of another class": ("prior: kandinsky22_decoder", "The prior is a KandinskyV22Pipel"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_prior_that_cannot_be_found_is_one_clear_line(
    bench: CheckpointSandbox, case: str
) -> None:
    front_matter, reason = REFUSED[case]
    if front_matter is not None:
        write_card(bench, front_matter)
    with pytest.raises(CatalogError) as caught:
        resolve_pipeline("x", bench.entry(ALONE))
    assert re.search(reason, clear(caught.value))


LOAD = """
import sys
from pathlib import Path
from farm.pipelines.catalog import load_catalog
from farm.pipelines.resolve import resolve_pipeline

resolved = resolve_pipeline("x", load_catalog(Path(sys.argv[1])).pipelines["x"])
print(type(resolved.family.load(resolved.pipeline).pipe).__name__)
"""
FETCH = """
import runpy, sys

sys.argv = ["farm", "fetch", "x"]
runpy.run_module("farm.cli", run_name="__main__")
"""


def test_decoder_and_prior_are_found_in_the_hub_s_cache_without_a_network(
    bench: CheckpointSandbox, tmp_path: Path
) -> None:
    home, commit = tmp_path / "home", "0123456789" * 4
    write_card(bench, "prior:\n- some-org/prior")
    for name in ("decoder", "prior"):
        cache = home / "hub" / f"models--some-org--{name}"
        (cache / "refs").mkdir(parents=True)
        (cache / "refs/main").write_text(commit)
        shutil.copytree(bench.folder / f"kandinsky22_{name}", cache / "snapshots" / commit)
    bench.write_catalog(x='source = "some-org/decoder"')
    offline = {
        "FARM_PIPELINES": str(bench.catalog),
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
    }
    loaded = run_alone(LOAD, str(bench.catalog), **offline)
    assert loaded.splitlines() == ["KandinskyV22CombinedPipeline"]
    told = run_alone(FETCH, **offline)
    assert [line.split(" is in ")[0] for line in told.splitlines()] == [
        "x: some-org/decoder",
        "x: some-org/prior",
    ]
