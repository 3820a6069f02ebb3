"""Jobs whose pictures must equal those of bare diffusers, one for each feature of a call.

They have the form that a client sends, except that a control image is given by a name of IMAGES.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from farm.pipelines.samplers import SAMPLERS
from tests.support.checkpoints import save

CATALOG = """
[pipelines.sd]
source = "stable_diffusion_guarded"
safety_checker = false

[pipelines.guarded]
source = "stable_diffusion_guarded"

[pipelines.sdxl]
source = "sdxl"

[pipelines.refined]
source = "sdxl"
refiner = "sdxl_refiner"

[pipelines.net]
source = "stable_diffusion"
controlnets = ["controlnet"]

[pipelines.nets]
source = "stable_diffusion"
controlnets = ["controlnet", "controlnet_b"]

[pipelines.sdxl_nets]
source = "sdxl"
controlnets = ["controlnet_sdxl", "controlnet_sdxl_b"]

[pipelines.kandinsky]
source = "kandinsky22_decoder"
prior = "kandinsky22_prior"

[pipelines.pixart]
source = "pixart_sigma"
defaults = { use_resolution_binning = false, clean_caption = false }

[pipelines.flux]
source = "flux"
"""
"""Catalog of the parity tests. Each entry also gets OF_ALL."""
OF_ALL = 'device = "cpu"\nbucket = { "default" = 4 }\n'
CHECKPOINTS = (
    "stable_diffusion",
    "stable_diffusion_guarded",
    "sdxl",
    "sdxl_refiner",
    "controlnet",
    "controlnet_b",
    "controlnet_sdxl",
    "controlnet_sdxl_b",
    "kandinsky22_decoder",
    "kandinsky22_prior",
    "pixart_sigma",
    "flux",
)

PROMPTS = ["a red star", "a green heart on a white background"]
ARABIC = "نجمة حمراء على خلفية زرقاء"
CHINESE = "蓝色背景上的红星"
EMOJI = "🔴⭐ on a 🟦 👩‍🚀"
LONG = "a very long story of " + ", ".join(f"star number {number}" for number in range(20))
"""Prompt of far more than 77 tokens, and more than 154."""

SMALL = {"width": 64, "height": 64}
FIRST: dict[str, Any] = {"image": "rings"}
SECOND: dict[str, Any] = {"image": "stripes", "scale": 0.6, "start": 0.25, "end": 0.75}


def _image(width: int, height: int, mode: str) -> Image.Image:
    image = Image.new("RGB", (width, height), "navy")
    draw = ImageDraw.Draw(image)
    for place in range(0, width, 12):
        draw.line((place, 0, width - place, height), fill=(255 - place, place, 90), width=4)
    draw.ellipse((width // 4, height // 4, width - 5, height - 5), outline="yellow", width=5)
    image = image.convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


IMAGES = {
    "rings": _image(64, 64, "RGB"),
    "stripes": _image(90, 50, "RGB").transpose(Image.Transpose.ROTATE_180),
    "grey": _image(41, 130, "L"),
    "clear": _image(128, 128, "RGBA"),
}
"""Control images of several shapes and kinds. Few have the size of a picture."""


@dataclass(frozen=True)
class Case:
    """A job, with its name for test IDs."""

    name: str
    pipeline: str
    job: dict[str, Any]

    def __str__(self) -> str:
        return self.name


def case(what: str, pipeline: str, bucket: int = 4, **fields: Any) -> Case:
    """Build a job of few steps. It has two frames if its bucket has room, else one."""
    own: dict[str, Any] = {"prompts": PROMPTS[: min(bucket, 2)], "seed": 31, "steps": 3}
    if pipeline == "kandinsky":
        own |= {"steps": 2, "prior_steps": 2}
    if pipeline in ("kandinsky", "flux", *CONTROL):  # their default size is large, or the image's
        own |= SMALL
    job = {**own, **fields, "bucket": bucket}
    if pipeline in CONTROL and "control" not in job.get("grid", {}):
        job.setdefault("control", CONTROL[pipeline])
    return Case(f"{pipeline}-{what}-by{bucket}", pipeline, job)


CONTROL: dict[str, list[dict[str, Any]]] = {
    "net": [FIRST],
    "nets": [FIRST, SECOND],
    "sdxl_nets": [FIRST, SECOND],
}
OF_CLIP = ("sd", "sdxl", "refined", "net", "nets", "sdxl_nets")

SIZES = {
    **{name: {(96, 64): 1, (72, 40): 4} for name in ("sd", "sdxl", "refined")},
    **{name: {(32, 64): 4, (72, 40): 1} for name in ("net", "nets", "sdxl_nets")},
    "kandinsky": {(128, 64): 1, (64, 192): 4},
    "pixart": {(32, 64): 4, (96, 64): 1},
    "flux": {(32, 64): 4, (96, 64): 1},
}
"""Sizes smaller than the default, not square, odd in latents. Each is tested at one bucket."""
GUIDANCE: dict[str, dict[str, Any]] = {
    **{
        name: {"grid": {"guidance_scale": [6.5, 1.0]}} for name in (*OF_CLIP, "kandinsky", "pixart")
    },
    "flux": {"grid": {"true_cfg_scale": [3.0, 1.0]}, "negative_prompt": "blue"},
}


def guidance() -> list[Case]:
    """Every pipeline at both buckets, with guidance and without."""
    return [
        case("guidance", pipeline, bucket, images_per_prompt=images, **GUIDANCE[pipeline], **SMALL)
        for pipeline in SIZES
        for bucket, images in ((1, 1), (4, 2))
    ]


def sizes() -> list[Case]:
    """Every pipeline in several sizes."""
    return [
        case(f"{width}x{height}", pipeline, bucket, width=width, height=height)
        for pipeline, sizes in SIZES.items()
        for (width, height), bucket in sizes.items()
    ]


def defaults() -> list[Case]:
    """Jobs with few fields, so that diffusers' own defaults apply."""
    least: dict[str, Any] = {"prompts": PROMPTS[:1], "seed": 5, "bucket": 1}
    return [
        *(Case(f"{name}-defaults", name, least) for name in ("sd", "sdxl", "refined", "pixart")),
        # Their default sizes are large.
        Case("kandinsky-own-size", "kandinsky", least | {"steps": 1, "prior_steps": 2}),
        Case("flux-own-size", "flux", least | {"steps": 1}),
        case("defaults", "net", 1, steps=50),
        case("defaults", "sdxl_nets", 1, steps=50),
        case("defaults", "kandinsky", 1, steps=100, prior_steps=25),
        case("defaults", "flux", 1, steps=28),
    ]


def short_batches() -> list[Case]:
    """Jobs that do not fill their buckets."""
    return [
        case("short", pipeline, bucket, prompts=PROMPTS, images_per_prompt=bucket // 2 + 1)
        for pipeline, bucket in zip(SIZES, itertools.cycle((3, 4)))
    ]


NEGATIVES = {"negative_prompt": ["blue, blurred", "", None]}


def negatives() -> list[Case]:
    """A negative prompt, an empty one and none. SDXL and Kandinsky treat the three differently."""
    cases = [
        case("negatives", pipeline, bucket, prompts=PROMPTS[:1], **seeds, grid=NEGATIVES)
        for pipeline in ("sd", "sdxl", "refined", "net", "nets", "sdxl_nets", "kandinsky")
        for bucket, seeds in ((1, {}), (4, {"images_per_prompt": 2}))
    ]
    cases += [case("negatives", "pixart", grid={"negative_prompt": ["blue, blurred", ""]})]
    cases += [case("negatives", "flux", grid={"negative_prompt": ["blue", ""]}, true_cfg_scale=2.0)]
    return cases


def samplers() -> list[Case]:
    """Every sampler on Stable Diffusion, and some on the other pipelines."""
    some = ("dpmpp_2m_sde", "euler_a", "heun", "unipc")
    named = {
        "sd": sorted(SAMPLERS),
        "sdxl": ("ddim", "dpmpp_2m_karras", "euler_a", "kdpm2_a"),
        "refined": some,
        "net": ("ddpm", "dpmpp_sde", "kdpm2"),
        "sdxl_nets": ("euler_karras", "pndm"),
        "pixart": ("ddim", "euler"),
        "kandinsky": ("ddpm",),
    }
    early: dict[str, Any] = {"refined": {"denoising_end": 0.5}}  # several steps on each side
    return [
        case(f"sampler-{name}", pipeline, steps=4, sampler=name, **early.get(pipeline, {}))
        for pipeline, names in named.items()
        for name in names
    ]


def knobs() -> list[Case]:
    """The other arguments of a call, at values different from the defaults."""
    cases = [
        case("clip-skip", pipeline, grid={"clip_skip": [1, 2]}, negative_prompt="blue")
        for pipeline in ("sd", "sdxl", "refined", "net", "sdxl_nets")
    ]
    cases += [
        case("eta", pipeline, sampler="ddim", grid={"eta": [0.3, 1.0]}, steps=4)
        for pipeline in ("sd", "sdxl", "refined", "net")
    ]
    cases += [
        case("rescale", pipeline, grid={"guidance_rescale": [0.4, 1.0]})
        for pipeline in ("sd", "sdxl", "refined")
    ]
    cases += [
        case("sizes-told", pipeline, bucket, **TOLD, grid={"negative_prompt": ["blue", None]})
        for pipeline in ("sdxl", "refined", "sdxl_nets")
        for bucket in (1, 4)
    ]
    cases += [
        case("aesthetics", "refined", aesthetic_score=9.0, negative_aesthetic_score=1.0),
        case("prior", "kandinsky", prior_guidance_scale=1.0, prior_steps=4, guidance_scale=3.0),
        case("prior-negated", "kandinsky", prior_guidance_scale=1.0, negative_prompt="blue"),
        case("guidance", "flux", grid={"guidance_scale": [1.0, 7.0]}),
        case("sequence", "flux", grid={"max_sequence_length": [16, 256]}),
        case(
            "other-prompts", "flux", prompt_2="a blue ring", negative_prompt="x", true_cfg_scale=2.0
        ),
        case("sequence", "pixart", grid={"max_sequence_length": [8, 120]}),
    ]
    return cases


TOLD: dict[str, Any] = {
    "original_size": [512, 300],
    "crops_coords_top_left": [8, 40],
    "target_size": [96, 64],
    "negative_original_size": [32, 48],
    "negative_crops_coords_top_left": [1, 2],
    "negative_target_size": [700, 900],
}


def prompts() -> list[Case]:
    """Prompts in any script, an empty prompt, and prompts longer than the text encoder's limit."""
    texts = [ARABIC, CHINESE, EMOJI, "", LONG]
    return [
        case("prompts", pipeline, prompts=texts, negative_prompt=LONG)
        for pipeline in ("sd", "sdxl", "refined", "kandinsky", "pixart")
    ] + [case("prompts", pipeline, 1, prompts=texts) for pipeline in ("sd", "flux")]


def handovers() -> list[Case]:
    """Shares of the steps after which the base hands over to the refiner. At null it does not."""
    ends = [0.01, 0.2, 0.5, 0.8, 0.99, None]
    return [
        case("handover", "refined", 1, steps=10, grid={"denoising_end": ends}),
        case("handover", "refined", 4, steps=6, grid={"denoising_end": [0.34, None]}),
    ]


def controls() -> list[Case]:
    """Control images of any size and kind; each net's scale and range of steps; guess mode."""
    counted: list[list[dict[str, Any]]] = [
        [{"image": "grey", "scale": 1.7, "start": 0.0, "end": 0.4}, {"image": "clear"}],
        [{"image": "clear", "scale": 0.0}, {"image": "stripes", "scale": 0.3, "start": 0.5}],
    ]
    cases = [
        case("images", "net", steps=4, grid={"control": [[{"image": name}] for name in IMAGES]}),
        case("counts", "net", steps=5, grid={"control": [[nets[0]] for nets in counted]}),
    ]
    cases += [
        case("counts", pipeline, bucket, steps=5, grid={"control": counted})
        for pipeline in ("nets", "sdxl_nets")
        for bucket in (1, 4)
    ]
    cases += [
        case("guess", pipeline, bucket, guess_mode=True, **GUIDANCE[pipeline])
        for pipeline, bucket in (("net", 1), ("net", 4), ("nets", 4), ("sdxl_nets", 1))
    ]
    return cases


WEIGHTED = [
    "a (red)1.5 star",
    "a (red)0.3 star on a blue-- (background)++",
    '("a red star", "a green heart").blend(0.7, 0.3)',
    '("a red star", "on a blue background").and()',
]
LONG_WEIGHTED = f"(a tale)1.4 of {LONG}"


def compels() -> list[Case]:
    """Compel's weights, blends and conjunctions, and very long prompts."""
    told: dict[str, Any] = {"prompt_syntax": "compel"}
    cases = [
        case("compel", pipeline, bucket, prompts=WEIGHTED, **told, negative_prompt="(blue)1.3")
        for pipeline in ("sd", "sdxl", "refined")
        for bucket in (1, 4)
    ]
    cases += [
        case(
            "compel-long",
            pipeline,
            prompts=["a (short)1.2 one", LONG_WEIGHTED],
            **told,
            grid={"negative_prompt": ["", LONG_WEIGHTED]},
        )
        for pipeline in ("sd", "sdxl", "refined")
    ]
    cases += [
        case("compel-unguided", pipeline, prompts=WEIGHTED[:2], **told, guidance_scale=1.0)
        for pipeline in ("sd", "sdxl")
    ]
    cases += [
        case("compel-null", pipeline, prompts=WEIGHTED[:2], **told, negative_prompt=None)
        for pipeline in ("sdxl", "refined")
    ]
    cases += [
        case(
            "compel-parts",
            "sd",
            prompts=['("a red star", "blue").and(1, 0.5)'],
            **told,
            negative_prompt="",
        ),
        case(
            "compel-skip", "sd", prompts=WEIGHTED[:2], **told, clip_skip=1, negative_prompt="(b)0.5"
        ),
    ]
    return cases


def _knob(pipeline: str, change: dict[str, Any], **base: Any) -> tuple[Case, Case]:
    """A job, and the same job with one field changed. Their pictures must differ."""
    name = next(iter(change))
    return case("base", pipeline, 1, **base), case(name, pipeline, 1, **{**base, **change})


def _each(pipeline: str, changes: dict[str, Any], **base: Any) -> list[tuple[Case, Case]]:
    return [_knob(pipeline, {name: value}, **base) for name, value in changes.items()]


OF_EACH: dict[str, Any] = {
    "prompts": ["a blue ring"],
    "seed": 32,
    "negative_prompt": "blue, blurred",
    "guidance_scale": 1.0,
    "steps": 4,
}


def knob_pairs() -> list[tuple[Case, Case]]:
    """Every field that a case sets, each as a separate pair."""
    compel: dict[str, Any] = {"prompts": [WEIGHTED[0]]}
    told = {"negative_original_size": [64, 64], "negative_target_size": [64, 64]}
    pairs = []
    for pipeline in ("sd", "sdxl"):
        pairs += _each(pipeline, OF_EACH)
    for pipeline in ("sd", "sdxl", "refined", "net"):
        skip = 2 if pipeline == "sd" else 1
        pairs += _each(pipeline, {"clip_skip": skip, "sampler": "dpmpp_2m_sde"})
        pairs += _each(pipeline, {"eta": 0.7}, sampler="ddim")
        pairs += _each(pipeline, {"prompt_syntax": "compel"}, **compel)
    for pipeline in ("sd", "sdxl", "refined"):
        pairs += _each(pipeline, {"guidance_rescale": 0.7})
    for pipeline in ("sdxl", "refined", "sdxl_nets"):
        pairs += _each(pipeline, TOLD, **told)
        pairs += _each(pipeline, {"negative_prompt": ""})
    pairs += _each("refined", {"denoising_end": 0.4}, steps=6)
    pairs += _each("refined", {"denoising_end": None}, steps=6)
    scores = {"aesthetic_score": 1.0, "negative_aesthetic_score": 9.0}
    pairs += _each("refined", scores, steps=6, denoising_end=0.4)  # most steps are the refiner's
    for pipeline in CONTROL:
        others = CONTROL[pipeline][1:]
        for change in ({"image": "grey"}, {"scale": 0.4}, {"start": 0.5}, {"end": 0.5}):
            pairs += [_knob(pipeline, {"control": [FIRST | change, *others]})]
        pairs += [_knob(pipeline, {"guess_mode": True})]
    pairs += _each("kandinsky", {**OF_EACH, "prior_steps": 3, "prior_guidance_scale": 1.0})
    pairs += _each("kandinsky", {"negative_prompt": ""})
    pairs += _each("pixart", {**OF_EACH, "sampler": "ddim", "max_sequence_length": 5})
    flux = {name: value for name, value in OF_EACH.items() if name != "guidance_scale"}
    pairs += _each("flux", {**flux, "true_cfg_scale": 1.0}, negative_prompt="x", true_cfg_scale=3.0)
    pairs += _each("flux", {"prompt_2": "a blue ring", "max_sequence_length": 5})
    return pairs


def tables() -> list[tuple[str, list[dict[str, Any]]]]:
    """Pipelines, each with the lines of an input in which everything varies; 60 lines together."""
    return [(pipeline, _table(pipeline)) for pipeline in ("sd", "sdxl", "nets")]


def _table(pipeline: str, count: int = 20) -> list[dict[str, Any]]:
    chance = random.Random(pipeline)
    of_tables: dict[str, list[Any]] = {
        "steps": [2, 3, 4],
        "width": [32, 64],
        "height": [64, 72],
        "guidance_scale": [1.0, 6.5],
        "sampler": ["ddim", "euler", "dpmpp_2m"],
        "clip_skip": [1, None],
        "negative_prompt": ["blue, blurred", ""],
    }
    if pipeline == "sdxl":
        of_tables["original_size"] = [[512, 300], [64, 64]]
    if pipeline == "nets":  # so that some lines agree in all else, and share a batch
        of_tables = {name: of_tables[name] for name in ("steps", "height", "negative_prompt")}
    lines = []
    for number in range(count):
        line: dict[str, Any] = {"prompt": f"a star, number {number}", "seed": 7 * number}
        line |= {
            name: chance.choice(values)
            for name, values in of_tables.items()
            if chance.random() < 0.7
        }
        if pipeline == "nets" and number % 4:  # else the job's
            line["control"] = [
                {"image": chance.choice(["rings", "stripes", "grey"]), "scale": scale}
                for scale in (chance.choice([0.6, 1.2]), 1.0)
            ]
        lines.append(line)
    return lines


def mixtures() -> list[tuple[str, list[dict[str, Any]]]]:
    """Jobs of one frame each that may share a batch and differ in all allowed fields."""
    texts: list[dict[str, Any]] = [
        {"prompts": [PROMPTS[0]], "seed": 1, "negative_prompt": "blue"},
        {"prompts": [ARABIC], "seed": 2, "negative_prompt": ""},
        {"prompts": [LONG], "seed": 3, "negative_prompt": EMOJI},
        {"prompts": [PROMPTS[1]], "seed": 1, "negative_prompt": LONG},
    ]
    nothing = {"negative_prompt": None}
    of_clip = [*texts[:3], texts[3] | nothing]
    compel: dict[str, Any] = {"prompt_syntax": "compel"}
    weighted: list[dict[str, Any]] = [
        {"prompts": [WEIGHTED[0]], "seed": 1, "negative_prompt": "", **compel},
        {"prompts": [LONG_WEIGHTED], "seed": 2, "negative_prompt": "(blue)1.3", **compel},
        {"prompts": [WEIGHTED[2]], "seed": 3, "negative_prompt": "", **compel},
        {"prompts": ["a red star"], "seed": 1, "negative_prompt": LONG_WEIGHTED, **compel},
    ]
    images = ("stripes", "grey", "clear", "rings")
    two: list[Any] = [[{**FIRST, "image": name}, {**SECOND, "image": name}] for name in images]
    one: list[Any] = [[{**FIRST, "image": name}] for name in images]
    steered = (("net", one, of_clip), ("nets", two, weighted), ("sdxl_nets", two, of_clip))
    found = [(pipeline, of_clip) for pipeline in ("sd", "sdxl", "refined")]
    found += [
        (pipeline, [text | {"control": nets} for text, nets in zip(kind, each, strict=True)])
        for pipeline, each, kind in steered
    ]
    found += [(pipeline, weighted) for pipeline in ("sd", "sdxl", "refined")]
    found += [("kandinsky", texts), ("kandinsky", [text | nothing for text in texts])]
    found += [("pixart", texts), ("flux", [text | {"true_cfg_scale": 2.0} for text in texts])]
    return [
        (pipeline, [case("mixed", pipeline, **frame).job for frame in frames])
        for pipeline, frames in found
    ]


ALL_CASES = [
    *defaults(),
    *guidance(),
    *sizes(),
    *short_batches(),
    *negatives(),
    *samplers(),
    *knobs(),
    *prompts(),
    *handovers(),
    *controls(),
    *compels(),
]
DERIVED = ("refined", "net", "nets", "sdxl_nets")
"""Pipelines whose prompts, guidance and loop are those of `sd` or `sdxl`."""
MANY_STEPS = 20
PARTS = {
    "net": ("clip-skip", "eta", "sampler"),
    "nets": ("counts", "guess", "negatives", "short"),
    "refined": ("clip-skip", "compel", "eta", "rescale"),
    "sdxl_nets": ("clip-skip", "counts", "eta", "negatives", "sampler", "short", "sizes-told"),
}
"""Cases of parts that `net`, `sd` or `sdxl` have in the same form."""


def save_catalog(folder: Path) -> Path:
    """Save the tiny checkpoints and their catalog in a folder. Return the catalog."""
    for kind in CHECKPOINTS:
        save(kind, folder / kind)
    path = folder / "pipelines.toml"
    path.write_text(CATALOG.replace("]\nsource", f"]\n{OF_ALL}source"))
    return path


def _is_variant(case: Case) -> bool:
    """Tell whether other cases make the same calls: with fewer steps, or at another bucket.

    Or in another pipeline, from which this one has the part.
    """
    if case.name.endswith("-own-size") or case.job.get("steps", 0) >= MANY_STEPS:
        return True
    if any(
        case.name.startswith(f"{case.pipeline}-{part}") for part in PARTS.get(case.pipeline, ())
    ):
        return True
    grids = {other.name: other.job.get("grid") for other in ALL_CASES}
    larger = case.name.removesuffix("-by1") + "-by4"
    return case.pipeline != "sd" and grids.get(larger, ...) == case.job.get("grid")


VARIANTS = [case for case in ALL_CASES if _is_variant(case)]
"""Cases that only `make test-slow` renders."""
CASES = [case for case in ALL_CASES if case not in VARIANTS]
