"""Checkpoints in one file: the pixels of the folder, and damaged ones refused in one line."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from farm.context import Farm
from farm.domain.spec import FrameSpec
from farm.errors import CatalogError
from farm.imaging.encoding import encode
from farm.imaging.provenance import Provenance
from farm.pipelines.catalog import load_catalog
from farm.pipelines.checkpoints.weights import parameter_count
from farm.pipelines.family import Batch, LoadedPipeline
from farm.pipelines.resolve import resolve_pipeline
from farm.pipelines.runtime.devices import device_name, torch_threads
from farm.rendering import replay
from farm.rendering.environment import library_versions
from tests.integration.test_child import hire, reopened, worker
from tests.integration.test_failed_loads import run_alone
from tests.support.api_server import serving
from tests.support.checkpoint_sandbox import RUN, CheckpointSandbox, clear
from tests.support.cli_runner import farm as run_farm
from tests.support.drawing import bare, picture
from tests.support.one_file import UNET, VAE, write_configuration, write_one_file

# diffusers' own samplers hand torch tensors to numpy.array.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

SD, XL, REFINER = "stable_diffusion", "sdxl_two_widths", "sdxl_refiner_two_widths"
CLASSES = {
    SD: "StableDiffusionPipeline",
    XL: "StableDiffusionXLPipeline",
    REFINER: "StableDiffusionXLImg2ImgPipeline",
}
FILE = "dream.safetensors"


def entry_of(kind: str) -> str:
    """Return the lines of an entry whose source is one file."""
    return f'source = "{kind}.safetensors"\nconfig = "{kind}_config"'


def take(bench: CheckpointSandbox, *kinds: str) -> None:
    """Write checkpoints as folders, as one file, and their configurations as folders."""
    bench.take(*kinds)
    for kind in kinds:
        folder = bench.folder / kind
        write_one_file(folder, bench.folder / f"{kind}.safetensors")
        write_configuration(folder, bench.folder / f"{kind}_config")


def from_single_file(bench: CheckpointSandbox, kind: str) -> Any:
    """Load one file by bare diffusers."""
    import diffusers

    path, config = (str(bench.folder / f"{kind}{end}") for end in (".safetensors", "_config"))
    loader = getattr(diffusers, CLASSES[kind])
    return loader.from_single_file(path, config=config, local_files_only=True)


def load(bench: CheckpointSandbox, words: str) -> LoadedPipeline:
    resolved = resolve_pipeline("x", bench.entry(words))
    return resolved.family.load(resolved.pipeline)


@pytest.mark.parametrize("kind", CLASSES)
def test_plain_diffusers_reads_the_weights_of_the_folder(
    bench: CheckpointSandbox, kind: str
) -> None:
    """Otherwise the files of these tests would not be in the layout of published ones."""
    import diffusers
    import torch

    take(bench, kind)
    whole = getattr(diffusers, CLASSES[kind]).from_pretrained(bench.folder / kind)
    one = from_single_file(bench, kind)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if getattr(whole, name, None) is None:
            continue
        expected, found = (getattr(pipe, name).state_dict() for pipe in (whole, one))
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected), name


@pytest.mark.parametrize("kind", [SD, XL])
def test_a_file_gives_the_pixels_of_its_folder_and_of_diffusers(
    bench: CheckpointSandbox, kind: str
) -> None:
    take(bench, kind)
    ours = picture(bench, entry_of(kind))
    assert ours.std() > 1.0, "flat pictures prove nothing"
    assert (ours == picture(bench, f'source = "{kind}"')).all()
    assert (ours == bare(bench.folder / kind)).all()
    assert (ours == bare(from_single_file(bench, kind))).all()


def test_a_text_encoder_may_have_the_names_of_stable_diffusion_2(bench: CheckpointSandbox) -> None:
    take(bench, SD)
    write_one_file(bench.folder / SD, bench.folder / f"{SD}.safetensors", with_open_clip=True)
    assert (picture(bench, entry_of(SD)) == bare(bench.folder / SD)).all()


@pytest.mark.parametrize("more", ["", 'family = "auto"', 'dtype = "float16"'])
def test_options_of_an_entry_apply_to_one_file(bench: CheckpointSandbox, more: str) -> None:
    take(bench, SD)
    ours = picture(bench, f"{entry_of(SD)}\n{more}")
    assert (ours == picture(bench, f'source = "{SD}"\n{more}')).all()


def test_the_base_of_a_control_net_may_be_one_file(bench: CheckpointSandbox) -> None:
    take(bench, SD)
    bench.take("controlnet")
    nets = 'controlnets = ["controlnet"]'
    one, whole = (
        load(bench, f"{words}\n{nets}").pipe for words in (entry_of(SD), f'source = "{SD}"')
    )
    assert type(one).__name__ == type(whole).__name__ == "StableDiffusionControlNetPipeline"
    assert same_weights(one, whole)


def same_weights(one: Any, other: Any) -> bool:
    import torch

    models = [name for name, part in one.components.items() if isinstance(part, torch.nn.Module)]
    assert models
    return all(
        torch.equal(tensor, getattr(other, name).state_dict()[key])
        for name in models
        for key, tensor in getattr(one, name).state_dict().items()
    )


def test_base_and_refiner_may_each_be_one_file(bench: CheckpointSandbox) -> None:
    take(bench, XL, REFINER)
    part = f'refiner = {{ source = "{REFINER}.safetensors", config = "{REFINER}_config" }}'
    ours = picture(bench, f"{entry_of(XL)}\n{part}", steps=4)
    assert (ours == picture(bench, f'source = "{XL}"\nrefiner = "{REFINER}"', steps=4)).all()


def test_a_control_net_in_one_file_is_refused(bench: CheckpointSandbox) -> None:
    take(bench, SD)
    bench.take("controlnet")
    net = 'controlnets = [{ source = "stable_diffusion.safetensors", config = "controlnet" }]'
    said = refused(bench, f'source = "{SD}"\n{net}')
    assert "config controlnet is a ControlNetModel. One file can be a StableDiffusionPip" in said


LOAD = """
import sys
from pathlib import Path
from farm.pipelines.catalog import load_catalog
from farm.pipelines.resolve import resolve_pipeline

resolved = resolve_pipeline("x", load_catalog(Path(sys.argv[1])).pipelines["x"])
print(resolved.family.load(resolved.pipeline).weights)
"""


def test_a_configuration_is_found_in_the_hub_s_cache_without_a_network(
    bench: CheckpointSandbox, tmp_path: Path
) -> None:
    take(bench, SD)
    cache, commit = tmp_path / "home/hub/models--some-org--config", "0123456789" * 4
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text(commit)
    (bench.folder / f"{SD}_config").rename(bench.folder / "config")
    shutil.copytree(bench.folder / "config", cache / "snapshots" / commit)
    bench.write_catalog(x=f'source = "{SD}.safetensors"\nconfig = "some-org/config"')
    offline = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    named = run_alone(LOAD, str(bench.catalog), **offline)
    assert named == run_alone(LOAD, str(bench.catalog), **offline), "the commit names it"
    assert re.fullmatch("[0-9a-f]{64}\n", named)


def test_memory_is_counted_from_the_header_as_for_a_folder(bench: CheckpointSandbox) -> None:
    take(bench, SD)
    in_file = parameter_count(bench.folder / f"{SD}.safetensors", None)
    extra = 4 + 77  # of the sampler's table, and the places of tokens
    assert in_file == parameter_count(bench.folder / SD, None) + extra


def test_a_picture_from_one_file_replays_to_the_same_bytes(bench: CheckpointSandbox) -> None:
    take(bench, SD)
    bench.write_catalog(x=entry_of(SD))
    catalog = load_catalog(bench.catalog)
    resolved = resolve_pipeline("x", catalog.pipelines["x"])
    params = resolved.params({"steps": 2, "width": 64, "height": 64}).model_dump()
    frame = FrameSpec(pipeline="x", prompt="a red star", seed=31, bucket=1, params=params)
    with torch_threads(1):
        loaded = resolved.family.load(resolved.pipeline)
        [drawn] = resolved.family.denoise(loaded, Batch([frame]))
        assert drawn is not None
        provenance = Provenance(
            frame=frame,
            weights=loaded.weights,
            device=device_name("cpu"),
            dtype=loaded.dtype,
            threads=1,
            versions=library_versions(),
        )
        content = encode(drawn, provenance)
        again = replay.replay(content, catalog)
        assert (again.identical, again.notes) == (True, [])
        assert encode(again.fresh, again.now) == content


def weights_name(bench: CheckpointSandbox, words: str) -> str:
    return load(bench, words).weights


def test_provenance_names_the_content_of_file_and_configuration(bench: CheckpointSandbox) -> None:
    take(bench, SD)
    first = weights_name(bench, entry_of(SD))
    (bench.folder / f"{SD}_config/unet/diffusion_pytorch_model.safetensors").write_bytes(b"unused")
    (bench.folder / f"{SD}.safetensors").rename(bench.folder / FILE)
    renamed = f'source = "{FILE}"\nconfig = "{SD}_config"'
    assert weights_name(bench, renamed) == first, "neither its name nor unused weights count"
    bench.change(f"{SD}_config/scheduler/scheduler_config.json", beta_end=0.013)
    second = weights_name(bench, renamed)
    change(bench, FILE, lambda found: found[f"{UNET}out.2.bias"].add_(1))
    third = weights_name(bench, renamed)
    assert len({first, second, third}) == 3


def change(
    bench: CheckpointSandbox, name: str, do: Callable[[dict[str, Any]], Any], **metadata: str
) -> None:
    """Change the tensors of a file."""
    from safetensors.torch import load_file, save_file

    found = load_file(bench.folder / name)
    do(found)
    save_file({key: found[key].clone() for key in found}, bench.folder / name, metadata=metadata)


def without(prefix: str) -> Callable[[CheckpointSandbox], None]:
    """Return a damage that leaves out the tensors with this beginning."""

    def damage(bench: CheckpointSandbox) -> None:
        def leave_out(found: dict[str, Any]) -> None:
            for key in [key for key in found if key.startswith(prefix)]:
                del found[key]

        change(bench, FILE, leave_out)

    return damage


def with_header(change_header: Callable[[dict[str, Any]], Any]) -> Callable[..., None]:
    """Return a damage that changes the header, and leaves the bytes of the tensors."""
    import json

    def damage(bench: CheckpointSandbox) -> None:
        content = (bench.folder / FILE).read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        change_header(header)
        text = json.dumps(header).encode()
        bench.write(FILE, len(text).to_bytes(8, "little") + text + content[8 + length :])

    return damage


def written(content: bytes) -> Callable[[CheckpointSandbox], None]:
    return lambda bench: bench.write(FILE, content)


def pickled(bench: CheckpointSandbox) -> None:
    import torch

    torch.save({"state_dict": {}}, bench.folder / FILE)


def as_folder(bench: CheckpointSandbox) -> None:
    (bench.folder / FILE).unlink()
    (bench.folder / FILE).mkdir()


def lora(bench: CheckpointSandbox) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"lora_unet_mid_block.lora_up.weight": torch.ones(2, 2)}, bench.folder / FILE)


def of_sdxl(bench: CheckpointSandbox) -> None:
    bench.take(XL)
    write_one_file(bench.folder / XL, bench.folder / FILE)


def one_component(bench: CheckpointSandbox) -> None:
    name = f"{SD}/unet/diffusion_pytorch_model.safetensors"
    shutil.copy(bench.folder / name, bench.folder / FILE)


def shorter(key: str) -> Callable[[CheckpointSandbox], None]:
    return lambda bench: change(bench, FILE, lambda found: found.update({key: found[key][:-1]}))


FIRST = f"{UNET}input_blocks.0.0.weight"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4265380512\n"
MUTILATED: dict[str, tuple[Callable[[CheckpointSandbox], object], str]] = {
    "cut in half": (
        lambda bench: bench.cut(FILE, 0.5),
        r"dream\.safetensors cannot be loaded: it has \d+ bytes instead of \d+\. Replace the file",
    ),
    "cut within the header": (
        lambda bench: bench.cut(FILE, 0.001),
        "cannot be loaded: it does not begin like a safetensors file, or is cut off. Replace",
    ),
    "empty": (written(b""), r"dream\.safetensors cannot be loaded: it is empty\. Replace"),
    "a wrong length of the header": (
        lambda bench: bench.write(FILE, b"\xff" * 8 + (bench.folder / FILE).read_bytes()[8:]),
        "it does not begin like a safetensors file",
    ),
    "a header that is no JSON": (
        written((4).to_bytes(8, "little") + b"{{{{"),
        "cannot be loaded: Expecting property name",
    ),
    "a renamed pickle": (pickled, "it is a pickle, which can run any code. Only safetensors are"),
    "an old pickle": (written(b"\x80\x02}q\x00." * 9), "it is a pickle, which can run any code"),
    "a web page": (written(b"<!DOCTYPE html><title>Sign in</title>"), "it is a web page. Download"),
    "a pointer of Git LFS": (written(POINTER), "it is a pointer of Git LFS. Fetch the file itself"),
    "a GGUF file": (written(b"GGUF" + b"\3" * 90), "it is a GGUF file. Only safetensors are load"),
    "tensors that overlap": (
        with_header(lambda header: header[FIRST].update(data_offsets=[0, 2304])),
        r"\S+ begins at byte \d+ instead of \d+",
    ),
    "a tensor beyond the end": (
        with_header(lambda header: header[FIRST].update(data_offsets=[10**9, 10**9 + 2304])),
        r"begins at byte \d+ instead of \d+",
    ),
    "a tensor without bytes": (
        with_header(lambda header: header[FIRST].update(shape=[16, 4, 3, 4])),
        r"input_blocks\.0\.0\.weight has 2304 bytes, unlike its shape",
    ),
    "an unknown type of numbers": (
        with_header(lambda header: header[FIRST].update(dtype="F12")),
        r"input_blocks\.0\.0\.weight has the unknown type 'F12'",
    ),
    "offsets of another form": (
        with_header(lambda header: header[FIRST].update(data_offsets=["a", "b"])),
        "its header is not that of safetensors",
    ),
    "no UNet": (
        without(UNET),
        r"has no unet: no tensor begins with model\.diffusion_model\.; its first is .*Set `source`",
    ),
    "no VAE": (without(VAE), "has no vae: no tensor begins with first_stage_model"),
    "no text encoder": (
        without("cond_stage_model."),
        "has no text_encoder: no tensor begins with cond_stage_model",
    ),
    "only one component": (
        one_component,
        r"has no unet and no vae and no text_encoder: .* its first is conv_in\.bias",
    ),
    "no tensors": (
        written((2).to_bytes(8, "little") + b"{}"),
        "has no unet and no vae and no text_encoder: no tensor begins with model.diffusion_model",
    ),
    "only a LoRA": (lora, "has only a LoRA, which the farm does not load. Set `source` to a whole"),
    "a file of SDXL": (
        of_sdxl,
        r"dream\.safetensors does not fit config stable_diffusion_config: model\.diffusion_model\."
        r"\S+attn2\.to_k\.weight has the shape \d+x96, and unet/config\.json means anyx32",
    ),
    "a UNet for inpainting": (
        lambda bench: change(
            bench, FILE, lambda found: found.update({FIRST: found[FIRST].repeat(1, 2, 1, 1)})
        ),
        "has the shape 16x8x3x3, and unet/config.json means 16x4x3x3",
    ),
    "a VAE of another width": (
        shorter(f"{VAE}decoder.conv_in.weight"),
        "has the shape 15x4x3x3, and vae/config.json means 16x4x3x3",
    ),
    "a text encoder of other words": (
        shorter("cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"),
        "has the shape 513x32, and text_encoder/config.json means 514x32",
    ),
    "a folder of that name": (as_folder, "`config` is for a source that is one .safetensors file"),
    "gone": (
        lambda bench: (bench.folder / FILE).unlink(),
        r"There is no file dream\.safetensors next to the catalog. Set `source` to a file that",
    ),
    "another ending": (
        lambda bench: (bench.folder / FILE).rename(bench.folder / "dream.ckpt"),
        r"dream\.ckpt: the name of such a file must end in \.safetensors. Rename it",
    ),
}
DREAM = f'source = "{FILE}"\nconfig = "{SD}_config"'


def dream(bench: CheckpointSandbox) -> None:
    take(bench, SD)
    (bench.folder / f"{SD}.safetensors").rename(bench.folder / FILE)


def refused(bench: CheckpointSandbox, words: str = DREAM) -> str:
    entry = bench.entry(words)
    with pytest.raises(CatalogError) as caught:
        resolve_pipeline("x", entry)
    assert not (bench.folder / RUN).exists()
    said = clear(caught.value)
    assert str(bench.folder) not in said, "tenants read this too"
    return said


def words_of(case: str) -> str:
    return DREAM.replace(FILE, "dream.ckpt") if case == "another ending" else DREAM


@pytest.mark.parametrize("case", MUTILATED)
def test_a_mutilated_file_is_refused_before_it_is_loaded(
    bench: CheckpointSandbox, case: str
) -> None:
    damage, reason = MUTILATED[case]
    dream(bench)
    resolve_pipeline("x", bench.entry(DREAM))
    damage(bench)
    assert re.search(reason, refused(bench, words_of(case)))


@pytest.mark.parametrize("case", MUTILATED)
def test_a_worker_finds_what_was_mutilated_since(bench: CheckpointSandbox, case: str) -> None:
    dream(bench)
    resolved = resolve_pipeline("x", bench.entry(DREAM))
    MUTILATED[case][0](bench)
    with pytest.raises(CatalogError) as caught:
        resolved.family.load(resolved.pipeline)
    clear(caught.value)


@pytest.mark.parametrize("case", ["cut in half", "a renamed pickle", "no VAE", "a file of SDXL"])
def test_api_and_worker_say_why_the_pipeline_cannot_be_used(
    farm: Farm, bench: CheckpointSandbox, case: str
) -> None:
    damage, reason = MUTILATED[case]
    dream(bench)
    bench.write_catalog(bad=words_of(case), good=f'source = "{SD}"')
    damage(bench)
    farm.settings.pipelines = bench.catalog
    with serving(farm) as api:
        client = api.client()
        bad, good = client.get("/v1/pipelines").json()["data"]
        assert re.search(reason, bad["problem"])
        assert (bad["parameters"], good["problem"]) == (None, None)
        answer = client.post("/v1/jobs", json={"pipeline": "bad", "prompts": ["a red star"]})
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "catalog_error")
    with reopened(farm) as started:
        hire(started, "bad").start()
    assert worker(farm) == ("failed", bad["problem"])


def test_doctor_refuses_a_mutilated_file_and_accepts_a_whole_one(bench: CheckpointSandbox) -> None:
    dream(bench)
    bench.write_catalog(good=DREAM, bad=DREAM.replace(FILE, "cut.safetensors"))
    shutil.copy(bench.folder / FILE, bench.folder / "cut.safetensors")
    bench.cut("cut.safetensors", 0.5)
    done = run_farm("doctor", env={"FARM_PIPELINES": str(bench.catalog)})
    said = " ".join(done.out.split())
    assert "pipeline good stable_diffusion from" in said
    assert "Pipeline bad: cut.safetensors cannot be loaded: it has" in said


LACKING = {
    "a weight of the UNet": (f"{UNET}middle_block.1.norm.weight", "its unet cannot be loaded: the"),
    "a weight of the VAE": (f"{VAE}encoder.conv_out.bias", "its vae cannot be loaded: the file la"),
    "a weight of the text encoder": (
        "cond_stage_model.transformer.text_model.final_layer_norm.weight",
        "its text_encoder lacks weights that its class needs: final_layer_norm.weight",
    ),
}


@pytest.mark.parametrize("case", LACKING)
def test_a_weight_that_is_missing_is_never_random(bench: CheckpointSandbox, case: str) -> None:
    key, reason = LACKING[case]
    dream(bench)
    without(key)(bench)
    with pytest.raises(CatalogError, match=reason) as caught:
        load(bench, DREAM)
    assert FILE in clear(caught.value)


CONFIGURATIONS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "not there": (shutil.rmtree, "stable_diffusion_config is not a folder next to the|There is no"),
    "no index": (
        lambda folder: (folder / "model_index.json").unlink(),
        "config stable_diffusion_config has no model_index.json",
    ),
    "no UNet": (
        lambda folder: shutil.rmtree(folder / "unet"),
        "config stable_diffusion_config: its unet is missing; model_index.json names it",
    ),
    "no tokenizer": (
        lambda folder: (folder / "tokenizer/tokenizer.json").unlink(),
        "its tokenizer has no vocabulary",
    ),
    "no configuration of the VAE": (
        lambda folder: (folder / "vae/config.json").unlink(),
        "vae/config.json is missing",
    ),
    "a broken configuration": (
        lambda folder: (folder / "vae/config.json").write_text("{"),
        "vae/config.json cannot be read",
    ),
}


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_a_configuration_that_lacks_something_is_refused(
    bench: CheckpointSandbox, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, reason = CONFIGURATIONS[case]
    dream(bench)
    damage(bench.folder / f"{SD}_config")
    assert re.search(reason, refused(bench))


def test_a_configuration_that_a_library_refuses_is_named_without_its_path(
    bench: CheckpointSandbox,
) -> None:
    dream(bench)
    bench.write(f"{SD}_config/tokenizer/tokenizer.json", b"{}")
    with pytest.raises(CatalogError, match=f"^{FILE} cannot be loaded: ") as caught:
        load(bench, DREAM)
    assert str(bench.folder) not in clear(caught.value)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (f'source = "{FILE}"', r"dream\.safetensors is one file, .* Set `config` to a folder"),
        (f'source = "{FILE}"\nconfig = "{FILE}"', "config dream.safetensors is a file. Set `conf"),
        (f'source = "{SD}"\nconfig = "{SD}_config"', "`config` is for a source that is one"),
        (f'{DREAM}\nvariant = "fp16"', "is one file, which has no variants. Remove `variant`"),
        (f"{DREAM}\nsafety_checker = true", "has no safety checker. Remove safety_checker = true"),
        (f'source = "{FILE}"\nconfig = "flux"', "is a FluxPipeline. One file can be a StableDiff"),
        (f'source = "{FILE}"\nconfig = "kandinsky22_prior"', "is a KandinskyV22PriorPipeline. One"),
    ],
)
def test_an_entry_that_does_not_suit_one_file_is_refused(
    bench: CheckpointSandbox, words: str, reason: str
) -> None:
    dream(bench)
    bench.take("flux", "kandinsky22_prior")
    assert re.search(reason, refused(bench, words))


def test_a_safety_checker_of_the_configuration_is_not_used_as_in_diffusers(
    bench: CheckpointSandbox,
) -> None:
    bench.take("stable_diffusion_guarded")
    folder = bench.folder / "stable_diffusion_guarded"
    write_one_file(folder, bench.folder / FILE)
    write_configuration(folder, bench.folder / "config")
    words = f'source = "{FILE}"\nconfig = "config"'
    for more in ("", "safety_checker = false"):
        assert load(bench, f"{words}\n{more}").pipe.safety_checker is None
    unchecked = picture(bench, 'source = "stable_diffusion_guarded"\nsafety_checker = false')
    assert np.array_equal(picture(bench, words), unchecked)
