"""Random checkpoints of the real models' sizes, from their configurations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.checkpoints import clip_tokenizer, stable_diffusion


@dataclass(frozen=True)
class Size:
    """A model's size, and the batches that are measured."""

    name: str
    side: int
    """Width and height of a picture, in pixels."""
    buckets: tuple[int, ...]
    make: Callable[[], Any]


def save(size: Size, folder: Path) -> Path:
    """Save a checkpoint of a size. Return the folder."""
    import torch

    torch.manual_seed(0)
    size.make().save_pretrained(folder)
    return folder


def _kit() -> Any:
    import diffusers

    return diffusers


def _text(**config: Any) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=49408,
        max_position_embeddings=77,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
        **config,
    )


def _vae(**config: Any) -> Any:
    return _kit().AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        **config,
    )


def sd15() -> Any:
    """Build a pipeline configured as stable-diffusion-v1-5."""
    from transformers import CLIPTextModel

    kit = _kit()
    text = _text(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    return kit.StableDiffusionPipeline(
        vae=_vae(sample_size=512),
        text_encoder=CLIPTextModel(text),
        tokenizer=clip_tokenizer(),
        unet=kit.UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
        scheduler=kit.PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            set_alpha_to_one=False,
            skip_prk_steps=True,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> Any:
    """Build a pipeline configured as stable-diffusion-xl-base-1.0."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    kit = _kit()
    text = _text(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    text_2 = _text(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=20,
        projection_dim=1280,
    )
    return kit.StableDiffusionXLPipeline(
        vae=_vae(sample_size=1024, scaling_factor=0.13025, force_upcast=True),
        text_encoder=CLIPTextModel(text),
        text_encoder_2=CLIPTextModelWithProjection(text_2),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=kit.UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
        scheduler=kit.EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        add_watermarker=False,
    )


SIZES = {
    "sd15": Size("sd15", 512, (1, 4), sd15),
    "sdxl": Size("sdxl", 1024, (1, 2), sdxl),
    "tiny": Size("tiny", 64, (1, 4), stable_diffusion),
}
"""Sizes by name. `tiny` is for testing the script itself, on any device."""
