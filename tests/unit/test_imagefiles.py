"""Image files from users: accepted ones are decoded as by diffusers, all others are refused."""

from __future__ import annotations

import hashlib
import io
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image, ImageOps, PngImagePlugin
from PIL.ImageCms import ImageCmsProfile, createProfile

from farm.domain.image_formats import is_image_id, media_type_of
from farm.errors import FarmError, InvalidRequest, UnsupportedMediaType
from farm.imaging.uploads import NormalisedImage, normalised

MAX_PIXELS = 4096 * 4096
SIZE = (24, 16)
FORMATS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}


def picture(mode: str = "RGB", size: tuple[int, int] = SIZE) -> Image.Image:
    """Return a picture of every colour. All its rotations differ."""
    grey = Image.linear_gradient("L").resize(size)
    colours = Image.merge("RGB", (grey, grey.transpose(Image.Transpose.ROTATE_180), grey))
    colours.paste((250, 20, 40), (0, 0, size[0] // 3, size[1] // 3))
    if mode in ("LA", "RGBA", "PA"):
        colours = colours.convert("RGBA")
        colours.putalpha(grey)
    return colours.convert("P").convert("PA") if mode == "PA" else colours.convert(mode)


def file(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def taken(content: bytes, kind: str = "PNG", max_pixels: int = MAX_PIXELS) -> NormalisedImage:
    return normalised(content, FORMATS[kind], max_pixels=max_pixels)


def seen(image: NormalisedImage) -> Image.Image:
    found = Image.open(io.BytesIO(image.content), formats=["PNG"])
    assert (found.mode, found.size) == ("RGB", (image.width, image.height))
    assert found.info == {}
    return found


def as_diffusers(content: bytes) -> Image.Image:
    """Decode an image as diffusers.utils.load_image does."""
    opened = Image.open(io.BytesIO(content))
    opened.load()
    opened.info.pop("transparency", None)  # it makes convert() warn, but changes no colour
    return ImageOps.exif_transpose(opened).convert("RGB")


def refused(content: bytes, kind: str = "PNG", max_pixels: int = MAX_PIXELS) -> str:
    with pytest.raises(InvalidRequest) as caught:
        taken(content, kind, max_pixels)
    assert caught.value.param == "image"
    return caught.value.message


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, *, depth: int = 8, colour: int = 2, more: bytes = b"") -> bytes:
    """Build a PNG by hand: its header and these chunks."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more


def whole_png(rows: bytes, **header: int) -> bytes:
    data = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return png(header.pop("width"), header.pop("height"), more=data, **header)


# Accepted images


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *(("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
        *(("JPEG", mode) for mode in ("L", "RGB", "CMYK")),
        *(("WEBP", mode) for mode in ("RGB", "RGBA")),
    ],
)
def test_every_mode_becomes_what_diffusers_sees(kind: str, mode: str) -> None:
    content = file(picture(mode), kind)
    image = taken(content, kind)
    assert (image.width, image.height) == SIZE
    assert seen(image).tobytes() == as_diffusers(content).tobytes()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_fewer_bits_are_taken(bits: int) -> None:
    content = file(picture("L").quantize(2**bits), bits=bits)
    assert seen(taken(content)).tobytes() == as_diffusers(content).tobytes()


@pytest.mark.parametrize("transparency", [3, bytes(range(0, 256, 2))])
def test_a_palette_with_transparent_colours_keeps_them(transparency: int | bytes) -> None:
    content = file(picture("P"), transparency=transparency)
    assert seen(taken(content)).tobytes() == picture("P").convert("RGB").tobytes()


def test_an_interlaced_png_and_a_progressive_jpeg() -> None:
    content = file(picture(), "JPEG", progressive=True)
    assert seen(taken(content, "JPEG")).tobytes() == as_diffusers(content).tobytes()
    # Adam7 of a picture of one colour: seven passes, each row with its filter byte.
    passes = ((1, 1), (1, 1), (2, 1), (2, 2), (4, 2), (4, 4), (8, 4))
    rows = b"".join((b"\0" + b"\x07\x80\xf0" * width) * height for width, height in passes)
    header = struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 1)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    content += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert seen(taken(content)).tobytes() == b"\x07\x80\xf0" * 64


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("orientation", range(9))
def test_exif_turns_the_picture_upright(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = file(picture(), kind, exif=exif)
    image = taken(content, kind)
    assert (image.width, image.height) == (SIZE if orientation < 5 else SIZE[::-1])
    assert seen(image).tobytes() == as_diffusers(content).tobytes()


def test_orientation_stands_in_xmp_too() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    content = file(picture(), pnginfo=text)
    assert taken(content).width == SIZE[1]
    assert seen(taken(content)).tobytes() == as_diffusers(content).tobytes()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0nonsense", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01"]
)
def test_exif_that_cannot_be_read_turns_nothing(exif: bytes) -> None:
    content = file(picture(), "JPEG", exif=exif, quality=100)
    plain = file(picture(), "JPEG", quality=100)
    assert taken(content, "JPEG") == taken(plain, "JPEG")


def test_metadata_is_left_behind_and_the_same_content_has_the_same_bytes() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "secret")
    profile = ImageCmsProfile(createProfile("sRGB")).tobytes()
    plain = taken(file(picture()))
    for content in (
        file(picture(), pnginfo=text, icc_profile=profile, dpi=(300, 300)),
        file(picture(), compress_level=9),
        file(picture(), transparency=(250, 20, 40)),
        file(picture()) + b"what stands behind the end",
        plain.content,
    ):
        assert taken(content) == plain
    assert taken(file(picture(), "WEBP", lossless=True, icc_profile=profile), "WEBP") == plain
    assert b"secret" not in plain.content
    assert plain.sha256 == hashlib.sha256(plain.content).digest()


@pytest.mark.parametrize("name", ["profile", "packed text", "packed words", "plain text", "all"])
def test_large_profiles_and_texts_are_thrown_away_unread(name: str) -> None:
    """Pillow refuses more than a mebibyte of them, compressed or not."""
    large = bytes(range(256)) * 12_000  # 3 MB
    parts = {
        "profile": chunk(b"iCCP", b"p\0\0" + zlib.compress(large)),
        "packed text": chunk(b"zTXt", b"workflow\0\0" + zlib.compress(large)),
        "packed words": chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(b"a" * 3_000_000)),
        "plain text": chunk(b"tEXt", b"prompt\0" + b"a" * 3_000_000),
    }
    plain = file(picture())
    head, body = plain[:33], plain[33:]
    more = b"".join(parts.values()) if name == "all" else parts[name]
    assert taken(head + more + body) == taken(plain)


def test_a_jpeg_may_be_called_jpg() -> None:
    content = file(picture(), "JPEG")
    assert normalised(content, "image/jpg", max_pixels=MAX_PIXELS) == taken(content, "JPEG")


def test_a_telephones_jpeg_of_several_pictures_is_its_first() -> None:
    first = file(picture(), "JPEG")
    second = picture("L", (64, 64)).convert("RGB")
    buffer = io.BytesIO()
    picture().save(buffer, "MPO", save_all=True, append_images=[second])
    assert taken(buffer.getvalue(), "JPEG") == taken(first, "JPEG")


def test_the_declared_type_may_have_parameters() -> None:
    image = normalised(file(picture()), " Image/PNG; charset=binary", max_pixels=MAX_PIXELS)
    assert image == taken(file(picture()))


# Kinds


@pytest.mark.parametrize(
    "declared", ["", "image/gif", "text/plain", "image/*", "image/pjpeg", "\xff"]
)
def test_other_media_types_are_refused(declared: str) -> None:
    with pytest.raises(
        UnsupportedMediaType, match=r"image/png, image/jpeg or image/webp"
    ) as caught:
        normalised(file(picture()), declared, max_pixels=MAX_PIXELS)
    assert (caught.value.status, caught.value.param) == (415, "Content-Type")


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "EPS", "PPM", "ICO", "JPEG2000", "AVIF"])
@pytest.mark.parametrize("declared", FORMATS.values())
def test_other_formats_are_never_opened(
    kind: str, declared: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = file(picture(), kind)
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises(InvalidRequest, match=f"says {declared}, but the image is not"):
        normalised(content, declared, max_pixels=MAX_PIXELS)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("declared", FORMATS)
def test_a_content_of_another_kind_than_declared_is_refused(kind: str, declared: str) -> None:
    content = file(picture(), kind)
    if kind == declared:
        assert media_type_of(content) == FORMATS[kind]
        return
    with pytest.raises(InvalidRequest) as caught:
        taken(content, declared)
    assert caught.value.message == (
        f"Content-Type: says {FORMATS[declared]}, but the image is {FORMATS[kind]}."
    )
    assert caught.value.param == "Content-Type"


@pytest.mark.parametrize("content", [b"", b"\x89", b"\xff\xd8", b"RIFF", b"RIFF\0\0\0\0WEB", b"{}"])
def test_next_to_nothing_is_no_image(content: bytes) -> None:
    for kind in FORMATS:
        with pytest.raises(InvalidRequest, match="but the image is not image/png"):
            taken(content, kind)


# Forms


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_a_channel_are_refused(colour: int, channels: int) -> None:
    rows = (b"\0" + b"\x12\x34" * 8 * channels) * 8
    content = whole_png(rows, width=8, height=8, depth=16, colour=colour)
    assert "more than 8 bits per channel; convert it to 8 bits first" in refused(content)


def test_a_depth_map_of_sixteen_bits_is_refused() -> None:
    assert "more than 8 bits" in refused(file(picture("L").convert("I").convert("I;16")))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_animations_are_refused(kind: str) -> None:
    others = [picture().rotate(90), picture().rotate(180)]
    for count in (1, 2):
        content = file(picture(), kind, save_all=True, append_images=others[:count])
        assert "animated" in refused(content, kind)
    if kind == "PNG":
        still = file(picture(), save_all=True, append_images=others[:1], default_image=True)
        assert "animated" in refused(still)


def test_a_png_that_says_it_is_animated_is_refused() -> None:
    content = file(picture())
    one_frame = chunk(b"acTL", struct.pack(">II", 1, 0))
    assert "animated" in refused(content[:33] + one_frame + content[33:])


# Sizes


def webp(width: int, height: int, *, form: str) -> bytes:
    """Build the beginning of a WebP with this size in its header."""
    if form == "VP8X":
        sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
        part = b"VP8X" + struct.pack("<I", 10) + bytes(4) + sides
    elif form == "VP8L":
        bits = (width - 1) | (height - 1) << 14
        part = b"VP8L" + struct.pack("<I", 100) + b"\x2f" + struct.pack("<I", bits) + bytes(100)
    else:
        head = b"\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", width, height)
        part = b"VP8 " + struct.pack("<I", 100) + head + bytes(90)
    return b"RIFF" + struct.pack("<I", 4 + len(part)) + b"WEBP" + part


def jpeg(width: int, height: int) -> bytes:
    """Build a small JPEG with another size in its header."""
    content = bytearray(file(picture(), "JPEG"))
    at = content.index(b"\xff\xc0")
    content[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(content)


BOMBS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "a PNG's header alone": ("PNG", lambda: png(60_000, 60_000)),
    "a PNG of zeros": (
        "PNG",
        lambda: whole_png(bytes(10**7), width=60_000, height=60_000),
    ),
    "a JPEG": ("JPEG", lambda: jpeg(60_000, 60_000)),
    "a lossy WebP": ("WEBP", lambda: webp(16_383, 16_383, form="VP8")),
    "a lossless WebP": ("WEBP", lambda: webp(16_384, 16_384, form="VP8L")),
    "an extended WebP": ("WEBP", lambda: webp(2**24, 200, form="VP8X")),
    "an extended WebP beyond all sizes": ("WEBP", lambda: webp(2**24, 2**24, form="VP8X")),
    "a WebP that Pillow would open": ("WEBP", lambda: file(picture(size=(8, 16_383)), "WEBP")),
}


@pytest.mark.parametrize("case", BOMBS)
def test_too_many_pixels_are_refused_before_anything_is_decoded(case: str) -> None:
    kind, make = BOMBS[case]
    content = make()
    tracemalloc.start()
    message = refused(content, kind, max_pixels=100_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "; the limit is 100000. Scale it down." in message
    assert peak < 1_000_000


def test_a_second_header_does_not_get_around_the_limit() -> None:
    rest = chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    content = png(16, 16, more=png(60_000, 60_000)[8:] + rest)
    assert "60000x60000, which is 3600000000 pixels" in refused(content)


def test_the_limit_itself_is_allowed() -> None:
    content = file(picture())
    assert taken(content, max_pixels=24 * 16).width == 24
    assert refused(content, max_pixels=24 * 16 - 1) == (
        "The image is 24x16, which is 384 pixels; the limit is 383. Scale it down."
    )


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("size", [(7, 100), (100, 7), (1, 1)])
def test_a_side_has_eight_pixels_at_least(kind: str, size: tuple[int, int]) -> None:
    content = file(picture(size=size), kind)
    assert "each side must have at least 8" in refused(content, kind)
    assert taken(file(picture(size=(8, 8)), kind), kind).height == 8


def test_no_pixels_at_all() -> None:
    assert "each side must have at least 8" in refused(png(0, 100))
    assert "cannot be read" in refused(jpeg(24, 0), "JPEG")


def test_a_jpeg_of_endless_scans_is_refused() -> None:
    content = file(picture(), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    many = content[:-2] + content[last:-2] * 200 + content[-2:]
    assert "100 scans" in refused(many, "JPEG")
    few = content[:-2] + content[last:-2] * 5 + content[-2:]
    assert taken(few, "JPEG").width == SIZE[0]


def test_a_file_of_endless_parts_is_refused() -> None:
    content, photo = file(picture()), file(picture(), "JPEG")
    profile, comment = chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(10))), b"\xff\xfe\0\x02"
    for number, fits in ((900, True), (1_100, False)):
        many_chunks = content[:33] + profile * number + content[33:]
        many_segments = photo[:2] + comment * number + photo[2:]
        for many, kind in ((many_chunks, "PNG"), (many_segments, "JPEG")):
            if fits:
                assert taken(many, kind).width == SIZE[0]
            else:
                assert "more than 1000 parts" in refused(many, kind)


def test_pixels_in_many_small_chunks_are_taken() -> None:
    packed = zlib.compress(b"".join(b"\0" + bytes(range(192)) for _ in range(64)), level=0)
    chunks = b"".join(chunk(b"IDAT", packed[at : at + 5]) for at in range(0, len(packed), 5))
    image = taken(png(64, 64, more=chunks + chunk(b"IEND", b"")))
    assert seen(image).tobytes() == bytes(range(192)) * 64


def test_text_that_unfolds_is_not_unfolded() -> None:
    text = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(50_000_000)))
    content = file(picture())
    tracemalloc.start()
    assert taken(content[:33] + text + content[33:]) == taken(content)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 5_000_000


def test_text_that_tells_which_side_is_up_is_unfolded_to_a_limit() -> None:
    text = chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(50_000_000)))
    content = file(picture())
    assert "cannot be read" in refused(content[:33] + text + content[33:])


# Damage


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"lossless": True}])
def test_a_file_cut_short_is_refused_at_every_length(kind: str, options: dict[str, Any]) -> None:
    content = file(picture(), kind, **options)
    assert taken(content, kind).width == SIZE[0]
    lengths = [*range(16), *range(16, len(content), 23), *range(len(content) - 16, len(content))]
    for length in lengths:
        with pytest.raises(InvalidRequest):
            taken(content[:length], kind)


def test_a_png_with_a_wrong_bit_is_refused() -> None:
    content = file(picture())
    for place in range(8, len(content), 11):
        wrong = bytearray(content)
        wrong[place] ^= 0x10
        with pytest.raises(InvalidRequest):
            taken(bytes(wrong))


@pytest.mark.parametrize("kind", FORMATS)
def test_wrong_bytes_are_taken_or_refused_and_nothing_else(kind: str) -> None:
    content = file(picture(), kind, exif=b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0")
    for place in range(0, len(content), 5):
        for value in (0x00, 0x7F, 0xFF):
            wrong = bytearray(content)
            wrong[place] = value
            try:
                image = taken(bytes(wrong), kind, max_pixels=100_000)
            except FarmError as error:
                assert error.status == 422  # noqa: PT017 - not every wrong byte is an error
            else:
                seen(image)


@pytest.mark.parametrize(
    "content",
    [
        png(16, 16),
        png(16, 16, more=chunk(b"IEND", b"")),
        png(16, 16, more=chunk(b"IDAT", b"") + chunk(b"IEND", b"")),
        png(16, 16, more=chunk(b"IDAT", b"nonsense") + chunk(b"IEND", b"")),
        png(16, 16, depth=5, more=chunk(b"IDAT", b"") + chunk(b"IEND", b"")),
        png(16, 16, colour=9, more=chunk(b"IDAT", b"") + chunk(b"IEND", b"")),
        whole_png(bytes(100), width=16, height=16),
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        b"\x89PNG\r\n\x1a\n" + b"\xff" * 100,
    ],
)
def test_a_png_without_its_picture_is_refused(content: bytes) -> None:
    assert "cannot be read" in refused(content)


# Other cases


def test_ids_have_their_form() -> None:
    assert is_image_id("0123456789abcdef" * 4)
    for word in ("", "0" * 63, "0" * 65, "G" * 64, "A" * 64, "0" * 64 + "\n", " " + "0" * 63):
        assert not is_image_id(word)
