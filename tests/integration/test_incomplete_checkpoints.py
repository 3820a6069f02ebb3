"""Incomplete checkpoints: refused with the component's name, or rendered exactly as by diffusers.

Missing weights are never filled with random values.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from farm.errors import CatalogError, NotFinite
from farm.pipelines.resolve import resolve_pipeline
from tests.support.checkpoint_sandbox import CheckpointSandbox
from tests.support.drawing import bare, picture

# diffusers' own samplers hand torch tensors to numpy.array.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

SD = 'source = "stable_diffusion"'
SMALL = f"{SD}\ndefaults = {{ width = 64, height = 64 }}"


@pytest.fixture
def bench(bench: CheckpointSandbox) -> CheckpointSandbox:
    bench.take("stable_diffusion")
    return bench


def tensors(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the tensors of a weights file."""
    from safetensors.torch import load_file, save_file

    found = load_file(path)
    change(found)
    save_file(found, path, metadata={"format": "pt"})


def said(bench: CheckpointSandbox, words: str = SD) -> str:
    """Return the message for a refused entry: from its files, or from loading."""

    def load() -> None:
        resolved = resolve_pipeline("x", bench.entry(words))
        resolved.family.load(resolved.pipeline)

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
    bench: CheckpointSandbox, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    path = bench.folder / "stable_diffusion" / FILES[name]
    tensors(path, lambda found: found.update({"surplus.weight": torch.zeros(2)}))
    resolved = resolve_pipeline("x", bench.entry(SD))
    with caplog.at_level(logging.WARNING):
        resolved.family.load(resolved.pipeline)
    assert f"{name} contains weights that its class does not use: surplus.weight" in caplog.text


def only_a_variant(bench: CheckpointSandbox, name: str) -> None:
    for path in (bench.folder / "stable_diffusion" / name).glob("*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))


@pytest.mark.parametrize("names", [["unet"], ["text_encoder", "vae"], [*FILES]])
def test_a_component_that_has_only_a_variant_is_found_without_loading(
    bench: CheckpointSandbox, names: list[str]
) -> None:
    for name in names:
        only_a_variant(bench, name)
    with pytest.raises(CatalogError, match=r"has no weights as plain .*; set `variant` to"):
        resolve_pipeline("x", bench.entry(SD))


def test_a_variant_of_some_components_goes_with_the_plain_others(bench: CheckpointSandbox) -> None:
    before = bare(bench.folder / "stable_diffusion")
    only_a_variant(bench, "unet")
    assert (picture(bench, f'{SD}\nvariant = "fp16"') == before).all()


@pytest.mark.parametrize("place", [0, 1])
def test_a_shard_that_is_missing_is_found_without_loading(
    bench: CheckpointSandbox, place: int
) -> None:
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
    resolve_pipeline("x", bench.entry(SD))
    (folder / shards[place]).unlink()
    with pytest.raises(CatalogError, match=f"unet/{shards[place]} is missing"):
        resolve_pipeline("x", bench.entry(SD))


@pytest.mark.parametrize("sampler", ["DDIMScheduler", "EulerDiscreteScheduler", "PNDMScheduler"])
def test_the_sampler_is_the_one_that_the_index_names(
    bench: CheckpointSandbox, sampler: str
) -> None:
    bench.change("stable_diffusion/scheduler/scheduler_config.json", _class_name=sampler)
    assert (picture(bench, SD) == bare(bench.folder / "stable_diffusion")).all()


def without(path: Path, key: str) -> None:
    config = json.loads(path.read_text())
    config.pop(key, None)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("null", [False, True])
def test_a_unet_that_does_not_say_its_size_takes_the_entry_s(
    bench: CheckpointSandbox, null: bool
) -> None:
    folder = bench.folder / "stable_diffusion"
    if null:
        bench.change("stable_diffusion/unet/config.json", sample_size=None)
    else:
        without(folder / "unet/config.json", "sample_size")
    assert (picture(bench, SMALL) == bare(folder)).all()
    assert "Set width and height in the entry's `defaults`" in said(bench)


@pytest.mark.parametrize("name", ["conv_out.bias", "conv_out.weight", "conv_norm_out.weight"])
def test_a_picture_that_is_not_finite_is_a_failed_frame(
    bench: CheckpointSandbox, name: str
) -> None:
    path = bench.folder / "stable_diffusion" / FILES["vae"]
    tensors(path, lambda found: found[f"decoder.{name}"].fill_(float("nan")))
    for words in (SD, f'{SD}\nfamily = "auto"'):
        with pytest.raises(NotFinite, match="not finite") as caught:
            picture(bench, words)
        assert (caught.value.retryable, caught.value.code) == (False, "not_finite")


def test_a_refiner_need_not_have_what_it_shares_with_the_base(bench: CheckpointSandbox) -> None:
    bench.take("sdxl", "sdxl_refiner")
    words = 'source = "sdxl"\nrefiner = "sdxl_refiner"'
    before = picture(bench, words, steps=4)
    for name in ("vae", "text_encoder_2"):
        shutil.rmtree(bench.folder / "sdxl_refiner" / name)
    assert (picture(bench, words, steps=4) == before).all()


@pytest.mark.parametrize("name", ["tokenizer/config.json", "tokenizer/._tokenizer.json"])
def test_files_that_nobody_reads_do_no_harm(bench: CheckpointSandbox, name: str) -> None:
    """Users copy a CLIP's whole folder, and macOS adds files that begin with a dot."""
    folder = bench.folder / "stable_diffusion"
    before = bare(folder)
    (folder / name).write_bytes(b"{}" if name.endswith("config.json") else b"\xff")
    (folder / "unet/._diffusion_pytorch_model.safetensors").write_bytes(b"\xff")
    (folder / "unet/lora.safetensors").write_bytes(b"\xff")
    assert (picture(bench, SD) == before).all()


def test_a_unet_with_nothing_but_other_weights_is_refused(bench: CheckpointSandbox) -> None:
    folder = bench.folder / "stable_diffusion/unet"
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "lora.safetensors")
    with pytest.raises(CatalogError, match=r"its unet has no weights .*model\.safetensors is miss"):
        resolve_pipeline("x", bench.entry(SD))


def test_a_single_model_with_a_variant_alone_is_found_without_loading(
    bench: CheckpointSandbox,
) -> None:
    bench.take("controlnet")
    folder = bench.folder / "controlnet"
    words = f'{SD}\ncontrolnets = ["controlnet"]'
    resolve_pipeline("x", bench.entry(words))
    plain = folder / "diffusion_pytorch_model.safetensors"
    plain.rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(CatalogError, match=r"has no weights as plain .*; set `variant` to fp16"):
        resolve_pipeline("x", bench.entry(words))
    resolve_pipeline(
        "x", bench.entry(f'{SD}\ncontrolnets = [{{ source = "controlnet", variant = "fp16" }}]')
    )


@pytest.mark.parametrize("folder", ["stable_diffusion/unet", "controlnet"])
def test_a_net_and_a_unet_that_leave_out_what_is_the_class_s_own_fit(
    bench: CheckpointSandbox, folder: str
) -> None:
    bench.take("controlnet")
    own = [320, 640, 1280, 1280]
    for name in ("stable_diffusion/unet", "controlnet"):
        bench.change(f"{name}/config.json", block_out_channels=own)
    without(bench.folder / folder / "config.json", "block_out_channels")
    resolve_pipeline("x", bench.entry(f'{SD}\ncontrolnets = ["controlnet"]'))
