"""Embeddings of prompts, for the pipelines with CLIP. Each text is encoded once.

The bits of a text encoder's output depend on the shape of its batch, like those of a UNet. So
plain prompts are encoded in the batch of a diffusers call, filled up if some are known already.
A remembered embedding has exactly the bits that encoding again would have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cachetools import LRUCache

from farm.errors import RenderError
from farm.pipelines.runtime.devices import is_out_of_memory

if TYPE_CHECKING:
    import torch
    from compel import Compel
    from diffusers import DiffusionPipeline

REMEMBERED_BYTES = 64 * 2**20
"""Memory for remembered embeddings, per encoder. Bytes."""
FIRST, SECOND = "text_encoder", "text_encoder_2"
UNREADABLE = (RuntimeError, AssertionError, ValueError, IndexError, AttributeError, TypeError)
"""Errors that Compel raises for a prompt that it cannot read."""


@dataclass(frozen=True)
class Embeds:
    """Embeddings of one text."""

    tokens: torch.Tensor
    """Shape (1, tokens, features)."""
    pooled: torch.Tensor | None
    """Shape (1, features). None if the pipeline takes none."""

    @property
    def size(self) -> int:
        """Memory that it takes. Bytes."""
        return sum(tensor.nbytes for tensor in (self.tokens, self.pooled) if tensor is not None)


@dataclass(frozen=True)
class Reading:
    """Options for reading the prompts of a batch."""

    syntax: str
    """Syntax of the prompts: plain or compel."""
    clip_skip: int | None
    """Number of the text encoder's last layers that are left out."""
    bucket: int
    """Number of prompts in the diffusers call."""


class PromptEncoder:
    """The text encoders of one pinned pipeline."""

    def __init__(self, pipe: DiffusionPipeline, remembered_bytes: int = REMEMBERED_BYTES) -> None:
        """Encode with `pipe`'s own text encoders.

        Args:
            pipe: pipeline of Stable Diffusion, SDXL or its refiner, or one with ControlNets.
            remembered_bytes: memory for remembered embeddings.
        """
        self._pipe = pipe
        self._known: LRUCache[tuple[object, ...], Embeds] = LRUCache(
            remembered_bytes, getsizeof=lambda embeds: embeds.size
        )
        self._compels: dict[tuple[int | None, int], dict[str, Compel]] = {}

    def arguments(
        self, prompts: Sequence[str], negatives: Sequence[str | None] | None, reading: Reading
    ) -> list[dict[str, torch.Tensor]]:
        """Encode prompts, each with its negative prompt, to arguments of a diffusers call.

        Args:
            prompts: one for each frame.
            negatives: one for each frame; None if guidance is off.
            reading: how to read them.

        Returns:
            For each frame `prompt_embeds` and, if the call takes them,
            `negative_prompt_embeds`, `pooled_prompt_embeds` and `negative_pooled_prompt_embeds`,
            each with a first dimension of 1. Positive and negative ones have equal lengths.
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
        """Encode negative prompts. None is zeros if the pipeline's config says so, else empty.

        diffusers ignores clip_skip for them, Compel does not.
        """
        if reading.syntax == "plain":
            reading = replace(reading, clip_skip=None)
        zeros = getattr(self._pipe.config, "force_zeros_for_empty_prompt", False)
        found = self._encode([text or "" for text in texts], reading)
        for text, embeds, opposite in zip(texts, found, positive, strict=True):
            yield _zeros_like(opposite) if text is None and zeros else embeds

    def _encode(self, texts: Sequence[str], reading: Reading) -> list[Embeds]:
        keys = {text: (text, *_decisive(reading)) for text in texts}
        found = {text: self._known.get(key) for text, key in keys.items()}
        missing = [text for text, embeds in found.items() if embeds is None]
        for text, fresh in self._encoded(missing, reading):
            found[text] = fresh
            with suppress(ValueError):  # larger than the whole cache
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
        """Encode one text like Compel's own CompelForSD and CompelForSDXL."""
        import torch

        encoded = []
        pooled = None
        try:
            for name, compel in self._compel(reading.clip_skip).items():
                encoded.append(compel([text]))
                if name == SECOND:  # Compel's own call fails if parts have weights
                    provider = compel.conditioning_provider
                    pooled = provider.get_pooled_embeddings([text], device=compel.device)
        except UNREADABLE as error:
            if is_out_of_memory(error):
                raise
            raise RenderError(f"Compel cannot encode this prompt: {error}") from error
        longest = max(tokens.shape[1] for tokens in encoded)
        empty = self._empty(reading.clip_skip)
        filled = [_filled(*pair, longest) for pair in zip(encoded, empty, strict=True)]
        return Embeds(torch.cat(filled, dim=-1), pooled)

    def _compel(self, clip_skip: int | None) -> dict[str, Compel]:
        """Return a Compel for each text encoder, in the order of their features."""
        import torch
        from compel import Compel, ReturnedEmbeddingsType

        known = clip_skip, torch.get_num_threads()  # Compel encodes an empty text when built
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
        """Return an empty text's embedding for each text encoder, to fill up shorter texts."""
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
    """Return all that decides an embedding's bits, except its text. Compel encodes texts singly."""
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
