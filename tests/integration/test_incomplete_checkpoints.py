"""Checkpoints that are not whole: refused with the component's name, or drawn as diffusers draws.

Nothing is ever filled in at random.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from farm.errors import CatalogError, NotFinite
from farm.offers import make_offer
from tests.bench import Bench
from tests.drawing import bare, picture

SD = 'source = "stable_diffusion"'
SMALL = f"{SD}\ndefaults = {{ width = 64, height = 64 }}"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("good")


@pytest.fixture
def bench(good: Path, tmp_path: Path) -> Bench:
    bench = Bench(good, tmp_path)
    bench.take("stable_diffusion")
    return bench


def tensors(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the tensors of a file of weights."""
    from safetensors.torch import load_file, save_file

    found = load_file(path)
    change(found)
    save_file(found, path, metadata={"format": "pt"})


def said(bench: Bench, words: str = SD) -> str:
    """What is said of an entry that is refused: by its files, or when it is loaded."""

    def load() -> None:
        offer = make_offer("x", bench.entry(words))
        offer.family.load(offer.pipeline)

    with pytest.raises(CatalogError) as caught:
        load()
    assert "\n" not in caught.value.message
    return caught.value.message


FILES = {
    "text_encoder": "text_encoder/model.safetensors",
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
}


@pytest.mark.parametrize("name", FILES)
def test_weights_that_a_class_has_no_place_for_are_named(
    bench: Bench, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    path = bench.folder / "stable_diffusion" / FILES[name]
    tensors(path, lambda found: found.update({"surplus.weight": torch.zeros(2)}))
    offer = make_offer("x", bench.entry(SD))
    with caplog.at_level(logging.WARNING):
        offer.family.load(offer.pipeline)
    assert f"{name} has weights that its class has no place for: surplus.weight" in caplog.text


def only_a_variant(bench: Bench, name: str) -> None:
    for path in (bench.folder / "stable_diffusion" / name).glob("*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))


@pytest.mark.parametrize("names", [["unet"], ["text_encoder", "vae"], [*FILES]])
def test_a_component_that_has_only_a_variant_is_found_without_loading(
    bench: Bench, names: list[str]
) -> None:
    for name in names:
        only_a_variant(bench, name)
    with pytest.raises(CatalogError, match=r"has no weights as plain .*; there is variant"):
        make_offer("x", bench.entry(SD))


def test_a_variant_of_some_components_goes_with_the_plain_others(bench: Bench) -> None:
    before = bare(bench.folder / "stable_diffusion")
    only_a_variant(bench, "unet")
    assert (picture(bench, f'{SD}\nvariant = "fp16"') == before).all()


@pytest.mark.parametrize("place", [0, 1])
def test_a_shard_that_is_missing_is_found_without_loading(bench: Bench, place: int) -> None:
    from safetensors.torch import load_file, save_file

    folder = bench.folder / "stable_diffusion/unet"
    [path] = folder.glob("*.safetensors")
    names = sorted(found := load_file(path))
    shards = [f"diffusion_pytorch_model-{n:05d}-of-00002.safetensors" for n in (1, 2)]
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    for shard, half in zip(shards, halves, strict=True):
        save_file({name: found[name] for name in half}, folder / shard, metadata={"format": "pt"})
    path.unlink()
    index = {name: shard for shard, half in zip(shards, halves, strict=True) for name in half}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
    )
    make_offer("x", bench.entry(SD))
    (folder / shards[place]).unlink()
    with pytest.raises(CatalogError, match=f"unet/{shards[place]} is missing"):
        make_offer("x", bench.entry(SD))


@pytest.mark.parametrize("sampler", ["DDIMScheduler", "EulerDiscreteScheduler", "PNDMScheduler"])
def test_the_sampler_is_the_one_that_the_index_names(bench: Bench, sampler: str) -> None:
    bench.change("stable_diffusion/scheduler/scheduler_config.json", _class_name=sampler)
    assert (picture(bench, SD) == bare(bench.folder / "stable_diffusion")).all()


def without(path: Path, key: str) -> None:
    config = json.loads(path.read_text())
    config.pop(key, None)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("null", [False, True])
def test_a_unet_that_does_not_say_its_size_takes_the_entry_s(bench: Bench, null: bool) -> None:
    folder = bench.folder / "stable_diffusion"
    if null:
        bench.change("stable_diffusion/unet/config.json", sample_size=None)
    else:
        without(folder / "unet/config.json", "sample_size")
    assert (picture(bench, SMALL) == bare(folder)).all()
    assert "put width and height into the entry's defaults" in said(bench)


@pytest.mark.parametrize("name", ["conv_out.bias", "conv_out.weight", "conv_norm_out.weight"])
def test_a_picture_that_is_not_finite_is_a_failed_frame(bench: Bench, name: str) -> None:
    path = bench.folder / "stable_diffusion" / FILES["vae"]
    tensors(path, lambda found: found[f"decoder.{name}"].fill_(float("nan")))
    with pytest.raises(NotFinite, match="not finite") as caught:
        picture(bench, SD)
    assert (caught.value.retryable, caught.value.code) == (False, "not_finite")
