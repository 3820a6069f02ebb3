"""Tiny random checkpoints of every class, saved by save_pretrained. Their weights never change."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIDE = 64
"""Default width and height of a picture, in pixels."""
WIDTH = 16
"""Number of features of the smallest layers."""
VAE_BLOCKS = (16, 16, 16, 16)
"""Features of each block. Four blocks, because a ControlNet scales its pictures down by eight."""


def save(kind: str, folder: Path) -> Path:
    """Save a checkpoint. `kind` is a name of KINDS. Return the folder."""
    import torch

    torch.manual_seed(sum(kind.encode()))
    MAKERS[kind]().save_pretrained(folder)
    return folder


def _kit() -> Any:
    import diffusers

    return diffusers


def clip_tokenizer() -> Any:
    """Build a CLIP tokenizer of single bytes, which keeps the characters of any script apart."""
    from transformers import CLIPTokenizer

    kind: Any = CLIPTokenizer
    words = [*_byte_letters(), *(f"{letter}</w>" for letter in _byte_letters())]
    words += ["<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as name:
        vocabulary, merges = Path(name) / "vocab.json", Path(name) / "merges.txt"
        vocabulary.write_text(json.dumps({word: place for place, word in enumerate(words)}))
        merges.write_text("#version: 0.2\n")
        return kind(vocab=str(vocabulary), merges=str(merges), model_max_length=77)


def _byte_letters() -> list[str]:
    """Return the visible character that byte-level BPE writes for each of the 256 bytes."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return [*map(chr, shown), *(chr(256 + place) for place in range(len(hidden)))]


def _text_config(**changes: Any) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        **{
            "vocab_size": 514,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "max_position_embeddings": 77,
            "projection_dim": 32,
            "bos_token_id": 512,
            "eos_token_id": 513,
            "pad_token_id": 513,
            "initializer_range": 0.2,
            **changes,
        }
    )


def _vae(blocks: tuple[int, ...] = VAE_BLOCKS) -> Any:
    return _kit().AutoencoderKL(
        block_out_channels=blocks,
        down_block_types=("DownEncoderBlock2D",) * len(blocks),
        up_block_types=("UpDecoderBlock2D",) * len(blocks),
        norm_num_groups=4,
        sample_size=SIDE,
    )


UNET = {
    "block_out_channels": (WIDTH, WIDTH),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
UP = {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "sample_size": SIDE // 8}
SDXL_ADDITION = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "cross_attention_dim": 64,
    "projection_class_embeddings_input_dim": 8 * 6 + 32,
}
REFINER_ADDITION = {
    **SDXL_ADDITION,
    "cross_attention_dim": 32,
    "projection_class_embeddings_input_dim": 8 * 5 + 32,
}


def stable_diffusion(**changes: Any) -> Any:
    """Stable Diffusion 1.x, in its own layout."""
    from transformers import CLIPTextModel

    kit = _kit()
    parts = {
        "vae": _vae(),
        "text_encoder": CLIPTextModel(_text_config()),
        "tokenizer": clip_tokenizer(),
        "unet": kit.UNet2DConditionModel(**UNET, **UP),
        "scheduler": kit.PNDMScheduler(skip_prk_steps=True, steps_offset=1),
        "safety_checker": None,
        "feature_extractor": None,
        "image_encoder": None,
        "requires_safety_checker": False,
    }
    return kit.StableDiffusionPipeline(**{**parts, **changes})


def stable_diffusion_guarded() -> Any:
    """Stable Diffusion with a safety checker that flags about half of the pictures."""
    import torch
    from diffusers.pipelines.stable_diffusion.safety_checker import (
        StableDiffusionSafetyChecker,
    )
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPVisionConfig

    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=32,
        initializer_range=0.5,
    )
    config = CLIPConfig(vision_config=vision.to_dict(), projection_dim=32)
    checker: Any = StableDiffusionSafetyChecker(config)
    with torch.no_grad():
        checker.concept_embeds.normal_()
        checker.concept_embeds_weights.fill_(0.2785)
        checker.special_care_embeds_weights.fill_(2.0)
    processor: Any = CLIPImageProcessor
    return stable_diffusion(
        safety_checker=checker,
        feature_extractor=processor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ),
        requires_safety_checker=True,
    )


def sdxl(second_width: int = 32) -> Any:
    """SDXL's base. `second_width` is the number of features of its second text encoder."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    kit = _kit()
    both = {"cross_attention_dim": 32 + second_width}
    return kit.StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text_config()),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(hidden_size=second_width)),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=kit.UNet2DConditionModel(**{**UNET, **UP, **SDXL_ADDITION, **both}),
        scheduler=kit.EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def sdxl_refiner(width: int = 32) -> Any:
    """SDXL's refiner: the second text encoder only, with `width` features."""
    from transformers import CLIPTextModelWithProjection

    kit = _kit()
    return kit.StableDiffusionXLImg2ImgPipeline(
        vae=_vae(),
        text_encoder=None,
        text_encoder_2=CLIPTextModelWithProjection(_text_config(hidden_size=width)),
        tokenizer=None,
        tokenizer_2=clip_tokenizer(),
        unet=kit.UNet2DConditionModel(
            **{**UNET, **UP, **REFINER_ADDITION, "cross_attention_dim": width}
        ),
        scheduler=kit.EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


def controlnet(**addition: Any) -> Any:
    """A ControlNet as after training: its zero convolutions are not zero."""
    import torch

    net = _kit().ControlNetModel(
        **{**UNET, **addition}, conditioning_embedding_out_channels=(16, 16, 16, 16)
    )
    with torch.no_grad():
        for name, weights in net.named_parameters():
            if not weights.any() and "norm" not in name:
                weights.normal_(std=0.3)
    return net


def kandinsky22_decoder() -> Any:
    """Kandinsky 2.2's decoder."""
    kit = _kit()
    return kit.KandinskyV22Pipeline(
        unet=kit.UNet2DConditionModel(
            in_channels=4,
            out_channels=8,
            addition_embed_type="image",
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            block_out_channels=(WIDTH, WIDTH * 2),
            layers_per_block=1,
            encoder_hid_dim=32,
            encoder_hid_dim_type="image_proj",
            cross_attention_dim=16,
            attention_head_dim=4,
            resnet_time_scale_shift="scale_shift",
            norm_num_groups=4,
        ),
        scheduler=kit.DDPMScheduler(
            beta_schedule="linear",
            beta_start=0.00085,
            beta_end=0.012,
            clip_sample=False,
            variance_type="learned_range",
        ),
        movq=kit.VQModel(
            block_out_channels=(32, 32, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 3 + ("AttnDownEncoderBlock2D",),
            up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 3,
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=4,
            norm_type="spatial",
            num_vq_embeddings=12,
            vq_embed_dim=4,
        ),
    )


def kandinsky22_prior() -> Any:
    """Kandinsky 2.2's prior, with the spread of real embeddings. A fresh one returns only zeros."""
    import torch
    from transformers import (
        CLIPImageProcessor,
        CLIPTextModelWithProjection,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    kit = _kit()
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=32,
    )
    processor: Any = CLIPImageProcessor
    prior = kit.PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, embedding_dim=32, num_layers=1
    )
    with torch.no_grad():
        prior.clip_mean.normal_()
        prior.clip_std.fill_(2.0)
    return kit.KandinskyV22PriorPipeline(
        prior=prior,
        image_encoder=CLIPVisionModelWithProjection(vision),
        text_encoder=CLIPTextModelWithProjection(_text_config()),
        tokenizer=clip_tokenizer(),
        scheduler=kit.UnCLIPScheduler(
            variance_type="fixed_small_log",
            prediction_type="sample",
            num_train_timesteps=1000,
            clip_sample_range=10.0,
        ),
        image_processor=processor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ),
    )


def _t5() -> dict[str, Any]:
    """A T5 encoder and its tokenizer of single characters."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(chr(code), -3.0) for code in range(33, 127)]
    inner = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    fast: Any = PreTrainedTokenizerFast
    tokenizer = fast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    config = T5Config(
        vocab_size=len(pieces), d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4
    )
    encoder: Any = T5EncoderModel(config)
    with torch.no_grad():
        encoder.shared.weight.normal_(std=1.0)
    return {"tokenizer": tokenizer, "text_encoder": encoder}


def pixart_sigma() -> Any:
    """PixArt-Sigma: a transformer steered by T5."""
    kit = _kit()
    return kit.PixArtSigmaPipeline(
        **_t5(),
        vae=_vae(),
        transformer=kit.PixArtTransformer2DModel(
            sample_size=SIDE // 8,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            cross_attention_dim=16,
            caption_channels=32,
            in_channels=4,
            out_channels=8,
            use_additional_conditions=False,
        ),
        scheduler=kit.DPMSolverMultistepScheduler(),
    )


def flux() -> Any:
    """Flux: a flow-matching transformer steered by CLIP and T5."""
    from transformers import CLIPTextModel

    kit = _kit()
    t5 = _t5()
    return kit.FluxPipeline(
        scheduler=kit.FlowMatchEulerDiscreteScheduler(),
        vae=kit.AutoencoderKL(
            block_out_channels=VAE_BLOCKS,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=4,
            latent_channels=4,
            shift_factor=0.06,
            scaling_factor=1.5,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=CLIPTextModel(_text_config()),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5["text_encoder"],
        tokenizer_2=t5["tokenizer"],
        transformer=kit.FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
        ),
    )


def cogview4() -> Any:
    """CogView4. It pads prompts to the longest of the call, and the padding changes the picture."""
    from transformers import GlmConfig, GlmModel

    kit = _kit()
    config = GlmConfig(
        vocab_size=200,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        eos_token_id=1,
        initializer_range=0.3,
    )
    return kit.CogView4Pipeline(
        tokenizer=_t5()["tokenizer"],
        text_encoder=GlmModel(config),
        vae=_vae(),
        transformer=kit.CogView4Transformer2DModel(
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            out_channels=4,
            text_embed_dim=32,
            time_embed_dim=8,
            condition_dim=4,
            sample_size=SIDE // 8,
        ),
        scheduler=kit.FlowMatchEulerDiscreteScheduler(),
    )


def least_stable_diffusion() -> Any:
    """Stable Diffusion with the fewest kinds of layers: compiling takes a second for each kind."""
    one_block = {"block_out_channels": (WIDTH,), "sample_size": SIDE // 8}
    types = {
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
    }
    unet = _kit().UNet2DConditionModel(**{**UNET, **one_block, **types})
    return stable_diffusion(unet=unet, vae=_vae((WIDTH,)))


MAKERS: dict[str, Callable[[], Any]] = {
    "cogview4": cogview4,
    "stable_diffusion": stable_diffusion,
    "stable_diffusion_guarded": stable_diffusion_guarded,
    "stable_diffusion_least": least_stable_diffusion,
    "sdxl": sdxl,
    "sdxl_refiner": sdxl_refiner,
    # diffusers finds the two text encoders of one file by their widths, which differ as in SDXL.
    "sdxl_two_widths": lambda: sdxl(second_width=64),
    "sdxl_refiner_two_widths": lambda: sdxl_refiner(width=64),
    "controlnet": controlnet,
    "controlnet_b": controlnet,
    "controlnet_sdxl": lambda: controlnet(**SDXL_ADDITION),
    "controlnet_sdxl_b": lambda: controlnet(**SDXL_ADDITION),
    "kandinsky22_decoder": kandinsky22_decoder,
    "kandinsky22_prior": kandinsky22_prior,
    "pixart_sigma": pixart_sigma,
    "flux": flux,
}
