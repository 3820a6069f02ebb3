"""Rendering again from only a PNG, with a tiny random checkpoint that is made here."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from farm.domain.image_formats import Format
from farm.domain.spec import FrameSpec
from farm.errors import InvalidRequest
from farm.imaging.encoding import encode, read
from farm.imaging.provenance import Provenance
from farm.imaging.uploads import decoded, normalised
from farm.pipelines.catalog import Catalog, load_catalog
from farm.pipelines.family import Batch
from farm.pipelines.resolve import resolve_pipeline
from farm.pipelines.runtime.devices import device_name, prepare_torch
from farm.rendering import replay
from farm.rendering.environment import library_versions
from tests.support.checkpoints import save
from tests.support.cli_runner import Outcome, farm

SIDE = 64
PARAMS = {"steps": 2, "guidance_scale": 4.0, "sampler": "ddim"}
SIZE = {"width": SIDE, "height": SIDE, "negative_prompt": ""}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("catalog")
    save("stable_diffusion", folder / "tiny")
    (folder / "pipelines.toml").write_text('[pipelines.tiny]\nsource = "tiny"\ndevice = "cpu"\n')
    return folder


@pytest.fixture(scope="module")
def catalog(folder: Path) -> Catalog:
    return load_catalog(folder / "pipelines.toml")


@pytest.fixture(scope="module", autouse=True)
def same_threads() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def rendered(catalog: Catalog, threads: int = 1, bucket: int = 2, form: Format = "png") -> bytes:
    """Render a picture as a worker does, in a batch with another frame."""
    import torch

    torch.set_num_threads(threads)
    resolved = resolve_pipeline("tiny", catalog.pipelines["tiny"])
    frames = [
        FrameSpec(
            pipeline="tiny",
            prompt=prompt,
            seed=seed,
            bucket=bucket,
            params={**SIZE, **PARAMS},
            format=form,
        )
        for prompt, seed in (("a star", 31), ("a moon", 7))[:bucket]
    ]
    loaded = resolved.family.load(resolved.pipeline)
    picture = resolved.family.denoise(loaded, Batch(frames))[0]
    assert picture is not None
    return encode(
        picture,
        Provenance(
            frame=frames[0],
            weights=loaded.weights,
            device=device_name("cpu"),
            dtype=loaded.dtype,
            threads=threads,
            versions=library_versions(),
        ),
    )


@pytest.fixture(scope="module")
def content(catalog: Catalog) -> bytes:
    return rendered(catalog)


def altered(content: bytes, **changes: Any) -> bytes:
    """Return the same picture with a changed text."""
    picture, provenance, _ = read(content)
    frame = provenance.frame.model_copy(update=changes.pop("frame", {}))
    return encode(picture, provenance.model_copy(update={**changes, "frame": frame}))


def repainted(content: bytes, *places: tuple[int, int]) -> bytes:
    """Return the picture with its old text and some inverted pixels."""
    picture = Image.open(io.BytesIO(content))
    text = PngImagePlugin.PngInfo()
    for name, value in picture.info.items():
        assert isinstance(name, str)
        assert isinstance(value, str)
        text.add_itxt(name, value)
    for place in places:
        red, green, blue = picture.getpixel(place)  # type: ignore[misc]
        picture.putpixel(place, (red ^ 255, green, blue))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=text)
    return buffer.getvalue()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_picture_is_rendered_again_to_the_same_bytes(catalog: Catalog, threads: int) -> None:
    content = rendered(catalog, threads)
    steps: list[tuple[int, int]] = []
    again = replay.replay(
        content, catalog, lambda step, steps_in_all: steps.append((step, steps_in_all))
    )
    assert again.identical
    assert again.notes == []
    assert encode(again.fresh, again.now) == content
    assert steps == [(1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("form", "compared"), [("jpeg", "pixels of the JPEG, encoded again"), ("webp", "pixels")]
)
def test_jpeg_and_webp_are_rendered_again_too(
    catalog: Catalog, form: Format, compared: str
) -> None:
    content = rendered(catalog, form=form)
    again = replay.replay(content, catalog)
    assert (again.identical, again.compared, again.notes) == (True, compared, [])
    assert encode(again.fresh, again.now) == content
    picture, provenance, _ = read(content)
    picture.paste((0, 0, 0), (0, 0, 16, 16))
    again = replay.replay(encode(picture, provenance), catalog)
    assert again.difference is not None
    assert again.difference.first[1] < 16


def test_a_changed_pixel_is_found(catalog: Catalog, content: bytes) -> None:
    again = replay.replay(repainted(content, (10, 20), (12, 19)), catalog)
    assert not again.identical
    assert again.difference is not None
    assert again.difference.pixels == 2
    assert again.difference.first == (12, 19)
    assert again.difference.box == (10, 19, 13, 21)
    assert again.difference.largest >= 1
    assert again.notes == []


def test_other_weights_are_said_so(folder: Path, content: bytes, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, tmp_path / "other")
    weights = tmp_path / "other" / "tiny" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_out.bias"] += 0.5
    save_file(tensors, weights, {"format": "pt"})
    again = replay.replay(content, load_catalog(tmp_path / "other" / "pipelines.toml"))
    assert not again.identical
    assert len(again.notes) == 1
    assert again.notes[0].startswith("The weights of pipeline tiny have changed: ")


def test_everything_that_differs_is_noted(catalog: Catalog, content: bytes) -> None:
    _picture, provenance, _ = read(content)
    versions = {**provenance.versions, "torch": "1.0", "xformers": "0.1"}
    again = replay.replay(altered(content, device="cpu SPARC", versions=versions), catalog)
    assert again.identical
    assert [line.split(" is ")[0] for line in again.notes] == ["The device", "torch", "xformers"]
    assert all("it was" in line for line in again.notes)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"frame": {"pipeline": "gone"}}, "is not in this catalog. It has tiny"),
        ({"frame": {"bucket": 10**9}}, "damaged: bucket"),
        ({"frame": {"seed": -1}}, "damaged: seed"),
        ({"frame": {"params": {**SIZE, "steps": 10**9}}}, "damaged: .*1000"),
        ({"frame": {"params": {**SIZE, "width": 4096}}}, "was resized: it is 64x64"),
        ({"threads": 10**6}, "damaged: 1000000 threads"),
        ({"dtype": "__doc__"}, "damaged: dtype"),
    ],
)
def test_claims_that_no_worker_wrote_are_refused(
    catalog: Catalog, content: bytes, changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(InvalidRequest, match=complaint):
        replay.replay(altered(content, **changes), catalog)


def test_another_kind_of_picture_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="its mode is L"):
        replay.compare(Image.new("L", (8, 8)), Image.new("RGB", (8, 8)))


@pytest.fixture
def commands(folder: Path, tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of `good.png` and `bad.png`, with the catalog set."""
    monkeypatch.delenv("FARM_DATA", raising=False)
    monkeypatch.setenv("FARM_PIPELINES", str(folder / "pipelines.toml"))
    (tmp_path / "good.png").write_bytes(content)
    (tmp_path / "bad.png").write_bytes(repainted(content, (3, 4)))
    return tmp_path


def test_the_command_says_identical(commands: Path) -> None:
    outcome = farm("replay", str(commands / "good.png"), "--save", str(commands / "again.png"))
    assert outcome.code == 0
    assert outcome.out.startswith("identical  all 4,096 pixels")
    assert (commands / "again.png").read_bytes() == (commands / "good.png").read_bytes()


def test_the_command_says_differs(commands: Path) -> None:
    outcome = farm("replay", str(commands / "bad.png"))
    assert outcome.code == 1
    assert outcome.out.startswith("differs  1 of 4,096 pixels")
    assert "the first at x 3, y 4, all within x 3 to 3, y 4 to 4" in outcome.out


def test_the_command_prints_json(commands: Path) -> None:
    outcome: Outcome = farm("replay", str(commands / "bad.png"), "--json")
    assert outcome.code == 1
    assert outcome.out.count("\n") == 1
    assert outcome.json["identical"] is False
    assert outcome.json["difference"]["box"] == [3, 4, 4, 5]


@pytest.mark.parametrize(
    ("content_of_file", "complaint"),
    [(b"hello", "not a PNG"), (None, "cannot be read: No such file")],
)
def test_what_is_no_picture_is_one_line(
    commands: Path, content_of_file: bytes | None, complaint: str
) -> None:
    path = commands / "other.png"
    if content_of_file is not None:
        path.write_bytes(content_of_file)
    outcome = farm("replay", str(path))
    assert (outcome.code, outcome.out) == (1, "")
    assert complaint in outcome.err.splitlines()[-1]


STEERED = """
[pipelines.steered]
source = "tiny"
device = "cpu"
controlnets = ["net"]
channels_last = true
"""


def test_a_steered_picture_needs_the_image_that_steered_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The replay needs the worker's control image and the same memory layout of the weights."""
    save("stable_diffusion", tmp_path / "tiny")
    save("controlnet", tmp_path / "net")
    (tmp_path / "pipelines.toml").write_text(STEERED)
    Image.effect_noise((48, 80), 80).convert("RGB").save(tmp_path / "pose.png")
    steering = normalised((tmp_path / "pose.png").read_bytes(), "image/png", max_pixels=10**6)
    image_id = steering.sha256.hex()
    resolved = resolve_pipeline(
        "steered", load_catalog(tmp_path / "pipelines.toml").pipelines["steered"]
    )
    params = resolved.params({"steps": 2, "control": [{"image": image_id, "scale": 0.7}]})
    prepare_torch(1)
    frame = FrameSpec(pipeline="steered", prompt="a", seed=1, bucket=1, params=params.model_dump())
    loaded = resolved.family.load(resolved.pipeline)
    images = {image_id: decoded(steering.content, image_id)}
    picture = resolved.family.denoise(loaded, Batch([frame], images=images))[0]
    assert picture is not None
    provenance = Provenance(
        frame=frame,
        weights=loaded.weights,
        device=device_name("cpu"),
        dtype=loaded.dtype,
        threads=1,
        versions=library_versions(),
        options=dict(loaded.options),
    )
    assert provenance.options == {"channels_last": True}
    (tmp_path / "steered.png").write_bytes(encode(picture, provenance))

    for name in ("FARM_DATA", "FARM_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FARM_PIPELINES", str(tmp_path / "pipelines.toml"))
    without = farm("replay", str(tmp_path / "steered.png"))
    assert without.code == 1
    assert f"--control: missing the file of control image {image_id}" in without.err
    given = farm("replay", str(tmp_path / "steered.png"), "--control", str(tmp_path / "pose.png"))
    assert given.code == 0, given.err
    assert given.out.startswith("identical")
