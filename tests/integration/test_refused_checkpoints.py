"""Unusable catalog entries: refused in one clear line, before any weight is loaded.

So the API, `farm doctor` and the workers all report it. test_failed_loads.py tests faults found
only on loading.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable

import pytest

from farm.errors import CatalogError
from farm.pipelines.resolve import resolve_pipeline
from tests.support.checkpoint_sandbox import RUN, SAFE, CheckpointSandbox, clear

UNET, VAE = "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"
ENCODER = "text_encoder/model"
SD = 'source = "stable_diffusion"'
KANDINSKY = 'source = "kandinsky22_decoder"\nprior = "kandinsky22_prior"'


def refused(bench: CheckpointSandbox, words: str) -> str:
    """Check that an entry is refused. Return the message."""
    entry = bench.entry(words)
    with pytest.raises(CatalogError) as caught:
        resolve_pipeline("x", entry)
    assert not (bench.folder / RUN).exists()
    said = clear(caught.value)
    assert said.startswith("Pipeline x: ")
    return said


def own_component(bench: CheckpointSandbox) -> None:
    bench.change("stable_diffusion/model_index.json", unet=["own", "Own"])
    bench.write_code("stable_diffusion/unet/own.py")


def class_of_its_own(bench: CheckpointSandbox) -> None:
    bench.change("stable_diffusion/model_index.json", _class_name=["own", "Own"])
    bench.write_code("stable_diffusion/own.py")


def no_weights(bench: CheckpointSandbox) -> None:
    for path in (bench.folder / "stable_diffusion").rglob(f"*{SAFE}"):
        path.unlink()


def with_header(header: bytes) -> bytes:
    """Build a safetensors file with this header and no tensors."""
    return len(header).to_bytes(8, "little") + header


SPOILED: dict[str, tuple[Callable[[CheckpointSandbox], None], str]] = {
    "a pickled UNet": (
        lambda bench: bench.rename(f"stable_diffusion/{UNET}", ".bin"),
        r"unet/diffusion_pytorch_model\.bin is a pickle, .* Only safetensors are loaded",
    ),
    "a pickled text encoder": (
        lambda bench: bench.rename(f"stable_diffusion/{ENCODER}", ".bin"),
        r"text_encoder/model\.bin is a pickle",
    ),
    "a component with custom code": (
        own_component,
        r"its unet is a own\.Own with custom code, which is never run",
    ),
    "code that is named for a library": (
        lambda bench: bench.write_code("stable_diffusion/unet/diffusers.py"),
        r"its unet is a diffusers\.UNet2DConditionModel with custom code",
    ),
    "a component from another library": (
        lambda bench: bench.change("stable_diffusion/model_index.json", unet=["os", "system"]),
        r"its unet is a os\.system with custom code",
    ),
    "a component from a path": (
        lambda bench: bench.change("stable_diffusion/model_index.json", unet=["../own", "Own"]),
        r"its unet is a \.\./own\.Own with custom code",
    ),
    "a class with custom code": (class_of_its_own, "Pipelines with custom code are never"),
    "no class": (
        lambda bench: bench.change("stable_diffusion/model_index.json", _class_name=None),
        "names no diffusers class",
    ),
    "an unknown class": (
        lambda bench: bench.change("stable_diffusion/model_index.json", _class_name="NoSuch"),
        "no family renders a NoSuch",
    ),
    "an index that is no JSON": (
        lambda bench: bench.write("stable_diffusion/model_index.json", b"{"),
        r"model_index\.json cannot be read: Expecting property name",
    ),
    "an index that is no text": (
        lambda bench: bench.write("stable_diffusion/model_index.json", b"\xff"),
        r"model_index\.json cannot be read: 'utf-8' codec",
    ),
    "an index that is a list": (
        lambda bench: bench.write("stable_diffusion/model_index.json", b"[]"),
        r"model_index\.json is not a JSON object",
    ),
    "an index that is deep": (
        lambda bench: bench.write("stable_diffusion/model_index.json", b"[" * 100_000),
        r"model_index\.json cannot be read: maximum recursion depth",
    ),
    "a configuration that is no JSON": (
        lambda bench: bench.write("stable_diffusion/unet/config.json", b"{"),
        r"unet/config\.json cannot be read",
    ),
    "a configuration of another form": (
        lambda bench: bench.change("stable_diffusion/unet/config.json", sample_size="large"),
        "its configuration is not of the form that diffusers writes",
    ),
    "a size of another form": (
        lambda bench: bench.change("stable_diffusion/unet/config.json", sample_size="large"),
        "its configuration is not of the form that diffusers writes",
    ),
    "a UNet for inpainting": (
        lambda bench: bench.change("stable_diffusion/unet/config.json", in_channels=9),
        "stable_diffusion cannot render from a prompt only: it was trained to change another",
    ),
    "a class that takes a picture": (
        lambda bench: bench.change(
            "stable_diffusion/model_index.json", _class_name="StableDiffusionUpscalePipeline"
        ),
        "no family renders a StableDiffusionUpscalePipeline",
    ),
    "a UNet without weights": (
        lambda bench: (bench.folder / f"stable_diffusion/{UNET}{SAFE}").unlink(),
        "its unet has no weights as plain safetensors",
    ),
    "no UNet": (
        lambda bench: shutil.rmtree(bench.folder / "stable_diffusion/unet"),
        "its unet is missing; model_index.json names it",
    ),
    "no tokenizer": (
        lambda bench: shutil.rmtree(bench.folder / "stable_diffusion/tokenizer"),
        "its tokenizer is missing; model_index.json names it",
    ),
    "a tokenizer without words": (
        lambda bench: (bench.folder / "stable_diffusion/tokenizer/tokenizer.json").unlink(),
        "its tokenizer has no vocabulary",
    ),
    "weights that are cut off": (
        lambda bench: bench.cut(f"stable_diffusion/{UNET}{SAFE}", 0.5),
        r"unet/diffusion_pytorch_model\.safetensors is damaged: it has \d+ bytes instead of \d+",
    ),
    "weights that are cut off early": (
        lambda bench: bench.cut(f"stable_diffusion/{ENCODER}{SAFE}", 0.0005),
        r"text_encoder/model\.safetensors is damaged: it does not begin like a safetensors file",
    ),
    "weights of noise": (
        lambda bench: bench.write(f"stable_diffusion/{VAE}{SAFE}", os.urandom(5_000)),
        r"vae/diffusion_pytorch_model\.safetensors is damaged",
    ),
    "weights that are empty": (
        lambda bench: bench.write(f"stable_diffusion/{VAE}{SAFE}", b""),
        r"vae/diffusion_pytorch_model\.safetensors is damaged",
    ),
    "a header that is a list": (
        lambda bench: bench.write(f"stable_diffusion/{VAE}{SAFE}", with_header(b"[1]")),
        r"vae/diffusion_pytorch_model\.safetensors is damaged: its header is not that",
    ),
    "a header of another form": (
        lambda bench: bench.write(f"stable_diffusion/{VAE}{SAFE}", with_header(b'{"a": 1}')),
        r"vae/diffusion_pytorch_model\.safetensors is damaged: its header is not that",
    ),
    "no weights at all": (
        no_weights,
        "has no weights as safetensors",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_spoiled_checkpoint_is_refused(bench: CheckpointSandbox, case: str) -> None:
    spoil, reason = SPOILED[case]
    bench.take("stable_diffusion")
    resolve_pipeline("x", bench.entry(SD))
    spoil(bench)
    assert re.search(reason, refused(bench, SD))


WRONG: dict[str, tuple[tuple[str, ...], str, str]] = {
    "the family of another class": (
        ("stable_diffusion",),
        f'{SD}\nfamily = "sdxl"',
        "is a StableDiffusionPipeline; it must be a StableDiffusionXLPipeline",
    ),
    "a family that there is not": (
        ("stable_diffusion",),
        f'{SD}\nfamily = "dreams"',
        "family 'dreams' is unknown. Use one of auto, controlnet",
    ),
    "a refiner of another class": (
        ("sdxl",),
        'source = "sdxl"\nrefiner = "sdxl"',
        "The refiner is a StableDiffusionXLPipeline; it must be a StableDiffusionXLImg2Img",
    ),
    "a prior of another class": (
        ("kandinsky22_decoder", "sdxl"),
        'source = "kandinsky22_decoder"\nprior = "sdxl"',
        "The prior is a StableDiffusionXLPipeline; it must be a KandinskyV22PriorPipeline",
    ),
    "a ControlNet of another class": (
        ("stable_diffusion", "sdxl"),
        f'{SD}\ncontrolnets = ["sdxl"]',
        "controlnets.0 is a StableDiffusionXLPipeline; it must be a ControlNetModel",
    ),
    "no prior": (
        ("kandinsky22_decoder",),
        'source = "kandinsky22_decoder"',
        "needs a prior, which makes embeddings of prompts, and has no README.md .* Set `prior`",
    ),
    "no ControlNet": (
        ("stable_diffusion",),
        f'{SD}\nfamily = "controlnet"',
        "has no ControlNet. List at least one in `controlnets`",
    ),
    "SDXL's ControlNet on Stable Diffusion": (
        ("stable_diffusion", "controlnet_sdxl"),
        f'{SD}\ncontrolnets = ["controlnet_sdxl"]',
        "controlnets.0 is for another base: its cross_attention_dim is 64, but that of .* 32",
    ),
    "Stable Diffusion's ControlNet on SDXL": (
        ("sdxl", "controlnet"),
        'source = "sdxl"\ncontrolnets = ["controlnet"]',
        "controlnets.0 is for another base",
    ),
    "the second of two ControlNets": (
        ("stable_diffusion", "controlnet", "controlnet_sdxl"),
        f'{SD}\ncontrolnets = ["controlnet", "controlnet_sdxl"]',
        "controlnets.1 is for another base",
    ),
    "ControlNets on Kandinsky": (
        ("kandinsky22_decoder", "kandinsky22_prior", "controlnet"),
        f'{KANDINSKY}\ncontrolnets = ["controlnet"]',
        "controlnet",
    ),
    "ControlNets on Kandinsky by name": (
        ("kandinsky22_decoder", "kandinsky22_prior", "controlnet"),
        f'{KANDINSKY}\nfamily = "kandinsky22"\ncontrolnets = ["controlnet"]',
        "controlnets: family kandinsky22 does not use it",
    ),
    "ControlNets on Flux": (
        ("flux", "controlnet"),
        'source = "flux"\nfamily = "auto"\ncontrolnets = ["controlnet"]',
        "controlnets: family auto does not use it",
    ),
    "a refiner on Stable Diffusion": (
        ("stable_diffusion", "sdxl_refiner"),
        f'{SD}\nrefiner = "sdxl_refiner"',
        "refiner: family stable_diffusion does not use it",
    ),
    "a refiner as the pipeline": (
        ("sdxl_refiner",),
        'source = "sdxl_refiner"',
        "sdxl_refiner cannot render from a prompt only: it was trained to change another",
    ),
    "a prior as the pipeline": (
        ("kandinsky22_prior",),
        'source = "kandinsky22_prior"',
        "no family renders a KandinskyV22PriorPipeline",
    ),
    "a ControlNet as the pipeline": (
        ("controlnet",),
        'source = "controlnet"',
        "no family renders a ControlNetModel",
    ),
    "no such variant": (
        ("stable_diffusion",),
        f'{SD}\nvariant = "fp16"',
        "stable_diffusion has no files of variant 'fp16'",
    ),
    "no such variant of a part": (
        ("stable_diffusion", "controlnet"),
        f'{SD}\ncontrolnets = [{{ source = "controlnet", variant = "fp16" }}]',
        "controlnets.0 controlnet has no files of variant 'fp16'",
    ),
    "no safety checker": (
        ("stable_diffusion",),
        f"{SD}\nsafety_checker = true",
        "has no safety checker. Remove safety_checker = true",
    ),
    "a default of no field": (
        ("stable_diffusion",),
        f'{SD}\ndefaults = {{ "colour" = "red" }}',
        "defaults.colour: unknown parameter. This pipeline has width",
    ),
    "a default out of range": (
        ("stable_diffusion",),
        f'{SD}\ndefaults = {{ "steps" = 0 }}',
        "defaults.steps: Input should be greater than or equal to 1",
    ),
    "a default of a wrong type": (
        ("stable_diffusion",),
        f'{SD}\ndefaults = {{ "sampler" = "magic" }}',
        "defaults.sampler: this pipeline cannot use this sampler",
    ),
    "a default deeper than the text encoder": (
        ("stable_diffusion",),
        f'{SD}\ndefaults = {{ "clip_skip" = 3 }}',
        "defaults.clip_skip: Input should be less than or equal to 2",
    ),
    "a bucket of no size that it draws": (
        ("stable_diffusion",),
        f'{SD}\nbucket = {{ "65x64" = 2 }}',
        "bucket.65x64: width",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_entry_is_refused(bench: CheckpointSandbox, case: str) -> None:
    kinds, words, reason = WRONG[case]
    bench.take(*kinds)
    assert re.search(reason, refused(bench, words))


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("kandinsky22_prior/prior/diffusion_pytorch_model", "prior kandinsky22_prior: prior/"),
        ("kandinsky22_decoder/unet/diffusion_pytorch_model", "kandinsky22_decoder: unet/"),
    ],
)
def test_a_pickle_is_found_in_any_part(bench: CheckpointSandbox, name: str, where: str) -> None:
    bench.take("kandinsky22_decoder", "kandinsky22_prior")
    bench.rename(name, ".bin")
    assert f"{where}diffusion_pytorch_model.bin is a pickle" in refused(bench, KANDINSKY)


def test_a_pickled_control_net_is_refused(bench: CheckpointSandbox) -> None:
    bench.take("stable_diffusion", "controlnet")
    bench.rename("controlnet/diffusion_pytorch_model", ".bin")
    said = refused(bench, f'{SD}\ncontrolnets = ["controlnet"]')
    assert "controlnets.0 controlnet: diffusion_pytorch_model.bin is a pickle" in said


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ('source = "a"\ncustom_pipeline = "own"', "pipelines.x.custom_pipeline: Extra inputs"),
        ('source = "a"\ntrust_remote_code = true', "pipelines.x.trust_remote_code: Extra inputs"),
        ('source = "a"\nprior = { source = "b", dtype = "float16" }', "x.prior.dtype: Extra"),
        ('source = "a"\ncontrolnets = [{ variant = "b" }]', "x.controlnets.0.source: Field requir"),
        ('source = "a"\ncontrolnets = "b"', "pipelines.x.controlnets: Input should be a valid li"),
        ('source = ""', "pipelines.x.source: String should have at least 1"),
        ('source = "a"\ndtype = "float64"', "pipelines.x.dtype: Input should be 'auto'"),
        ('source = "a"\nsafety_checker = "yes please"', "pipelines.x.safety_checker: Input"),
    ],
)
def test_unknown_and_wrong_keys_are_refused(
    bench: CheckpointSandbox, words: str, reason: str
) -> None:
    with pytest.raises(CatalogError) as caught:
        bench.entry(words)
    assert reason in clear(caught.value)


def test_an_empty_folder_is_no_checkpoint(bench: CheckpointSandbox) -> None:
    (bench.folder / "empty").mkdir()
    said = refused(bench, 'source = "empty"')
    assert "empty has no model_index.json, so it is not a diffusers checkpoint" in said


@pytest.mark.parametrize("source", ["./gone", "/models/gone", "a/b/c", "../gone", "two words"])
def test_a_folder_that_is_not_there_is_named(bench: CheckpointSandbox, source: str) -> None:
    said = refused(bench, f'source = "{source}"')
    assert f"There is no folder {source} next to the catalog, and the hub allows no such" in said
