"""Train the demo model from scratch, and write it in Stable Diffusion's layout.

Run from the root of the repository:

    python -m farm.demo.training.train                      # weights like the shipped ones
    python -m farm.demo.training.train --minutes 15         # a shorter run
    python -m farm.demo.training.train --steps 10000        # a longer one, for crisper shapes

First the autoencoder learns to rebuild the pictures. Then the text encoder learns to distinguish
the words of a caption. Then the text encoder and the denoiser learn together. The state is saved in
farm/demo/training/.state, from which an interrupted run continues.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from farm.demo.training import network, pictures

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

STATE = Path(__file__).parent / ".state"
"""Default folder of the state files; git ignores it."""

MODEL = Path(__file__).parents[1] / "model"
"""Default folder of the checkpoint: the one that ships."""

TOP_RATE = 1e-3
"""Highest learning rate of the joint training."""

LATENT_NOISE = 0.05
"""Noise added to latents while the autoencoder learns, as a fraction of their standard deviation.
It keeps small errors of the denoiser invisible in the pictures."""


@dataclass(frozen=True)
class Run:
    """Settings of a run: device, seed, and folder of the state files."""

    device: torch.device
    seed: int
    state: Path

    def autocast(self) -> torch.autocast:
        """Return a context with bfloat16 where safe: twice as fast on CPUs or GPUs that have it."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def learning_rate(progress: float, top: float, warm: float = 0.03) -> float:
    """Return the rate: a warm-up to `top` over the first `warm` of the run, then a cosine to 2%."""
    if progress < warm:
        return top * (0.02 + 0.98 * progress / warm)
    share = (progress - warm) / (1 - warm)
    return top * (0.02 + 0.98 * 0.5 * (1 + float(np.cos(np.pi * share))))


def as_tensor(images: list[np.ndarray]) -> Tensor:
    """Convert RGB pictures (0 to 255) to one tensor [count, 3, 64, 64] in [-1, 1]."""
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
    return (stacked / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def picture_batch(count: int, rng: random.Random) -> tuple[Tensor, list[pictures.Combo]]:
    """Draw `count` pictures of trained combinations. The tensor is as in as_tensor."""
    combos = rng.choices(pictures.trained_combos(), k=count)
    images = [np.asarray(pictures.draw(combo, rng)) for combo in combos]
    return as_tensor(images), combos


def edges(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the differences of neighbouring pixels, across and down."""
    return images[..., :, 1:] - images[..., :, :-1], images[..., 1:, :] - images[..., :-1, :]


def vae_loss(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of rebuilding the pictures, and its plain L1 part (in [-1, 1] units)."""
    posterior = vae.encode(images).latent_dist
    latents = posterior.sample()
    noise = LATENT_NOISE * latents.detach().std() * torch.randn_like(latents)
    rebuilt = vae.decode(latents + noise).sample.float()
    plain = functional.l1_loss(rebuilt, images)
    pairs = zip(edges(rebuilt), edges(images), strict=True)
    sharp = sum((functional.l1_loss(got, want) for got, want in pairs), plain.new_zeros(()))
    spread = posterior.kl().mean() / (network.LATENT_CHANNELS * network.LATENT_SIZE**2)
    return plain + sharp + 1e-5 * spread, plain


def train_vae(run: Run, vae: AutoencoderKL, steps: int, batch: int = 16) -> None:
    """Train the autoencoder, or load it if a state file has the finished one."""
    path = run.state / "vae.pt"
    vae.to(run.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    first = load_state(path, vae, optimizer)
    rng = pictures.dice(run.seed, "vae", first)
    torch.manual_seed(run.seed + first)
    started = time.monotonic()
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step / steps, 2e-3)
        images, _ = picture_batch(batch, rng)
        with run.autocast():
            loss, plain = vae_loss(vae, images.to(run.device))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            spent = (time.monotonic() - started) / (step + 1 - first)
            print(f"vae {step + 1}/{steps} l1 {plain.item():.4f} {spent:.3f} s/step", flush=True)
        if (step + 1) % 200 == 0 or step + 1 == steps:
            save_state(path, vae, optimizer, step + 1)


@torch.no_grad()
def centre_latents(run: Run, vae: AutoencoderKL, count: int = 1024) -> None:
    """Move the latents' means into the autoencoder, and set its scaling_factor.

    The pipeline has only one factor. So the mean and standard deviation of each channel go into
    the convolutions on both sides of the latents. The latents then have mean 0 and deviation 1.
    """
    images, _ = picture_batch(count, pictures.dice(run.seed, "centre"))
    latents = encode(run, vae, images)
    mean, spread = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    before, after = vae.quant_conv, vae.post_quant_conv
    channels = network.LATENT_CHANNELS
    after.bias += (after.weight[:, :, 0, 0] * mean).sum(1)
    after.weight *= spread[None, :, None, None]
    before.weight[:channels] /= spread[:, None, None, None]
    before.bias[:channels] = (before.bias[:channels] - mean) / spread
    before.bias[channels:] -= 2 * spread.log()
    measured = encode(run, vae, images).std().item()
    vae.register_to_config(scaling_factor=round(1 / measured, 5))


@torch.no_grad()
def encode(run: Run, vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Encode a tensor of pictures to latents [count, 4, 16, 16]: posterior means, unscaled."""
    chunks = torch.split(images, 64)
    return torch.cat([vae.encode(chunk.to(run.device)).latent_dist.mean for chunk in chunks])


def latent_set(run: Run, vae: AutoencoderKL, count: int) -> tuple[Tensor, Tensor]:
    """Return scaled latents [count, 4, 16, 16] of drawn pictures, and their combinations.

    A combination is an index in pictures.trained_combos().
    """
    rng = pictures.dice(run.seed, "latents")
    number = {combo: index for index, combo in enumerate(pictures.trained_combos())}
    latents: list[Tensor] = []
    labels: list[int] = []
    for _ in range(count // 1024):
        images, combos = picture_batch(1024, rng)
        latents.append(encode(run, vae, images) * vae.config.scaling_factor)
        labels.extend(number[combo] for combo in combos)
        print(f"encoded {len(labels)}/{count}", flush=True)
    return torch.cat(latents), torch.tensor(labels, device=run.device)


class Learner(torch.nn.Module):
    """The parts that learn together, with heads that classify the content of a caption.

    The heads are used only in training. They make the text encoder distinguish shape, colour and
    ground early. With only the denoiser, this would take long.
    """

    def __init__(self, parts: network.Parts) -> None:
        super().__init__()
        self.unet = parts.unet
        self.text_encoder = parts.text_encoder
        sizes = (len(pictures.SHAPES), len(pictures.COLOURS), len(pictures.COLOURS))
        self.heads = torch.nn.ModuleList(
            torch.nn.Linear(network.TEXT_WIDTH, size) for size in sizes
        )

    def read(self, tokens: Tensor) -> Tensor:
        """Compute text vectors [batch, 16, 128] of token numbers [batch, 16]."""
        vectors: Tensor = self.text_encoder(tokens).last_hidden_state
        return vectors

    def naming_loss(self, vectors: Tensor, named: Tensor) -> Tensor:
        """Return the loss of the heads, from the vectors after the words.

        `named` [batch, 3] has the right indices, or -100 if the caption leaves it open.
        """
        tail = vectors[:, -4:].mean(1).float()
        losses = [
            functional.cross_entropy(head(tail), named[:, index])
            for index, head in enumerate(self.heads)
        ]
        return torch.stack(losses).mean()


class Captions:
    """Token numbers of every trained combination's captions, in all forms."""

    def __init__(self, run: Run, parts: network.Parts) -> None:
        forms = range(len(pictures.TEMPLATES))
        combos = pictures.trained_combos()
        texts = [pictures.caption(combo, form) for combo in combos for form in forms]
        self.tokens = self._tokens(run, parts, texts).view(len(combos), len(forms), -1)
        self.empty = self._tokens(run, parts, [""])[0]
        self.shares = torch.tensor([share for _, share in pictures.TEMPLATES], device=run.device)
        colours = list(pictures.COLOURS)
        rows = [
            (pictures.SHAPES.index(shape), colours.index(colour), colours.index(ground))
            for shape, colour, ground in combos
        ]
        self.names = torch.tensor(rows, device=run.device)
        open_forms = ["{ground}" not in text for text, _ in pictures.TEMPLATES]
        self.open_ground = torch.tensor(open_forms, device=run.device)

    @staticmethod
    def _tokens(run: Run, parts: network.Parts, texts: list[str]) -> Tensor:
        """Tokenize texts to [count, 16], padded as the pipeline pads them."""
        numbers = parts.tokenizer(texts, padding="max_length", truncation=True)["input_ids"]
        return torch.tensor(numbers, device=run.device)

    def sample(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Draw a caption for each label: tokens [batch, 16] and its right indices [batch, 3]."""
        forms = torch.multinomial(self.shares, len(labels), replacement=True)
        named = self.names[labels].clone()
        named[:, 2][self.open_ground[forms]] = -100
        return self.tokens[labels, forms], named


def warm_text(learner: Learner, captions: Captions, steps: int = 500) -> None:
    """Train the text encoder to name shape, colour and ground before the joint training."""
    weights = [*learner.text_encoder.parameters(), *learner.heads.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    device = captions.tokens.device
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step / steps, 1e-3)
        labels = torch.randint(len(captions.tokens), (128,), device=device)
        tokens, named = captions.sample(labels)
        loss = learner.naming_loss(learner.read(tokens), named)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"text {step + 1}/{steps} loss {loss.item():.4f}", flush=True)


@dataclass(frozen=True)
class Noise:
    """The noise schedule as tensors over the 1000 training steps."""

    signal: Tensor
    spread: Tensor

    @classmethod
    def of(cls, run: Run) -> Noise:
        """Return the saved scheduler's schedule, on the run's device."""
        kept = network.build_scheduler().alphas_cumprod.to(run.device)
        return cls(kept.sqrt(), (1 - kept).sqrt())

    def times(self, batch: int) -> Tensor:
        """Spread training steps evenly over the batch, with somewhat more noisy ones.

        Shape and colours are decided while the picture is still nearly all noise.
        """
        device = self.signal.device
        even = (torch.arange(batch, device=device) + torch.rand(batch, device=device)) / batch
        return (even**0.75 * len(self.signal)).long().clamp(max=len(self.signal) - 1)

    def mix(self, latents: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """Return noised latents, and the velocity that the denoiser must predict from them."""
        signal, spread = self.signal[times, None, None, None], self.spread[times, None, None, None]
        noise = torch.randn_like(latents)
        return signal * latents + spread * noise, signal * noise - spread * latents

    def weight(self, times: Tensor) -> Tensor:
        """Return the weight of each step's loss: 1 for noisy ones, less if the SNR is over 5."""
        ratio = (self.signal[times] / self.spread[times]) ** 2
        return 5 / (5 + ratio)


def joint_loss(
    learner: Learner, noise: Noise, latents: Tensor, tokens: Tensor, named: Tensor, empty: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the loss of text encoder and denoiser, and its denoising part.

    One caption in ten is emptied, which classifier-free guidance requires.
    """
    times = noise.times(len(latents))
    noisy, velocity = noise.mix(latents, times)
    dropped = torch.rand(len(latents), device=latents.device) < 0.1
    tokens = torch.where(dropped[:, None], empty, tokens)
    named = named.masked_fill(dropped[:, None], -100)
    vectors = learner.read(tokens)
    guess = learner.unet(noisy, times, vectors).sample.float()
    each = (guess - velocity).square().mean((1, 2, 3))
    denoising = (noise.weight(times) * each).mean()
    return denoising + 0.02 * learner.naming_loss(vectors, named), denoising


@torch.no_grad()
def follow(average: Learner, learner: Learner, step: int) -> None:
    """Move the running average of the weights (decay up to 0.999) towards the weights."""
    share = 1 - min(0.999, (1 + step) / (10 + step))
    pairs = zip(average.parameters(), learner.parameters(), strict=True)
    for kept, new in pairs:
        kept.lerp_(new, share)


@dataclass
class Joint:
    """The joint training of text encoder and denoiser, with its progress."""

    run: Run
    parts: network.Parts
    learner: Learner
    average: Learner
    optimizer: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0

    @classmethod
    def start(cls, run: Run, parts: network.Parts) -> Joint:
        """Start from the state file if there is one, else from the beginning."""
        learner = Learner(parts).to(run.device)
        learner.unet.to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(
            learner.parameters(), lr=TOP_RATE, betas=(0.9, 0.99), weight_decay=0.01
        )
        joint = cls(run, parts, learner, copy.deepcopy(learner), optimizer)
        path = run.state / "joint.pt"
        if path.exists():
            joint._restore(torch.load(path, map_location="cpu", weights_only=True))
        return joint

    def _restore(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state["learner"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]

    def save(self, output: Path) -> None:
        """Write the state file, and the averaged weights as a pipeline to `output`."""
        state = {
            "learner": self.learner.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        write_state(self.run.state / "joint.pt", state)
        network.save_pipeline(
            network.Parts(
                vae=self.parts.vae,
                unet=self.average.unet,
                text_encoder=self.average.text_encoder,
                tokenizer=self.parts.tokenizer,
            ),
            output,
        )

    def update(self, loss: Tensor, rate: float) -> None:
        """Make one optimizer step with the given learning rate, and update the average."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.learner.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        follow(self.average, self.learner, self.step)


def batches(labels: Tensor, batch: int) -> Iterator[Tensor]:
    """Yield indices of pictures in shuffled order, `batch` at a time, without end."""
    while True:
        order = torch.randperm(len(labels), device=labels.device)
        for chunk in torch.split(order, batch):
            if len(chunk) == batch:
                yield chunk


def train_joint(joint: Joint, options: argparse.Namespace) -> None:
    """Train text encoder and denoiser until the steps, or the minutes, are used up."""
    run, learner = joint.run, joint.learner
    torch.manual_seed(run.seed + joint.step)
    captions, noise = Captions(run, joint.parts), Noise.of(run)
    latents, labels = latent_set(run, joint.parts.vae, options.pictures)
    latents = latents.contiguous(memory_format=torch.channels_last)
    if joint.step == 0:
        warm_text(learner, captions)
        joint.average.load_state_dict(learner.state_dict())
    mark, saved, shown = time.monotonic(), joint.seconds, 0.0
    for chosen in batches(labels, options.batch):
        progress = progress_of(joint, options)
        if progress >= 1:
            break
        tokens, named = captions.sample(labels[chosen])
        with run.autocast():
            loss, part = joint_loss(learner, noise, latents[chosen], tokens, named, captions.empty)
        joint.update(loss, learning_rate(progress, TOP_RATE))
        joint.seconds += time.monotonic() - mark
        mark = time.monotonic()
        shown = part.item() if shown == 0.0 else 0.98 * shown + 0.02 * part.item()
        if joint.step % 50 == 0:
            pace = f"{joint.seconds / joint.step:.3f} s/step"
            print(f"joint {joint.step} {progress:.1%} loss {shown:.4f} {pace}", flush=True)
        if joint.seconds - saved > 60 * options.save_every:
            joint.save(options.output)
            saved = joint.seconds
    joint.save(options.output)


def progress_of(joint: Joint, options: argparse.Namespace) -> float:
    """Return the completed share of the joint training, by minutes if given, else by steps."""
    if options.minutes is not None:
        return float(joint.seconds / (60 * options.minutes))
    return float(joint.step / options.steps)


def save_state(
    path: Path, module: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int
) -> None:
    """Write a module, its optimizer and the number of steps done, atomically."""
    state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    write_state(path, state)


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write a state file atomically: an interrupted run keeps the previous one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".new")
    torch.save(state, scratch)
    scratch.replace(path)


def load_state(path: Path, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restore a file of save_state. Return the number of steps done, 0 without a file."""
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    module.load_state_dict(state["module"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--steps", type=int, default=2963, help="joint training steps")
    parser.add_argument(
        "--minutes", type=float, help="length of the joint training in minutes, instead of --steps"
    )
    parser.add_argument("--vae-steps", type=int, default=4500, help="autoencoder training steps")
    parser.add_argument("--batch", type=int, default=48, help="pictures in a joint training step")
    parser.add_argument(
        "--pictures", type=int, default=32768, help="number of pictures to learn from"
    )
    parser.add_argument("--save-every", type=float, default=10, help="minutes between saves")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=MODEL, help="folder of the checkpoint")
    parser.add_argument("--state", type=Path, default=STATE, help="folder of the state files")
    return parser.parse_args(arguments)


def main() -> None:
    """Train every part in turn, and write the checkpoint."""
    options = parse()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    run = Run(torch.device(options.device), options.seed, options.state)
    parts = network.build_parts()
    train_vae(run, parts.vae, options.vae_steps)
    parts.vae.requires_grad_(False).eval()
    centre_latents(run, parts.vae)
    train_joint(Joint.start(run, parts), options)


if __name__ == "__main__":
    main()
