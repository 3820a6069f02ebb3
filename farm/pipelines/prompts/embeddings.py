"""Prompts to embeddings for the pipelines that read CLIP, each text encoded once.

A text encoder's bits depend on the shape of its batch, like a UNet's. So plain prompts are encoded
in the batch that a diffusers call would make of them, filled up where some are known already; and
a remembered embedding has the very bits that encoding again would give.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cachetools import LRUCache

from farm.errors import RenderError
from farm.pipelines.runtime.devices import is_out_of_memory

if TYPE_CHECKING:
    import torch

REMEMBERED_BYTES = 64 * 2**20
FIRST, SECOND = "text_encoder", "text_encoder_2"
UNREADABLE = (RuntimeError, AssertionError, ValueError, IndexError, AttributeError, TypeError)
"""What Compel raises where it cannot follow a prompt"""


@dataclass(frozen=True)
class Embeds:
    """What a text encoder makes of one text."""

    tokens: torch.Tensor
    """(1, tokens, features)"""
    pooled: torch.Tensor | None
    """(1, features); None where the pipeline takes none"""

    @property
    def size(self) -> int:
        """Bytes of memory."""
        return sum(tensor.nbytes for tensor in (self.tokens, self.pooled) if tensor is not None)


@dataclass(frozen=True)
class Reading:
    """How the prompts of a batch are to be read."""

    syntax: str
    """plain or compel"""
    clip_skip: int | None
    """the text encoder's last layers that are left out"""
    bucket: int
    """prompts in the diffusers call"""


class PromptEncoder:
    """The text encoders of one pinned pipeline."""

    def __init__(self, pipe: Any, remembered_bytes: int = REMEMBERED_BYTES) -> None:
        """Encode with `pipe`'s own text encoders.

        Args:
            pipe: Stable Diffusion's, SDXL's or its refiner's, or one of their ControlNets'.
            remembered_bytes: memory that remembered embeddings may take.
        """
        self._pipe = pipe
        self._known: LRUCache[tuple[object, ...], Embeds] = LRUCache(
            remembered_bytes, getsizeof=lambda embeds: embeds.size
        )
        self._compels: dict[tuple[int | None, int], dict[str, Any]] = {}

    def arguments(
        self, prompts: Sequence[str], negatives: Sequence[str | None] | None, reading: Reading
    ) -> list[dict[str, torch.Tensor]]:
        """Encode prompts, each with its negative prompt, as a diffusers call takes them.

        Args:
            prompts: one for each frame.
            negatives: one for each frame; None for all where guidance is off.
            reading: how to read them.

        Returns:
            For each frame `prompt_embeds` and, where the call takes them,
            `negative_prompt_embeds`, `pooled_prompt_embeds` and `negative_pooled_prompt_embeds`,
            each with a first dimension of 1. Positive and negative ones are equally long.
        """
        import torch

        with torch.no_grad():
            positive = self._encode(prompts, reading)
            if negatives is None:
                return [_arguments(embeds, None) for embeds in positive]
            negative = self._negative(negatives, positive, reading)
            pairs = zip(positive, negative, strict=True)
            return [_arguments(*self._equally_long(*pair, reading)) for pair in pairs]

    def _negative(
        self, texts: Sequence[str | None], positive: Sequence[Embeds], reading: Reading
    ) -> Iterator[Embeds]:
        """Encode negative prompts; None is zeros where the pipeline says so, else empty.

        diffusers leaves clip_skip out for them, Compel does not.
        """
        if reading.syntax == "plain":
            reading = replace(reading, clip_skip=None)
        zeros = getattr(self._pipe.config, "force_zeros_for_empty_prompt", False)
        found = self._encode([text or "" for text in texts], reading)
        for text, embeds, beside in zip(texts, found, positive, strict=True):
            yield _zeros_like(beside) if text is None and zeros else embeds

    def _encode(self, texts: Sequence[str], reading: Reading) -> list[Embeds]:
        keys = {text: (text, *_decisive(reading)) for text in texts}
        found = {text: self._known.get(key) for text, key in keys.items()}
        missing = [text for text, embeds in found.items() if embeds is None]
        for text, fresh in self._encoded(missing, reading):
            found[text] = fresh
            with suppress(ValueError):  # larger than all that may be remembered
                self._known[keys[text]] = fresh
        return [embeds for text in texts if (embeds := found[text]) is not None]

    def _encoded(self, texts: Sequence[str], reading: Reading) -> Iterator[tuple[str, Embeds]]:
        if reading.syntax == "compel":
            for text in texts:
                yield text, self._weighted(text, reading)
            return
        for start in range(0, len(texts), reading.bucket):
            some = texts[start : start + reading.bucket]
            filled = [*some, *[some[-1]] * (reading.bucket - len(some))]
            yield from zip(some, self._plain(filled, reading), strict=False)

    def _plain(self, texts: list[str], reading: Reading) -> list[Embeds]:
        tokens, _, *pooled = self._pipe.encode_prompt(
            prompt=texts,
            device=self._pipe._execution_device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
            clip_skip=reading.clip_skip,
        )
        return [
            Embeds(
                tokens[index : index + 1].clone(),
                pooled[0][index : index + 1].clone() if pooled else None,
            )
            for index in range(len(texts))
        ]

    def _weighted(self, text: str, reading: Reading) -> Embeds:
        """Encode one text as Compel's own CompelForSD and CompelForSDXL do."""
        import torch

        encoded = []
        pooled = None
        try:
            for name, compel in self._compel(reading.clip_skip).items():
                encoded.append(compel([text]))
                if name == SECOND:  # not by Compel's own call, which fails at weights of parts
                    provider = compel.conditioning_provider
                    pooled = provider.get_pooled_embeddings([text], device=compel.device)
        except UNREADABLE as error:
            if is_out_of_memory(error):
                raise
            raise RenderError(f"Compel cannot weigh this prompt: {error}") from error
        longest = max(tokens.shape[1] for tokens in encoded)
        empty = self._empty(reading.clip_skip)
        filled = [_filled(*pair, longest) for pair in zip(encoded, empty, strict=True)]
        return Embeds(torch.cat(filled, dim=-1), pooled)

    def _compel(self, clip_skip: int | None) -> dict[str, Any]:
        """Compel for each text encoder, in the order in which their features stand."""
        import torch
        from compel import Compel, ReturnedEmbeddingsType

        known = clip_skip, torch.get_num_threads()  # it encodes an empty text when it is made
        if known in self._compels:
            return self._compels[known]
        pipe = self._pipe
        names = [name for name in (FIRST, SECOND) if getattr(pipe, name, None) is not None]
        if hasattr(pipe, SECOND):
            kind = ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED
        elif clip_skip:
            kind = ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NORMALIZED
        else:
            kind = ReturnedEmbeddingsType.LAST_HIDDEN_STATES_NORMALIZED
        self._compels[known] = {
            name: Compel(
                tokenizer=getattr(pipe, name.replace("text_encoder", "tokenizer")),
                text_encoder=getattr(pipe, name),
                returned_embeddings_type=kind,
                truncate_long_prompts=False,
                device=pipe._execution_device,
            )
            for name in names
        }
        return self._compels[known]

    def _empty(self, clip_skip: int | None) -> list[torch.Tensor]:
        """What fills up a text that is shorter, for each text encoder: an empty one."""
        empty = [
            compel.conditioning_provider.empty_z for compel in self._compel(clip_skip).values()
        ]
        return [tokens if tokens.ndim == 3 else tokens.unsqueeze(0) for tokens in empty]

    def _equally_long(
        self, positive: Embeds, negative: Embeds, reading: Reading
    ) -> tuple[Embeds, Embeds]:
        import torch

        lengths = {positive.tokens.shape[1], negative.tokens.shape[1]}
        if len(lengths) == 1:
            return positive, negative
        empty = torch.cat(self._empty(reading.clip_skip), dim=-1)
        first, second = (
            Embeds(_filled(embeds.tokens, empty, max(lengths)), embeds.pooled)
            for embeds in (positive, negative)
        )
        return first, second


def _decisive(reading: Reading) -> tuple[object, ...]:
    """What beside its text decides an embedding's bits: Compel encodes each text alone."""
    import torch

    bucket = 1 if reading.syntax == "compel" else reading.bucket
    return reading.syntax, reading.clip_skip, bucket, torch.get_num_threads()


def _zeros_like(embeds: Embeds) -> Embeds:
    import torch

    pooled = embeds.pooled
    return Embeds(
        torch.zeros_like(embeds.tokens), None if pooled is None else torch.zeros_like(pooled)
    )


def _filled(tokens: torch.Tensor, empty: torch.Tensor, length: int) -> torch.Tensor:
    import torch

    while tokens.shape[1] < length:
        tokens = torch.cat([tokens, empty.to(tokens)], dim=1)
    return tokens


def _arguments(positive: Embeds, negative: Embeds | None) -> dict[str, torch.Tensor]:
    found = {
        "prompt_embeds": positive.tokens,
        "pooled_prompt_embeds": positive.pooled,
        "negative_prompt_embeds": negative.tokens if negative else None,
        "negative_pooled_prompt_embeds": negative.pooled if negative else None,
    }
    return {name: tensor for name, tensor in found.items() if tensor is not None}
