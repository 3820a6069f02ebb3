"""docs/pipelines.md against the code: its catalog loads, its jobs are accepted, its tables hold.

Its checkpoints are replaced by those JSON files of the real ones that the farm reads, with empty
weights. So no torch and no download are needed.
"""

from __future__ import annotations

import json
import re
import shlex
import struct
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import pytest

from farm.cli.commands import submit as submitting
from farm.cli.submission.fields import Field, fields_of
from farm.config import Settings
from farm.domain.spec import FullSpec
from farm.errors import InvalidRequest
from farm.pipelines import families
from farm.pipelines.catalog import Catalog, Pipeline
from farm.pipelines.prompts.compel_syntax import check_compel
from farm.pipelines.resolve import ResolvedPipeline, resolve_pipeline
from farm.pipelines.samplers import SAMPLERS
from farm.services.job_validation import check_job, full_spec
from tests.support.cli_runner import farm
from tests.support.docs_page import CONTROL, EXAMPLE_FAMILY, PAGE, Block, blocks, table_after

SETTINGS = Settings()
CONFIGURATION = PAGE.with_name("configuration.md")

VAE = {"block_out_channels": [128, 256, 512, 512]}
SD_UNET = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "block_out_channels": [320, 640, 1280, 1280],
}
SDXL_UNET = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "block_out_channels": [320, 640, 1280],
    "addition_embed_type": "text_time",
}
Configs = Mapping[str, tuple[str, Mapping[str, Any]]]
"""Class and configuration of each component."""

SDXL: Configs = {
    "vae": ("AutoencoderKL", VAE),
    "unet": ("UNet2DConditionModel", SDXL_UNET),
    "text_encoder": ("CLIPTextModel", {"num_hidden_layers": 12}),
    "text_encoder_2": ("CLIPTextModelWithProjection", {"num_hidden_layers": 32}),
    "scheduler": ("EulerDiscreteScheduler", {}),
}
PIPELINES: Mapping[str, tuple[str, Configs]] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (
        "StableDiffusionPipeline",
        {
            "vae": ("AutoencoderKL", VAE),
            "unet": ("UNet2DConditionModel", SD_UNET),
            "text_encoder": ("CLIPTextModel", {"num_hidden_layers": 12}),
            "scheduler": ("PNDMScheduler", {}),
            "safety_checker": ("StableDiffusionSafetyChecker", {}),
            "feature_extractor": ("CLIPImageProcessor", {}),
        },
    ),
    "stabilityai/stable-diffusion-xl-base-1.0": ("StableDiffusionXLPipeline", SDXL),
    "stabilityai/stable-diffusion-xl-refiner-1.0": ("StableDiffusionXLImg2ImgPipeline", SDXL),
    "kandinsky-community/kandinsky-2-2-decoder": (
        "KandinskyV22Pipeline",
        {
            "movq": ("VQModel", VAE),
            "unet": ("UNet2DConditionModel", {"sample_size": 64}),
            "scheduler": ("DDPMScheduler", {}),
        },
    ),
    "kandinsky-community/kandinsky-2-2-prior": (
        "KandinskyV22PriorPipeline",
        {"scheduler": ("UnCLIPScheduler", {})},
    ),
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": (
        "PixArtSigmaPipeline",
        {
            "vae": ("AutoencoderKL", VAE),
            "transformer": ("PixArtTransformer2DModel", {"sample_size": 128, "patch_size": 2}),
            "scheduler": ("DPMSolverMultistepScheduler", {}),
        },
    ),
    "black-forest-labs/FLUX.1-dev": (
        "FluxPipeline",
        {
            "vae": ("AutoencoderKL", VAE),
            "transformer": ("FluxTransformer2DModel", {"patch_size": 1}),
            "scheduler": ("FlowMatchEulerDiscreteScheduler", {}),
        },
    ),
    "null": ("NullPipeline", {"noise": ("Noise", {})}),
}
NETS = {
    "lllyasviel/control_v11p_sd15_openpose": SD_UNET,
    "lllyasviel/control_v11f1p_sd15_depth": SD_UNET,
    "diffusers/controlnet-canny-sdxl-1.0": SDXL_UNET,
}
NO_TENSORS = struct.pack("<Q", 2) + b"{}"
"""Content of an empty safetensors file."""
ONE_FILE: Mapping[str, list[int]] = {
    "model.diffusion_model.input_blocks.0.0.weight": [320, 4, 3, 3],
    "model.diffusion_model.input_blocks.11.0.in_layers.2.weight": [1280, 1280, 3, 3],
    "model.diffusion_model.out.2.weight": [4, 320, 3, 3],
    "first_stage_model.decoder.conv_in.weight": [512, 4, 3, 3],
    "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": [77, 768],
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": [49408, 768],
}
"""Some tensors of a Stable Diffusion 1.5 in one file, with their shapes."""


def weigh(place: Path, config: Mapping[str, Any], name: str = "config.json") -> None:
    """Write a component: its configuration, and its weights as plain and as fp16."""
    place.mkdir(parents=True)
    (place / name).write_text(json.dumps(config))
    for file in ("model.safetensors", "model.fp16.safetensors"):
        (place / file).write_bytes(NO_TENSORS)


def write_header(path: Path, shapes: Mapping[str, list[int]]) -> None:
    """Write a safetensors file whose tensors take no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with path.open("r+b") as file:
        file.truncate(8 + len(text) + end)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    for source, (class_name, components) in PIPELINES.items():
        index: dict[str, Any] = {"_class_name": class_name}
        for name, (kind, config) in components.items():
            index[name] = ["diffusers", kind]
            file = "scheduler_config.json" if name == "scheduler" else "config.json"
            weigh(folder / source / name, {"_class_name": kind, **config}, file)
        (folder / source / "model_index.json").write_text(json.dumps(index))
    for source, unet in NETS.items():
        weigh(folder / source, {"_class_name": "ControlNetModel", **unet})
    write_header(folder / "dreamshaper_8.safetensors", ONE_FILE)
    card = folder / "kandinsky-community/kandinsky-2-2-decoder/README.md"
    card.write_text("---\nprior:\n- kandinsky-community/kandinsky-2-2-prior\n---\n")
    return folder


@pytest.fixture(scope="module")
def catalog(checkpoints: Path) -> dict[str, Pipeline]:
    """Load every entry of the page. Equal names must be equal entries."""
    found: dict[str, Pipeline] = {}
    for block in blocks("toml"):
        entries = Catalog.model_validate(tomllib.loads(block.text)).pipelines
        assert not entries.keys() & found.keys(), block
        found |= entries
    for entry in found.values():
        entry.place(checkpoints)
    return found


@pytest.fixture(scope="module")
def resolved_pipelines(catalog: dict[str, Pipeline]) -> dict[str, ResolvedPipeline]:
    return {name: resolve_pipeline(name, entry) for name, entry in catalog.items()}


def accepted(
    resolved_pipelines: Mapping[str, ResolvedPipeline], body: Mapping[str, Any]
) -> FullSpec:
    job = check_job(dict(body), SETTINGS)
    return full_spec(job, resolved_pipelines[job.pipeline], SETTINGS)


@dataclass(frozen=True)
class Case:
    """A job of the page."""

    block: Block
    body: dict[str, Any]
    refused: dict[str, Any] | None
    """The error that follows it on the page, or None if the job is accepted."""

    def __str__(self) -> str:
        return str(self.block)


def jobs() -> list[Case]:
    found = [(block, json.loads(block.text)) for block in blocks("json")]
    behind = [after for _, after in found[1:]] + [{}]
    return [
        Case(block, body, after if "error" in after else None)
        for (block, body), after in zip(found, behind, strict=True)
        if "pipeline" in body
    ]


def test_the_page_has_what_is_checked_here(resolved_pipelines: dict[str, ResolvedPipeline]) -> None:
    assert {resolved.family.name for resolved in resolved_pipelines.values()} == set(
        families.all_families()
    )
    assert len(jobs()) > 10


def test_the_catalog_s_entries_are_found_to_be_of_their_families(
    resolved_pipelines: dict[str, ResolvedPipeline],
) -> None:
    rows = table_after("<!-- the families -->")
    found = {
        name.strip("`"): resolved_pipelines[entry.strip("`")].family.name for name, _, entry in rows
    }
    assert found == {name: name for name in families.all_families()}


@pytest.mark.parametrize("job", jobs(), ids=str)
def test_jobs_are_taken_or_refused_as_the_page_says(
    resolved_pipelines: dict[str, ResolvedPipeline], job: Case
) -> None:
    if job.refused is None:
        accepted(resolved_pipelines, job.body)
        return
    with pytest.raises(InvalidRequest) as caught:
        accepted(resolved_pipelines, job.body)
    assert job.refused["detail"] == job.refused["error"]["message"] == caught.value.message
    assert job.refused["error"]["param"] == caught.value.param


def command_lines() -> list[list[str]]:
    text = "\n".join(block.text for block in blocks("sh")).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [words for words in lines if words[:2] == ["farm", "submit"] and "--fields" not in words]


@pytest.mark.parametrize("words", command_lines(), ids=" ".join)
def test_the_command_lines_make_jobs_that_are_taken(
    resolved_pipelines: dict[str, ResolvedPipeline],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
) -> None:
    sent: list[dict[str, Any]] = []

    def send(body: dict[str, Any], _key: object, controls: Any = (), **_how: object) -> None:
        images = [{"image": CONTROL, **word.settings} for word in controls]
        sent.append({**body, **({"control": images} if images else {})})

    monkeypatch.setattr(submitting, "send", send)
    outcome = farm(*words[1:])
    assert outcome.code == 0, outcome.err
    accepted(resolved_pipelines, sent[0])


def told(field: Field, parent: str) -> list[str]:
    default = "required" if field.default is None else f"`{field.default}`"
    kind = "a [sampler](#samplers), or null" if field.name == "sampler" else field.kind
    return [f"`{parent}{field.name}`", '`""`' if default == "``" else default, kind]


@pytest.mark.parametrize("name", ["sd15", "sdxl_refined", "pose", "kandinsky", "pixart"])
def test_the_tables_of_fields_are_true(
    resolved_pipelines: dict[str, ResolvedPipeline], name: str
) -> None:
    parent, expected = "", []
    for field in fields_of(resolved_pipelines[name].schema()):
        expected.append(told(field, f"{parent}." if field.depth else ""))
        parent = parent if field.depth else field.name
    assert [row[:3] for row in table_after(f"<!-- fields of {name} -->")] == expected


def test_the_examples_of_compel_s_syntax_are_taken() -> None:
    rows = table_after("<!-- Compel's syntax -->")
    examples = [text for row in rows for text in re.findall(r"`([^`]+)`", row[0])]
    assert len(examples) > len(rows) > 5
    for text in examples:
        check_compel(text)


def test_the_table_of_samplers_is_true() -> None:
    rows = table_after("<!-- the samplers -->")
    options = {
        name: ", ".join(f"`{key}={value!r}`" for key, value in changes.items())
        for name, (_, changes) in SAMPLERS.items()
    }
    assert rows == [[f"`{name}`", f"`{SAMPLERS[name][0]}`", options[name]] for name in SAMPLERS]


def test_the_catalog_s_keys_are_all_described() -> None:
    rows = table_after("<!-- the catalog's keys -->", CONFIGURATION)
    assert {row[0].strip("`") for row in rows} == set(Pipeline.model_fields)


def test_python_is_python() -> None:
    for block in blocks("python"):
        compile(block.text, str(block), "exec")


def test_the_family_of_the_example_is_found_by_being_there(
    catalog: dict[str, Pipeline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flux.py").write_text(EXAMPLE_FAMILY.text)
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    families.all_families.cache_clear()
    try:
        resolved = resolve_pipeline("flux", catalog["flux"])
        assert (resolved.family.name, resolved.params_type.__name__) == ("flux", "FluxParams")
        body = {"pipeline": "flux", "prompts": ["a red star"], "steps": 4}
        assert accepted({"flux": resolved}, body).point(0).params == {
            "width": 1024,
            "height": 1024,
            "steps": 4,
            "guidance_scale": 3.5,
        }
        with pytest.raises(InvalidRequest, match="width: Input should be a multiple of 16"):
            accepted({"flux": resolved}, {**body, "width": 1000})
    finally:
        monkeypatch.undo()
        families.all_families.cache_clear()
        sys.modules.pop("farm.pipelines.families.flux", None)


def test_links_within_the_page_lead_somewhere() -> None:
    text = PAGE.read_text(encoding="utf-8")
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    known = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([^)]*)\)", text)) <= known
