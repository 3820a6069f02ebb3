"""Mutilated checkpoints: refused by component and file, or rendered as by bare diffusers.

test_refused_checkpoints.py tests the messages before loading.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from farm.errors import CatalogError
from tests.support.checkpoint_sandbox import CheckpointSandbox, clear
from tests.support.drawing import bare, picture

SMALL = 'source = "stable_diffusion"\ndefaults = { width = 64, height = 64 }'
UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
ENCODER = "text_encoder/model.safetensors"

pytestmark = [
    # diffusers' own samplers hand torch tensors to numpy.array,
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
    # and it adds values that an old configuration lacks.
    pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning"),
]

Change = Callable[[Path], None]
"""A change of a checkpoint's folder."""


@pytest.fixture
def bench(bench: CheckpointSandbox) -> CheckpointSandbox:
    bench.take("stable_diffusion")
    return bench


def weights(name: str, change: Callable[[dict[str, Any]], None]) -> Change:
    def do(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        found = load_file(folder / name)
        change(found)
        save_file(found, folder / name, metadata={"format": "pt"})

    return do


def without_weights(name: str, *keys: str) -> Change:
    def change(found: dict[str, Any]) -> None:
        for key in keys or sorted(found)[::2]:
            del found[key]

    return weights(name, change)


def renamed(name: str, key: str) -> Change:
    return weights(name, lambda found: found.update({f"old.{key}": found.pop(key)}))


def shaped(name: str, key: str) -> Change:
    return weights(name, lambda found: found.update({key: found[key][:-1].clone()}))


def typed(name: str, dtype: str) -> Change:
    def change(found: dict[str, Any]) -> None:
        import torch

        found.update({key: tensor.to(getattr(torch, dtype)) for key, tensor in found.items()})

    return weights(name, change)


def config(name: str, **values: Any) -> Change:
    """Change values of a JSON file. A value of `...` removes the key."""

    def do(folder: Path) -> None:
        known = json.loads((folder / name).read_text()) | values
        known = {key: value for key, value in known.items() if value is not ...}
        (folder / name).write_text(json.dumps(known))

    return do


def cut(name: str) -> Change:
    def do(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return do


def gone(name: str) -> Change:
    def do(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return do


def copied(source: str, name: str) -> Change:
    def do(folder: Path) -> None:
        shutil.copy(folder / source, folder / name)

    return do


KEYS = {
    UNET: "down_blocks.0.resnets.0.conv1.weight",
    VAE: "decoder.conv_in.weight",
    ENCODER: "encoder.layers.0.mlp.fc1.weight",
}
MUTILATED: dict[str, Change] = {
    **{f"{name}: a weight is gone": without_weights(name, key) for name, key in KEYS.items()},
    **{f"{name}: a weight has another name": renamed(name, key) for name, key in KEYS.items()},
    **{f"{name}: a weight has another shape": shaped(name, key) for name, key in KEYS.items()},
    **{f"{name}: half of the weights": without_weights(name) for name in KEYS},
    **{f"{name}: the file is cut": cut(name) for name in KEYS},
    **{f"{name}: the file is gone": gone(name) for name in KEYS},
    **{f"{name}: weights are of float16": typed(name, "float16") for name in KEYS},
    **{f"{name}: weights are of float64": typed(name, "float64") for name in KEYS},
    f"{UNET}: weights are whole numbers": typed(UNET, "int32"),
    f"{UNET}: the VAE's weights": copied(VAE, UNET),
    f"{VAE}: the text encoder's weights": copied(ENCODER, VAE),
    **{
        f"{name}: the file is {what}": do(name)
        for name in ("model_index.json", "unet/config.json", "vae/config.json")
        for what, do in (("cut", cut), ("gone", gone))
    },
    "text_encoder/config.json: the file is cut": cut("text_encoder/config.json"),
    "text_encoder/config.json: the file is gone": gone("text_encoder/config.json"),
    "scheduler/scheduler_config.json: the file is cut": cut("scheduler/scheduler_config.json"),
    "scheduler/scheduler_config.json: the file is gone": gone("scheduler/scheduler_config.json"),
    "tokenizer/tokenizer.json: the file is cut": cut("tokenizer/tokenizer.json"),
    "tokenizer/tokenizer_config.json: the file is gone": gone("tokenizer/tokenizer_config.json"),
    **{
        f"{name}: {key} is left out": config(name, **{key: ...})
        for name, keys in {
            "unet/config.json": ("sample_size", "act_fn", "cross_attention_dim", "norm_num_groups"),
            "vae/config.json": ("scaling_factor", "act_fn", "latent_channels"),
            "text_encoder/config.json": ("hidden_act", "num_attention_heads", "eos_token_id"),
            "scheduler/scheduler_config.json": ("beta_schedule", "steps_offset", "_class_name"),
            "model_index.json": ("unet", "vae", "scheduler", "safety_checker"),
        }.items()
        for key in keys
    },
    "unet/config.json: more layers": config("unet/config.json", layers_per_block=4),
    "vae/config.json: more layers": config("vae/config.json", layers_per_block=4),
    "text_encoder/config.json: more layers": config(
        "text_encoder/config.json", num_hidden_layers=9
    ),
    "text_encoder/config.json: fewer layers": config(
        "text_encoder/config.json", num_hidden_layers=1
    ),
    "model_index.json: another text encoder": config(
        "model_index.json", text_encoder=["transformers", "CLIPTextModelWithProjection"]
    ),
    "model_index.json: another VAE": config(
        "model_index.json", vae=["diffusers", "AutoencoderTiny"]
    ),
    **{
        f"model_index.json: the sampler {name}": config(
            "model_index.json", scheduler=["diffusers", name]
        )
        for name in ("EulerDiscreteScheduler", "DDIMParallelScheduler")
    },
}


@pytest.mark.parametrize("name", MUTILATED)
def test_it_is_refused_by_name_or_drawn_as_diffusers_draws(
    bench: CheckpointSandbox, name: str
) -> None:
    folder = bench.folder / "stable_diffusion"
    MUTILATED[name](folder)
    try:
        drawn = picture(bench, SMALL)
    except CatalogError as error:
        said = clear(error)
        path = Path(name.partition(":")[0])
        assert path.name in said
        assert path.parent.name in said
    else:
        assert (drawn == bare(folder)).all()
