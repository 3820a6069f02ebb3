"""Faults found only on loading: each is one clear line, and the process continues."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from farm.errors import CatalogError, OutOfMemory
from farm.pipelines.catalog import Pipeline
from farm.pipelines.checkpoints.weights import parameter_count
from farm.pipelines.family import LoadedPipeline
from farm.pipelines.resolve import resolve_pipeline
from farm.pipelines.runtime import loading
from farm.pipelines.runtime.devices import is_out_of_memory
from tests.support.checkpoint_sandbox import RUN, SAFE, CheckpointSandbox, clear

UNET = "stable_diffusion/unet/diffusion_pytorch_model"
INDEX = "stable_diffusion/model_index.json"
SD = 'source = "stable_diffusion"'


@pytest.fixture
def bench(bench: CheckpointSandbox) -> CheckpointSandbox:
    bench.take("stable_diffusion")
    return bench


def load(entry: Pipeline) -> LoadedPipeline:
    return resolve_pipeline("x", entry).family.load(entry)


def refused(bench: CheckpointSandbox, words: str = SD) -> str:
    """Check that loading an entry fails. Return the message."""
    entry = bench.entry(words)
    resolved = resolve_pipeline("x", entry)
    with pytest.raises(CatalogError) as caught:
        resolved.family.load(entry)
    assert not (bench.folder / RUN).exists()
    said = clear(caught.value)
    assert str(bench.folder) not in said, "tenants read this too"
    assert "=True" not in said, "nobody can pass that"
    return said


SPOILED: dict[str, tuple[Callable[[CheckpointSandbox], None], str]] = {
    "a UNet of other shapes": (
        lambda bench: bench.change(
            "stable_diffusion/unet/config.json", block_out_channels=[32, 32]
        ),
        r"weights do not have the shapes that its configuration states \(\S+ expected shape",
    ),
    "a VAE of other shapes": (
        lambda bench: bench.change("stable_diffusion/vae/config.json", block_out_channels=[32] * 4),
        "weights do not have the shapes that its configuration states",
    ),
    "a text encoder of other shapes": (
        lambda bench: bench.change("stable_diffusion/text_encoder/config.json", hidden_size=64),
        "weights do not have the shapes that its configuration states",
    ),
    "a component of no known class": (
        lambda bench: bench.change(INDEX, unet=["diffusers", "No"]),
        "`diffusers` has no class `No`",
    ),
    "a component of no form": (
        lambda bench: bench.change(INDEX, unet=["diffusers", 5]),
        "stable_diffusion cannot be loaded: ",
    ),
    "a component that is left out": (
        lambda bench: bench.change(INDEX, unet=[None, None]),
        "stable_diffusion cannot be loaded: ",
    ),
    "code where diffusers would look for it": (
        lambda bench: bench.write_code("stable_diffusion/None.py"),
        r"None\.py is custom code, which is never run",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_checkpoint_that_cannot_be_loaded_says_why(bench: CheckpointSandbox, case: str) -> None:
    spoil, reason = SPOILED[case]
    spoil(bench)
    assert re.search(reason, refused(bench))


def test_what_is_spoiled_between_offer_and_load_is_still_found(bench: CheckpointSandbox) -> None:
    entry = bench.entry(SD)
    resolved = resolve_pipeline("x", entry)
    bench.rename(UNET, ".bin")
    with pytest.raises(CatalogError, match="is a pickle"):
        resolved.family.load(entry)


def test_a_device_that_is_not_there(
    bench: CheckpointSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    entry = bench.entry(SD).model_copy(update={"device": "cuda"})
    entry.place(bench.folder)
    with pytest.raises(CatalogError, match="needs the device cuda, but torch finds no CUDA dev"):
        load(entry)


def first(module: Any) -> torch.Tensor:
    found: torch.Tensor = next(iter(module.parameters()))
    return found.clone()


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model", "text_encoder/model"])
def test_a_variant_that_some_components_have_is_taken_where_it_is(
    bench: CheckpointSandbox, name: str
) -> None:
    """diffusers does the same for a folder, and reports it only in its log."""
    plain = load(bench.entry(SD)).pipe
    folder = bench.folder / "stable_diffusion"
    weights = {key: 2 * tensor for key, tensor in load_file(folder / f"{name}{SAFE}").items()}
    save_file(weights, folder / f"{name}.fp16{SAFE}", metadata={"format": "pt"})
    varied = load(bench.entry(f'{SD}\nvariant = "fp16"')).pipe
    for component in ("unet", "text_encoder"):
        factor = 2 if name.startswith(component) else 1
        before, after = getattr(plain, component), getattr(varied, component)
        assert torch.equal(first(after), factor * first(before)), component
    assert torch.equal(first(load(bench.entry(SD)).pipe.unet), first(plain.unet))


def test_a_variant_without_plain_weights_must_be_asked_for(bench: CheckpointSandbox) -> None:
    """The other components of the checkpoint may be plain."""
    bench.rename(UNET, f".fp16{SAFE}")
    with pytest.raises(CatalogError, match=r"no weights as plain .*; set `variant` to fp16"):
        resolve_pipeline("x", bench.entry(SD))
    assert load(bench.entry(f'{SD}\nvariant = "fp16"')).pipe.unet is not None


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_weights_in_several_files_are_loaded(bench: CheckpointSandbox, variant: str | None) -> None:
    before = load(bench.entry(SD)).pipe
    shutil.rmtree(bench.folder / "stable_diffusion/unet")
    before.unet.save_pretrained(
        bench.folder / "stable_diffusion/unet", max_shard_size="200KB", variant=variant
    )
    files = [path.name for path in (bench.folder / "stable_diffusion/unet").glob(f"*{SAFE}")]
    assert len(files) > 1, files
    words = SD if variant is None else f'{SD}\nvariant = "{variant}"'
    after = load(bench.entry(words)).pipe
    assert torch.equal(first(after.unet), first(before.unet))
    folder = bench.folder / "stable_diffusion"
    assert parameter_count(folder, variant) == count(after)


def count(pipe: Any) -> int:
    """Count the numbers in a pipeline's loaded modules."""
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    return sum(tensor.numel() for module in modules for tensor in module.state_dict().values())


def test_only_what_is_loaded_counts_and_matters(bench: CheckpointSandbox) -> None:
    """A repository often holds the same weights a second time, in its root and as pickles."""
    folder = bench.folder / "stable_diffusion"
    before = parameter_count(folder, None)
    assert before == count(load(bench.entry(SD)).pipe)
    shutil.copy(bench.folder / f"{UNET}{SAFE}", folder / f"v1-5-pruned{SAFE}")
    shutil.copy(bench.folder / f"{UNET}{SAFE}", bench.folder / f"{UNET}.non_ema{SAFE}")
    (folder / "v1-5-pruned.ckpt").write_bytes(b"a pickle that nobody loads")
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(b"another")
    (folder / "onnx").mkdir()
    (folder / "onnx/weights.pt").write_bytes(b"and another")
    assert parameter_count(folder, None) == before
    assert load(bench.entry(SD)).pipe.unet is not None


def test_a_safety_checker_that_is_switched_off_need_not_be_there(bench: CheckpointSandbox) -> None:
    bench.take("stable_diffusion_guarded")
    words = 'source = "stable_diffusion_guarded"'
    shutil.rmtree(bench.folder / "stable_diffusion_guarded/safety_checker")
    with pytest.raises(CatalogError, match="its safety_checker is missing"):
        resolve_pipeline("x", bench.entry(words))
    pipe = load(bench.entry(f"{words}\nsafety_checker = false")).pipe
    assert pipe.safety_checker is None


def test_too_little_memory_is_said_before_anything_is_loaded(
    bench: CheckpointSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = bench.entry(SD)
    resolved = resolve_pipeline("x", entry)
    needed = 4 * parameter_count(bench.folder / "stable_diffusion", None)
    monkeypatch.setattr(loading, "free_memory", lambda _device: needed - 1)
    with pytest.raises(OutOfMemory) as caught:
        resolved.family.load(entry)
    said = clear(caught.value)
    assert re.search(r"stable_diffusion needs [\d.]+ GiB on cpu .* but [\d.]+ GiB are free", said)
    assert caught.value.retryable
    monkeypatch.setattr(loading, "free_memory", lambda _device: needed)
    assert resolved.family.load(entry).pipe.unet is not None


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (OSError(2, "No such file or directory"), False),
        (RuntimeError("shape mismatch"), False),
        (ValueError("memory"), False),
    ],
)
def test_out_of_memory_is_known_from_other_errors(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
    outer = OSError("Unable to load weights")
    outer.__cause__ = error
    assert is_out_of_memory(outer) is expected


ALLOCATING = """
import resource, sys
from pathlib import Path
from farm.pipelines.catalog import Pipeline
from farm.errors import OutOfMemory
from farm.pipelines.runtime.devices import prepare_torch
from farm.pipelines.resolve import resolve_pipeline

prepare_torch(1)
large, small = (Pipeline(source=name, device="cpu") for name in ("large", "stable_diffusion"))
for entry in (large, small):
    entry.place(Path(sys.argv[1]))
resolve_pipeline("small", small).family.load(small)  # so that all code is here
family = resolve_pipeline("large", large).family
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 8 * 2**20, resource.RLIM_INFINITY))
try:
    family.load(large)
except OutOfMemory as error:
    print(error.message)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(type(family.load(large).pipe).__name__)
"""


@pytest.mark.slow
def test_memory_that_runs_out_while_loading_is_said_and_survived(bench: CheckpointSandbox) -> None:
    """A limit on the process's own memory makes torch's allocation fail."""
    from tests.support import checkpoints

    unet = {**checkpoints.UNET, **checkpoints.UP, "block_out_channels": (192, 192)}
    large = checkpoints.stable_diffusion(unet=checkpoints._kit().UNet2DConditionModel(**unet))
    large.save_pretrained(bench.folder / "large")
    said, then = run_alone(ALLOCATING, str(bench.folder)).splitlines()
    assert said.startswith("Out of memory while loading large on cpu; ")
    assert then == "StableDiffusionPipeline"


def run_alone(words: str, *args: str, **env: str) -> str:
    """Run Python code in a separate process. Return its output."""
    done = subprocess.run(
        [sys.executable, "-c", words, *args],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


ASKING = """
import sys, time
from pathlib import Path
from farm.pipelines.catalog import Pipeline
from farm.errors import CatalogError
from farm.pipelines.checkpoints import hub
from farm.pipelines.resolve import resolve_pipeline

hub.HUB_SECONDS = float(sys.argv[2])
for source in sys.argv[3:]:
    entry = Pipeline(source=source, device="cpu")
    entry.place(Path(sys.argv[1]))
    started = time.monotonic()
    try:
        resolve_pipeline("x", entry).family.load(entry)
        print("loaded")
    except CatalogError as error:
        print(error.message)
    print(f"{time.monotonic() - started:.1f}")
"""


def cached(bench: CheckpointSandbox, home: Path, source: str) -> None:
    """Put a checkpoint into the hub's cache, like a download."""
    commit = "0123456789" * 4
    kept = home / "hub" / f"models--{source.replace('/', '--')}"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs/main").write_text(commit)
    shutil.copytree(bench.folder / "stable_diffusion", kept / "snapshots" / commit)


def test_a_hub_that_does_not_answer_holds_nobody_up_for_long(
    bench: CheckpointSandbox, tmp_path: Path
) -> None:
    """It accepts the connection and stays silent. The hub's own client would wait forever."""
    home = tmp_path / "home"
    cached(bench, home, "some-org/here")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        told = run_alone(
            ASKING,
            str(tmp_path),
            "1.0",
            "some-org/gone",
            "some-org/gone",
            "some-org/here",
            HF_HOME=str(home),
            HF_ENDPOINT=f"http://127.0.0.1:{silent.getsockname()[1]}",
        ).splitlines()
    first, again, here = told[0::2]
    assert first.endswith(
        "some-org/gone is not a folder next to the catalog, and fetching it from the hub failed: "
        "ReadTimeout: timed out"
    )
    assert again.endswith("The hub did not answer a moment ago.")
    assert here == "loaded"
    seconds = [float(number) for number in told[1::2]]
    assert 1.0 <= seconds[0] < 30.0
    assert seconds[1] < 1.0


@pytest.mark.parametrize(
    "env",
    [
        pytest.param({"HF_ENDPOINT": "http://127.0.0.1:1"}, marks=pytest.mark.slow),
        pytest.param({"HF_HUB_OFFLINE": "1"}, marks=pytest.mark.slow),
    ],
    ids=["unreachable", "offline"],
)
def test_without_a_hub_what_was_fetched_before_is_loaded(
    bench: CheckpointSandbox, tmp_path: Path, env: dict[str, str]
) -> None:
    home = tmp_path / "home"
    cached(bench, home, "some-org/here")
    told = run_alone(
        ASKING,
        str(tmp_path),
        "10",
        "some-org/here",
        "some-org/gone",
        HF_HOME=str(home),
        **env,
    ).splitlines()
    here, gone = told[0::2]
    assert here == "loaded"
    assert "is not a folder next to the catalog, and fetching it from the hub failed: " in gone
    assert "a moment ago" not in gone, "it answered at once, so it may be asked again"
    assert float(told[3]) < 5.0
