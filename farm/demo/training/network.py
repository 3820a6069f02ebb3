"""Build the parts of the demo model, and write them in Stable Diffusion's layout."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from farm.demo.training import pictures

LATENT_CHANNELS = 4
LATENT_SIZE = 16
"""Side of a latent: a 64x64 picture becomes a 4x16x16 latent."""

TEXT_WIDTH = 128
TEXT_LAYERS = 2
TEXT_LENGTH = 16
"""Tokens per caption, including start and end. Longer captions are cut."""

START, END = "<|startoftext|>", "<|endoftext|>"

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""Pattern by which CLIP's tokenizer splits text into words."""


classes: Any = diffusers
"""The diffusers library, untyped: its constructors have no types."""


@dataclass
class Parts:
    """The trainable parts of the pipeline and its tokenizer."""

    vae: diffusers.AutoencoderKL
    unet: diffusers.UNet2DConditionModel
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer


def parameter_count(module: torch.nn.Module) -> int:
    """Count the parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def build_tokenizer() -> CLIPTokenizer:
    """Build a CLIP tokenizer in which each word of the captions is one token.

    Its alphabet has all 256 bytes, so any other text becomes bytes.
    """
    captions = [
        pictures.caption(combo, template)
        for combo in pictures.all_combos()
        for template in range(len(pictures.TEMPLATES))
    ]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
    )
    bpe.train_from_iterator(captions, trainer)
    return _as_clip(bpe, alphabet)


def _as_clip(bpe: Tokenizer, alphabet: list[str]) -> CLIPTokenizer:
    """Renumber a trained BPE in CLIP's order: alphabet, word ends, merges, markers."""
    with tempfile.TemporaryDirectory() as folder:
        bpe.model.save(folder)
        lines = Path(folder, "merges.txt").read_text(encoding="utf-8").splitlines()
    # The tokenizer wants pairs, though its annotation says strings.
    merges: list[Any] = [
        tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")
    ]
    tokens = alphabet + [letter + "</w>" for letter in alphabet]
    tokens += ["".join(pair) for pair in merges] + [START, END]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        model_max_length=TEXT_LENGTH,
    )


def build_vae() -> diffusers.AutoencoderKL:
    """Build the autoencoder: 64x64 RGB in [-1, 1] to 4x16x16 latents and back."""
    vae = classes.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        # Few groups: a group keeps the relative strength of its channels, on which pictures of
        # plain colours depend.
        norm_num_groups=1,
        mid_block_add_attention=False,
        sample_size=pictures.SIZE,
    )
    with torch.no_grad():
        # Start with little noise in the latents: with more, learning begins after many steps.
        vae.quant_conv.bias[LATENT_CHANNELS:] = -6.0
    return vae


def build_unet() -> diffusers.UNet2DConditionModel:
    """Build the denoiser of 4x16x16 latents. It attends to the caption at 8x8 and 4x4."""
    return classes.UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(48, 96, 128),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Build the text encoder: 16 token numbers to 16 vectors of 128."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_scheduler() -> diffusers.DDIMScheduler:
    """Build the noise schedule: 1000 steps, v-prediction, nearly pure noise at the last one."""
    return classes.DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.02,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def build_parts() -> Parts:
    """Build every part, initialised from torch's current seed."""
    tokenizer = build_tokenizer()
    text_encoder = build_text_encoder(tokenizer)
    return Parts(build_vae(), build_unet(), text_encoder, tokenizer)


def save_pipeline(parts: Parts, folder: Path) -> None:
    """Write the parts to `folder` as fp16 safetensors in Stable Diffusion's layout.

    The files are written next to it first, and then moved into place one by one. So a reader
    never sees an incomplete file. The parts themselves are not changed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".model-", dir=folder.parent))
    try:
        _half_pipeline(parts).save_pretrained(staging, safe_serialization=True)
        _load_as_float32(staging / "text_encoder" / "config.json")
        for source in sorted(path for path in staging.rglob("*") if path.is_file()):
            target = folder / source.relative_to(staging)
            target.parent.mkdir(parents=True, exist_ok=True)
            source.chmod(0o644)
            source.replace(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _load_as_float32(config: Path) -> None:
    """Make transformers load the fp16 file as float32, as diffusers does with the others."""
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings["dtype"] = "float32"
    config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _half_pipeline(parts: Parts) -> diffusers.StableDiffusionPipeline:
    """Build a pipeline of fp16 copies of the parts."""
    vae, unet = build_vae(), build_unet()
    text_encoder = build_text_encoder(parts.tokenizer)
    vae.register_to_config(scaling_factor=parts.vae.config.scaling_factor)
    vae.load_state_dict(parts.vae.state_dict())
    unet.load_state_dict(parts.unet.state_dict())
    text_encoder.load_state_dict(parts.text_encoder.state_dict())
    return classes.StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=text_encoder.half(),
        tokenizer=build_tokenizer(),
        unet=unet.half(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
