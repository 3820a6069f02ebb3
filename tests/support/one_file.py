"""Checkpoints in one file, written from the folders of tiny ones in the layout of Stable Diffusion.

diffusers only reads this layout. This is the reverse of its names for the UNet, the VAE and the
text encoders. The file also has tensors that no class uses, as published files do.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP = {False: "cond_stage_model.transformer.", True: "conditioner.embedders.0.transformer."}
"""Prefix of the first text encoder, by whether it is SDXL's."""
OPEN_CLIP = {False: "conditioner.embedders.0.model.", True: "conditioner.embedders.1.model."}
"""Prefix of the second text encoder, by whether there is a first one."""
OPEN_CLIP_2 = "cond_stage_model.model."
"""Prefix of the text encoder of Stable Diffusion 2."""

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
OUTSIDE_BLOCKS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
Tensors = dict[str, Any]


def write_one_file(folder: Path, path: Path, *, with_open_clip: bool = False) -> Path:
    """Write the weights of a folder with Stable Diffusion or SDXL into one file. Return it.

    Args:
        folder: the checkpoint.
        path: the file.
        with_open_clip: name the text encoder's tensors as Stable Diffusion 2 does.
    """
    from safetensors.torch import save_file

    found = one_file_tensors(folder, with_open_clip=with_open_clip)
    tensors = {name: tensor.clone() for name, tensor in found.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def write_configuration(folder: Path, place: Path) -> Path:
    """Copy a checkpoint's folder without its weights. Return the copy."""
    return shutil.copytree(folder, place, ignore=shutil.ignore_patterns("*.safetensors"))


def one_file_tensors(folder: Path, *, with_open_clip: bool) -> Tensors:
    """Return the tensors of a folder by their names in one file."""
    import torch

    index = json.loads((folder / "model_index.json").read_text())
    of_sdxl = "text_encoder_2" in index
    has_first = (folder / "text_encoder").is_dir()
    tensors: Tensors = {"alphas_cumprod": torch.ones(4), "model_ema.decay": torch.ones(())}
    config = json.loads((folder / "unet/config.json").read_text())
    for name, tensor in _loaded(folder / "unet"):
        tensors[UNET + unet_name(name, config)] = tensor
    blocks = len(json.loads((folder / "vae/config.json").read_text())["block_out_channels"])
    for name, tensor in _loaded(folder / "vae"):
        of_attention = ".attentions." in name and tensor.ndim == 2
        tensors[VAE + vae_name(name, blocks)] = tensor[..., None, None] if of_attention else tensor
    if with_open_clip:
        named = {f"text_model.{name}": tensor for name, tensor in _loaded(folder / "text_encoder")}
        tensors |= {f"{OPEN_CLIP_2}{name}": tensor for name, tensor in open_clip_tensors(named)}
    elif has_first:
        prefix = f"{CLIP[of_sdxl]}text_model."
        for name, tensor in _loaded(folder / "text_encoder"):
            tensors[prefix + name.removeprefix("text_model.")] = tensor
        tensors[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]
    if of_sdxl:
        prefix = OPEN_CLIP[has_first]
        found = dict(_loaded(folder / "text_encoder_2"))
        tensors |= {prefix + name: tensor for name, tensor in open_clip_tensors(found)}
    return tensors


def _loaded(place: Path) -> Iterator[tuple[str, Any]]:
    from safetensors.torch import load_file

    [path] = place.glob("*.safetensors")
    yield from load_file(path).items()


def unet_name(name: str, config: Mapping[str, Any]) -> str:
    """Return the name of a UNet's tensor in one file, from its name in diffusers."""
    part, ending = name.rsplit(".", 1)
    if part in OUTSIDE_BLOCKS:
        return f"{OUTSIDE_BLOCKS[part]}.{ending}"
    if found := re.fullmatch(r"mid_block\.(\w+\.\d)\.(.*)", name):
        return f"middle_block.{MIDDLE[found[1]]}.{_inside(found[1], found[2])}"
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name)
    assert found is not None, name
    way, block, kind, place, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
    layers = config["layers_per_block"]
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * (layers + 1)}.0.{rest.replace('conv', 'op')}"
    if kind == "upsamplers":  # behind the last resnet, and behind its attention if it has one
        behind = 2 if "Attn" in config["up_block_types"][block] else 1
        return f"output_blocks.{block * (layers + 1) + layers}.{behind}.{rest}"
    number = block * (layers + 1) + place + (way == "down")
    blocks = "input_blocks" if way == "down" else "output_blocks"
    return f"{blocks}.{number}.{int(kind == 'attentions')}.{_inside(kind, rest)}"


def _inside(kind: str, rest: str) -> str:
    if not kind.startswith("resnets"):
        return rest
    layer, ending = rest.rsplit(".", 1)
    return f"{RESNET[layer]}.{ending}"


def vae_name(name: str, blocks: int) -> str:
    """Return the name of a VAE's tensor in one file. `blocks` is the number of its blocks."""
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda at: f"mid.block_{int(at[1]) + 1}", name)
    if found := re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.*)\.(\w+)", name):
        return f"{found[1]}.mid.attn_1.{VAE_ATTENTION[found[2]]}.{found[3]}"
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)

    def from_the_end(at: re.Match[str]) -> str:
        return f"up.{blocks - 1 - int(at[1])}.{'block' if at[2] == 'resnets' else 'upsample'}"

    return re.sub(r"up_blocks\.(\d+)\.(resnets|upsamplers\.0)", from_the_end, name)


def open_clip_tensors(found: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the tensors of a text encoder by their names in OpenCLIP."""
    import torch

    plain = {
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
    }
    for name, tensor in found.items():
        if name == "text_projection.weight":
            yield "text_projection", tensor.T.contiguous()
        elif name in plain:
            yield plain[name], tensor
        elif ".self_attn.q_proj." in name:
            three = [found[name.replace("q_proj", kind)] for kind in ("q_proj", "k_proj", "v_proj")]
            at = re.search(r"layers\.(\d+)\.self_attn\.q_proj\.(\w+)$", name)
            assert at is not None, name
            yield f"transformer.resblocks.{at[1]}.attn.in_proj_{at[2]}", torch.cat(three)
        elif not re.search(r"\.self_attn\.[kv]_proj\.", name):
            at = re.search(r"layers\.(\d+)\.(.*)\.(\w+)$", name)
            assert at is not None, name
            inside = OPEN_CLIP_LAYER[at[2]]
            yield f"transformer.resblocks.{at[1]}.{inside}.{at[3]}", tensor
