"""Each pipeline's own fields: the API's refusals, and its descriptions of the fields."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from PIL import Image

from farm.config import Settings
from farm.context import Farm
from farm.pipelines.samplers import SAMPLERS
from tests.integration.test_api_refusals import check_problem
from tests.support.api_server import Api, serving
from tests.support.checkpoint_sandbox import CheckpointSandbox

NET = 'controlnets = ["controlnet"]'
ENTRIES = {
    "sd": 'source = "stable_diffusion"\nbucket = { "default" = 2, "128x64" = 4 }',
    "sdxl": 'source = "sdxl"\ndefaults = { "steps" = 30, "sampler" = "dpmpp_2m" }',
    "refined": 'source = "sdxl"\nrefiner = "sdxl_refiner"',
    "kandinsky": 'source = "kandinsky22_decoder"\nprior = "kandinsky22_prior"',
    "net": 'source = "stable_diffusion"\ncontrolnets = ["controlnet"]',
    "nets": 'source = "stable_diffusion"\ncontrolnets = ["controlnet", "controlnet_b"]',
    "sdxl_net": 'source = "sdxl"\ncontrolnets = ["controlnet_sdxl"]',
    "pixart": 'source = "pixart_sigma"',
    "flux": 'source = "flux"',
}
FAMILIES = {
    "sd": "stable_diffusion",
    "sdxl": "sdxl",
    "refined": "sdxl",
    "kandinsky": "kandinsky22",
    "net": "controlnet",
    "nets": "controlnet",
    "sdxl_net": "controlnet",
    "pixart": "auto",
    "flux": "auto",
}
KINDS = ["stable_diffusion", "sdxl", "sdxl_refiner", "kandinsky22_decoder", "kandinsky22_prior"]
KINDS += ["controlnet", "controlnet_b", "controlnet_sdxl", "pixart_sigma", "flux"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> CheckpointSandbox:
    folder = tmp_path_factory.mktemp("catalog")
    bench = CheckpointSandbox(tmp_path_factory.mktemp("good"), folder)
    bench.take(*KINDS)
    bench.write_catalog(**ENTRIES)
    return bench


@pytest.fixture
def settings(settings: Settings, bench: CheckpointSandbox) -> Settings:
    return settings.model_copy(update={"pipelines": bench.catalog})


@pytest.fixture
def api(farm: Farm) -> Iterator[Api]:
    with serving(farm) as running:
        yield running


def upload(client: httpx.Client, colour: str) -> str:
    content = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(content, "PNG")
    headers = {"Content-Type": "image/png"}
    response = client.post("/v1/images", content=content.getvalue(), headers=headers)
    assert response.status_code == 201, response.text
    return str(response.json()["id"])


Case = tuple[str, dict[str, Any], str]
"""A pipeline, a job's fields, and the field that the refusal names."""


def compel(**fields: Any) -> dict[str, Any]:
    return {"prompt_syntax": "compel", **fields}


CASES: dict[str, Case] = {
    "clip_skip 0": ("sd", {"clip_skip": 0}, "clip_skip"),
    "clip_skip as deep as the text encoder": ("sd", {"clip_skip": 3}, "clip_skip"),
    "clip_skip of true": ("sd", {"clip_skip": True}, "clip_skip"),
    "clip_skip as text": ("sd", {"clip_skip": "1"}, "clip_skip"),
    "clip_skip that Compel has not": ("sd", compel(clip_skip=2), "clip_skip"),
    "any clip_skip with Compel on SDXL": ("sdxl", compel(clip_skip=1), "clip_skip"),
    "guidance_rescale below": ("sd", {"guidance_rescale": -0.1}, "guidance_rescale"),
    "guidance_rescale above": ("sd", {"guidance_rescale": 1.1}, "guidance_rescale"),
    "guidance_rescale where the class has none": ("net", {"guidance_rescale": 0.5}, "guidance_res"),
    "eta below": ("sd", {"eta": -0.1}, "eta"),
    "eta above": ("sdxl", {"eta": 1.1}, "eta"),
    "eta as a list": ("sd", {"eta": [0.5]}, "eta"),
    "an unknown syntax": ("sd", {"prompt_syntax": "a1111"}, "prompt_syntax"),
    "no syntax": ("sd", {"prompt_syntax": None}, "prompt_syntax"),
    "an unknown sampler": ("sd", {"sampler": "magic"}, "sampler"),
    "a sampler that Kandinsky cannot use": ("kandinsky", {"sampler": "euler"}, "sampler"),
    "a sampler that Flux cannot use": ("flux", {"sampler": "euler"}, "sampler"),
    "negative_prompt as a list": ("sd", {"negative_prompt": ["a"]}, "negative_prompt"),
    "a size of one number": ("sdxl", {"original_size": [64]}, "original_size"),
    "a size of three numbers": ("sdxl", {"target_size": [64, 64, 64]}, "target_size"),
    "a size as a number": ("sdxl", {"original_size": 64}, "original_size"),
    "a size as text": ("sdxl", {"original_size": "64x64"}, "original_size"),
    "a size of texts": ("sdxl", {"original_size": ["64", "64"]}, "original_size.0"),
    "a negative size": ("sdxl", {"target_size": [64, -1]}, "target_size.1"),
    "a broken size": ("sdxl", {"target_size": [64.5, 64]}, "target_size.0"),
    "a crop of no place": ("sdxl", {"crops_coords_top_left": None}, "crops_coords_top_left"),
    "a crop at minus one": ("sdxl", {"crops_coords_top_left": [-1, 0]}, "crops_coords_top_left.0"),
    "half of a negative size": ("sdxl", {"negative_target_size": [64, 64]}, "negative_target_size"),
    "SDXL's sizes on Stable Diffusion": ("sd", {"original_size": [64, 64]}, "original_size"),
    "denoising_end 0": ("refined", {"denoising_end": 0}, "denoising_end"),
    "denoising_end 1": ("refined", {"denoising_end": 1.0}, "denoising_end"),
    "denoising_end beyond": ("refined", {"denoising_end": 1.5}, "denoising_end"),
    "denoising_end without a refiner": ("sdxl", {"denoising_end": 0.8}, "denoising_end"),
    "denoising_end on Stable Diffusion": ("sd", {"denoising_end": 0.8}, "denoising_end"),
    "an aesthetic score beyond": ("refined", {"aesthetic_score": 10.5}, "aesthetic_score"),
    "Kandinsky at another multiple": ("kandinsky", {"width": 72}, "width"),
    "Kandinsky at no width": ("kandinsky", {"height": 0}, "height"),
    "no prior_steps": ("kandinsky", {"prior_steps": 0}, "prior_steps"),
    "many prior_steps": ("kandinsky", {"prior_steps": 1001}, "prior_steps"),
    "a prior's guidance below": ("kandinsky", {"prior_guidance_scale": -1}, "prior_guidance_scale"),
    "Compel on Kandinsky": ("kandinsky", {"prompt_syntax": "compel"}, "prompt_syntax"),
    "an unknown argument": ("pixart", {"colour": "red"}, "colour"),
    "an argument that the farm fills in": (
        "pixart",
        {"num_images_per_prompt": 2},
        "num_images_per",
    ),
    "an argument that takes tensors": ("pixart", {"latents": [1, 2]}, "latents"),
    "a switch as text": ("pixart", {"clean_caption": "yes"}, "clean_caption"),
    "a number as a switch": ("pixart", {"guidance_scale": True}, "guidance_scale"),
    "a number as text": ("flux", {"guidance_scale": "3.5"}, "guidance_scale"),
    "a text as a number": ("flux", {"prompt_2": 5}, "prompt_2"),
    "NUL in a second prompt": ("flux", {"prompt_2": "a\x00b"}, "prompt_2"),
    "a second prompt that is long": ("flux", {"prompt_2": "x" * 9000}, "prompt_2"),
    "more tokens than the pipeline takes": (
        "pixart",
        {"max_sequence_length": 10_000},
        "max_sequence_length",
    ),
    "no tokens": ("flux", {"max_sequence_length": 0}, "max_sequence_length"),
    "no steps of auto": ("flux", {"steps": 0}, "steps"),
    "Flux at another multiple": ("flux", {"width": 72}, "width"),
}

SYNTAX: dict[str, tuple[str, str]] = {
    "an open bracket": ("a (red star", "character 3 "),
    "a bracket that was not opened": ("a red) star", "character 6 "),
    "an open quotation": ('a "red star', "character 3 "),
    "weights for other parts": ('("a", "b").blend(1)', "weights for 1"),
    "swap": ("a cat.swap(dog)", "swap cannot be used"),
    "a LoRA": ("a cat withLora(pixel, 0.5)", "withLora cannot be used"),
    "empty brackets": ("a () b", "are empty"),
    "brackets that are deep": ("(" * 9 + "a" + ")" * 9, "8 deep"),
}


def job(pipeline: str, **fields: Any) -> dict[str, Any]:
    return {"pipeline": pipeline, "prompts": ["a red star"], **fields}


def refused(client: httpx.Client, body: dict[str, Any]) -> tuple[str, str]:
    """Check that a job is refused. Return the field and the message."""
    problem = check_problem(client.post("/v1/jobs", json=body), 422)
    assert len(problem["detail"]) < 1000
    assert "\n" not in problem["detail"]
    return str(problem["error"]["param"]), problem["detail"]


def test_wrong_fields_are_named(api: Api) -> None:
    client = api.client()
    for case, (pipeline, fields, field) in CASES.items():
        named, detail = refused(client, job(pipeline, **fields))
        assert named.startswith(field), (case, named, detail)
    assert api.jobs_stored() == 0


def test_they_are_named_in_a_grid_too(api: Api) -> None:
    client = api.client()
    for case, (pipeline, fields, field) in CASES.items():
        grid = {name: [value] for name, value in fields.items()}
        named, detail = refused(client, job(pipeline, grid=grid))
        assert named.startswith(f"grid.{field}"), (case, named, detail)
    assert api.jobs_stored() == 0


def test_a_field_that_misses_its_other_half_is_named(api: Api) -> None:
    client = api.client()
    for fields in (
        {"negative_original_size": [64, 64]},
        {"grid": {"negative_original_size": [[64, 64]]}},
    ):
        named, detail = refused(client, job("sdxl", **fields))
        assert named == "negative_target_size"
        assert "set negative_original_size and negative_target_size together" in detail
    assert api.jobs_stored() == 0


@pytest.mark.parametrize("pipeline", ["sd", "refined", "sdxl_net"])
def test_wrong_syntax_is_named_wherever_it_stands(api: Api, pipeline: str) -> None:
    client = api.client()
    needed = {} if pipeline != "sdxl_net" else {"control": [{"image": upload(client, "red")}]}
    for text, said in SYNTAX.values():
        places: list[tuple[str, dict[str, Any]]] = [
            ("prompts.0", {"prompts": [text]}),
            ("prompts.2", {"prompts": ["a red star", "(a star)1.2", text, text]}),
            ("negative_prompt", {"negative_prompt": text}),
            ("grid.negative_prompt", {"grid": {"negative_prompt": ["a", text]}}),
            ("prompts.0", {"prompts": [text], "grid": {"steps": [1, 2]}}),
        ]
        for field, fields in places:
            body = {**job(pipeline, prompt_syntax="compel"), **needed, **fields}
            named, detail = refused(client, body)
            assert named == field, (fields, detail)
            assert said in detail, (fields, detail)
        body = {**job(pipeline, prompts=[text]), **needed}
        body["grid"] = {"prompt_syntax": ["plain", "compel"]}
        assert refused(client, body)[0] == "prompts.0"
    assert api.jobs_stored() == 0


def test_plain_prompts_take_any_text(api: Api) -> None:
    client = api.client()
    for text, _said in SYNTAX.values():
        response = client.post("/v1/jobs", json=job("sd", prompts=[text], negative_prompt=text))
        assert response.status_code == 202, response.text


def controls(mine: str, foreign: str) -> dict[str, Case]:
    """Wrong ways to name control images. `net` takes one, `nets` takes two."""
    good = {"image": mine}
    return {
        "none at all": ("net", {}, "control"),
        "null": ("net", {"control": None}, "control"),
        "an empty list": ("net", {"control": []}, "control"),
        "not a list": ("net", {"control": good}, "control"),
        "an id alone": ("net", {"control": [mine]}, "control.0"),
        "two for one": ("net", {"control": [good, good]}, "control"),
        "one for two": ("nets", {"control": [good]}, "control"),
        "three for two": ("nets", {"control": [good] * 3}, "control"),
        "an unknown id": ("net", {"control": [{"image": "0" * 64}]}, "control.0.image"),
        "another tenant's": ("net", {"control": [{"image": foreign}]}, "control.0.image"),
        "a foreign second": ("nets", {"control": [good, {"image": foreign}]}, "control.1.image"),
        "no id": ("net", {"control": [{"image": "a.png"}]}, "control.0.image"),
        "a long id": ("net", {"control": [{"image": mine + "0"}]}, "control.0.image"),
        "an id in capitals": ("net", {"control": [{"image": mine.upper()}]}, "control.0.image"),
        "no image": ("net", {"control": [{"scale": 1.0}]}, "control.0.image"),
        "a list of scales": ("net", {"control": [good | {"scale": [1.0]}]}, "control.0.scale"),
        "a scale below": ("net", {"control": [good | {"scale": -0.1}]}, "control.0.scale"),
        "a scale beyond": ("net", {"control": [good | {"scale": 10.1}]}, "control.0.scale"),
        "end before start": (
            "net",
            {"control": [good | {"start": 0.8, "end": 0.2}]},
            "control.0.end",
        ),
        "end at start": ("net", {"control": [good | {"start": 0.5, "end": 0.5}]}, "control.0.end"),
        "start at the end": ("net", {"control": [good | {"start": 1.0}]}, "control.0.end"),
        "a start below": ("net", {"control": [good | {"start": -0.1}]}, "control.0.start"),
        "an unknown key": ("net", {"control": [good | {"colour": "red"}]}, "control.0.colour"),
        "guess_mode as text": ("net", {"control": [good], "guess_mode": "yes"}, "guess_mode"),
        "a pipeline without nets": ("sd", {"control": [good]}, "control"),
        "SDXL without nets": ("sdxl", {"control": [good]}, "control"),
        "Flux": ("flux", {"control": [good]}, "control"),
    }


def test_wrong_control_images_are_named(api: Api) -> None:
    client = api.client()
    cases = controls(upload(client, "red"), upload(api.client("bob"), "blue"))
    for case, (pipeline, fields, field) in cases.items():
        named, detail = refused(client, job(pipeline, **fields))
        assert named == field, (case, named, detail)
    for case, (pipeline, fields, field) in cases.items():
        if "control" in fields:
            control = fields.pop("control")
            named, detail = refused(client, job(pipeline, **fields, grid={"control": [control]}))
            is_named = named.startswith("grid.control") or named == field == "guess_mode"
            assert is_named, (case, named, detail)
    assert api.jobs_stored() == 0


def test_a_control_image_that_is_right_is_taken(api: Api) -> None:
    client = api.client()
    red, blue = upload(client, "red"), upload(client, "blue")
    right = [
        job("net", control=[{"image": red}]),
        job(
            "nets", control=[{"image": red, "scale": 0}, {"image": blue, "start": 0.2, "end": 0.7}]
        ),
        job("sdxl_net", grid={"control": [[{"image": red}], [{"image": blue}]]}),
    ]
    for body in right:
        response = client.post("/v1/jobs", json=body)
        assert response.status_code == 202, response.text
    assert api.jobs_stored() == 3


def test_fields_at_their_limits_are_taken(api: Api) -> None:
    client = api.client()
    right = [
        job("sd", clip_skip=2, guidance_rescale=1, eta=1, sampler="ddim", negative_prompt=None),
        job("sd", prompt_syntax="compel", clip_skip=1, prompts=['("a", "b (c)1.2").blend(1, 2)']),
        job("sdxl", original_size=[0, 16384], target_size=None, crops_coords_top_left=[5, 0]),
        job("sdxl", negative_original_size=[64, 64], negative_target_size=[32, 64]),
        job("sdxl", denoising_end=None, prompt_syntax="compel", clip_skip=None),
        job("refined", denoising_end=0.01, grid={"aesthetic_score": [0, 10]}),
        job("kandinsky", width=64, height=128, prior_steps=1, sampler="ddpm"),
        job("pixart", clean_caption=False, max_sequence_length=16, negative_prompt="b"),
        job("flux", prompt_2="another", guidance_scale=2, width=64),
    ]
    for body in right:
        response = client.post("/v1/jobs", json=body)
        assert response.status_code == 202, response.text


SIDES = {"kandinsky": 512, "flux": 1024}
"""Default width and height, in pixels. Other pipelines: 64."""
MULTIPLES = {"kandinsky": 64, "flux": 16, "pixart": 16}
"""Width and height must be a multiple of this. Other pipelines: 8."""
SAMPLERS_OF: dict[str, set[str]] = {"kandinsky": {"ddpm"}, "flux": set()}
"""Samplers that a pipeline can use. Other pipelines: all."""
DEFAULTS: dict[str, dict[str, Any]] = {
    "sd": {"steps": 50, "guidance_scale": 7.5, "sampler": "pndm", "negative_prompt": "", "eta": 0},
    "sdxl": {"steps": 30, "guidance_scale": 5, "sampler": "dpmpp_2m", "denoising_end": None},
    "refined": {"steps": 50, "sampler": "euler", "denoising_end": 0.8, "aesthetic_score": 6},
    "kandinsky": {"steps": 100, "prior_steps": 25, "sampler": "ddpm", "negative_prompt": None},
    "net": {"sampler": "pndm", "guess_mode": False, "prompt_syntax": "plain"},
    "nets": {"sampler": "pndm", "guess_mode": False, "clip_skip": None},
    "sdxl_net": {"sampler": "euler", "original_size": None, "crops_coords_top_left": [0, 0]},
    "pixart": {"steps": 20, "guidance_scale": 4.5, "sampler": "dpmpp_2m", "negative_prompt": ""},
    "flux": {"steps": 28, "guidance_scale": 3.5, "prompt_2": None, "max_sequence_length": 512},
}


def test_each_pipeline_tells_what_a_job_for_it_takes(api: Api) -> None:
    listed = {row["name"]: row for row in api.client().get("/v1/pipelines").json()["data"]}
    assert {name: row["family"] for name, row in listed.items()} == FAMILIES
    for name, row in listed.items():
        assert row["problem"] is None
        fields = row["parameters"]["properties"]
        side = SIDES.get(name, 64)
        assert (row["defaults"]["width"], row["defaults"]["height"]) == (side, side), name
        for size in ("width", "height"):
            assert fields[size]["multipleOf"] == MULTIPLES.get(name, 8), name
        assert samplers(fields) == SAMPLERS_OF.get(name, set(SAMPLERS)), name
        assert DEFAULTS[name].items() <= row["defaults"].items(), (name, row["defaults"])
        assert "$ref" not in str(row["parameters"]), "the row is complete without references"


def samplers(fields: dict[str, Any]) -> set[str]:
    """Return the names that a `sampler` field takes, without null."""
    forms = fields["sampler"]["anyOf"] if "sampler" in fields else []
    return {name for form in forms for name in form.get("enum", [])}


def test_each_pipeline_tells_its_own_limits(api: Api) -> None:
    listed = {row["name"]: row for row in api.client().get("/v1/pipelines").json()["data"]}
    fields = {name: row["parameters"]["properties"] for name, row in listed.items()}
    assert maximum(fields["sd"]["clip_skip"]) == 2
    assert (fields["net"]["control"]["minItems"], fields["net"]["control"]["maxItems"]) == (1, 1)
    assert (fields["nets"]["control"]["minItems"], fields["nets"]["control"]["maxItems"]) == (2, 2)
    assert "control" in listed["nets"]["parameters"]["required"]
    assert set(fields["nets"]["control"]["items"]["properties"]) == {
        "image",
        "scale",
        "start",
        "end",
    }
    assert fields["sd"]["prompt_syntax"]["enum"] == ["plain", "compel"]
    assert "control" not in fields["sd"]
    assert "original_size" not in fields["sd"]
    assert "guidance_rescale" not in fields["net"]
    assert listed["sd"]["buckets"] == {"default": 2, "128x64": 4}


def maximum(field: dict[str, Any]) -> int:
    return next(int(form["maximum"]) for form in field["anyOf"] if "maximum" in form)


WITHOUT_TORCH = """
import sys
from pathlib import Path
from api.app import create_app
from farm.config import Settings
from farm.context import open_farm

settings = Settings(pipelines=Path(sys.argv[1]))
app = create_app(settings)
app.state.farm = farm = open_farm(settings)
for name in farm.catalog.pipelines:
    resolved = farm.resolve(name)
    print(name, resolved.family.name, "width" in resolved.schema()["properties"])
app.openapi()
heavy = {"torch", "diffusers", "transformers", "compel", "accelerate", "scipy", "numpy"}
print(sorted(heavy & {*sys.modules}))
"""


def test_offers_of_every_kind_load_no_library_of_the_workers(bench: CheckpointSandbox) -> None:
    words = [sys.executable, "-c", WITHOUT_TORCH, str(bench.catalog)]
    found = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    assert found[:-1] == [f"{name} {family} True" for name, family in FAMILIES.items()]
    assert found[-1] == "[]"
