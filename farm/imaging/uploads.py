"""Image files from outside: checked before anything is decoded, and brought into one form. Pure.

What is kept of a file is what diffusers would make of it: turned upright as its EXIF says, then
`convert("RGB")`. It becomes a PNG without metadata, so the same content gives the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import ExifTags, Image
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from farm.errors import InvalidRequest, RenderError, UnsupportedMediaType

PNG, JPEG, WEBP = "image/png", "image/jpeg", "image/webp"

# Each by itself: Image.open would take any format that fits, and some are handed to programs.
OPENERS: Mapping[str, type[ImageFile]] = {
    PNG: PngImageFile,
    JPEG: JpegImageFile,
    WEBP: WebPImageFile,
}
ALLOWED = f"{PNG}, {JPEG} or {WEBP}"

IMAGE_ID = r"^[0-9a-f]{64}$"
"""The form of an image's id, the sha256 of what is kept, as a pattern of JSON Schema has it."""

MIN_SIDE = 8
"""Pixels of the smallest side."""

MAX_SCANS = 100
"""A JPEG's scans: each goes over the whole picture again, and usual files have at most a dozen."""

MAX_PARTS = 1_000
"""A file's parts, but for a PNG's pixels: each costs time whatever it holds, and more if packed."""

EIGHT_BITS = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK"})
"""Pillow's modes of 8 bits a channel or fewer."""

TURNS: Mapping[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF's orientation: what makes the picture upright."""

TEXTS = {b"tEXt", b"zTXt", b"iTXt", b"iCCP"}
TELLS_TURN = (b"Raw profile type exif\0", b"Raw profile type APP1\0", b"XML:com.adobe.xmp\0")
"""Keywords of texts in which Pillow looks for EXIF"""

# The next marker of a JPEG that has a length; FF 00 is data, FF D0 to D7 and FF 01 stand alone.
JPEG_MARKER = re.compile(rb"\xff([\x02-\xcf\xd8-\xfe])")
START_OF_SCAN, END_OF_IMAGE = b"\xda", b"\xd9"


@dataclass(frozen=True)
class NormalisedImage:
    """An image as the farm keeps it."""

    content: bytes
    """an RGB PNG without metadata"""
    width: int
    """pixels"""
    height: int
    """pixels"""

    @property
    def sha256(self) -> bytes:
        """The hash of its bytes."""
        return hashlib.sha256(self.content).digest()


def is_image_id(word: str) -> bool:
    """Whether a word has the form of an image's id."""
    return re.fullmatch(IMAGE_ID[1:-1], word) is not None


def media_type_of(content: bytes) -> str | None:
    """Tell a file's kind from its first bytes; None where it is not one that is taken."""
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return PNG
    if content.startswith(b"\xff\xd8\xff"):
        return JPEG
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return WEBP
    return None


def normalised(content: bytes, declared: str, *, max_pixels: int) -> NormalisedImage:
    """Check an image file, and bring it into the form that is kept.

    Args:
        content: the file.
        declared: its media type, as a Content-Type header has it.
        max_pixels: the limit of width times height, looked at before anything is decoded.

    Raises:
        UnsupportedMediaType: `declared` is not a kind that is taken.
        InvalidRequest: the file is of another kind, damaged, too large, too small, animated, or
            has more than 8 bits a channel.
    """
    kind = declared.partition(";")[0].strip().lower()
    kind = JPEG if kind == "image/jpg" else kind  # as many libraries call it
    if kind not in OPENERS:
        raise UnsupportedMediaType(
            f"Content-Type is {declared[:100]!r}; an image is sent as {ALLOWED}.",
            param="Content-Type",
        )
    found = media_type_of(content)
    if found != kind:
        raise InvalidRequest(
            f"Content-Type says {kind}, and the image is {found or f'not {ALLOWED}'}.",
            param="Content-Type",
        )
    picture = _picture(content, kind, max_pixels)
    return NormalisedImage(_png(picture), picture.width, picture.height)


def decoded(content: bytes, image_id: str) -> Image.Image:
    """Decode the PNG of a normalised image, as RGB.

    Raises:
        RenderError: it is not the image of this id.
    """
    if hashlib.sha256(content).hexdigest() != image_id:
        raise RenderError(f"What is kept as image {image_id} is another picture.")
    image = PngImageFile(io.BytesIO(content))
    image.load()
    return image.convert("RGB")


def _picture(content: bytes, kind: str, max_pixels: int) -> Image.Image:
    _check_size(_announced_size(content, kind), max_pixels)
    with _reading(kind):
        parts = list(itertools.islice(PARTS[kind](content), MAX_PARTS + 1))
    _check_parts(parts)
    lean = _without_texts(content) if kind == PNG else content
    with _reading(kind):
        image = OPENERS[kind](io.BytesIO(lean))
    _check_size(image.size, max_pixels)
    _check_form(image, kind)
    with _reading(kind):
        image.load()
        upright = image.transpose(turn) if (turn := _turn(image)) is not None else image
        upright.info = {}  # else a colour profile or a transparent colour would be saved with it
        return upright.convert("RGB")


@contextmanager
def _reading(kind: str) -> Iterator[None]:
    """Refuse a file that Pillow cannot read: for damaged ones it raises nearly anything."""
    try:
        yield
    except Exception as error:
        raise InvalidRequest(
            f"The image cannot be read as {kind}: it is damaged, cut short, or of a rare form.",
            param="image",
        ) from error


def _announced_size(content: bytes, kind: str) -> tuple[int, int] | None:
    """Read width and height from the file's first bytes; None: known only once it is opened.

    A WebP's decoder takes its memory when it is opened, so its size must be known before.
    """
    head = content[:30].ljust(30, b"\0")
    part = head[12:16]
    if kind == PNG and part == b"IHDR":
        width, height = struct.unpack_from(">II", head, 16)
        return width, height
    if kind != WEBP:
        return None
    if part == b"VP8X":
        return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    if part == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack_from("<HH", head, 26)
    return width & 0x3FFF, height & 0x3FFF


def _check_size(size: tuple[int, int] | None, max_pixels: int) -> None:
    if size is None:
        return
    width, height = size
    if width * height > max_pixels:
        raise InvalidRequest(
            f"The image is {width}x{height}, which is {width * height} pixels; the limit is "
            f"{max_pixels}.",
            param="image",
        )
    if min(size) < MIN_SIDE:
        raise InvalidRequest(
            f"The image is {width}x{height} pixels; each side must have at least {MIN_SIDE}.",
            param="image",
        )


def _check_form(image: ImageFile, kind: str) -> None:
    # Pillow gives an animated PNG a media type of its own.
    if getattr(image, "n_frames", 1) > 1 or image.get_format_mimetype() != kind:
        raise InvalidRequest("The image is animated; send a single picture.", param="image")
    # Of 16-bit colours Pillow would drop the lower half without a word.
    sixteen = any(";16" in str(tile.args) for tile in image.tile)
    if sixteen or image.mode not in EIGHT_BITS:
        raise InvalidRequest(
            "The image has more than 8 bits a channel; convert it to 8 bits first.", param="image"
        )


def _check_parts(parts: Sequence[bytes]) -> None:
    if len(parts) > MAX_PARTS or parts.count(START_OF_SCAN) > MAX_SCANS:
        raise InvalidRequest(
            f"The image is a file of more than {MAX_PARTS} parts, or {MAX_SCANS} scans; save it "
            "in a simpler form.",
            param="image",
        )


def _jpeg_parts(content: bytes) -> Iterator[bytes]:
    """Walk through a JPEG's markers to its end, which decoding does not wait for.

    Raises:
        EOFError: it has no end.
    """
    at = 2
    while found := JPEG_MARKER.search(content, at):
        if found[1] == END_OF_IMAGE:
            return
        yield found[1]
        at = found.end() + max(2, int.from_bytes(content[found.end() : found.end() + 2], "big"))
    raise EOFError


def _png_parts(content: bytes) -> Iterator[bytes]:
    """Walk through a PNG's chunks to its end, with their checksums: decoding passes over both.

    Raises:
        struct.error: it has no end.
        ValueError: a checksum is wrong.
    """
    for name, begin, end in _png_chunks(content):
        if struct.unpack_from(">I", content, end - 4)[0] != zlib.crc32(
            content[begin + 4 : end - 4]
        ):
            raise ValueError(name)
        if name != b"IDAT":
            yield name


def _png_chunks(content: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Give the name of each chunk, and from where to where it goes.

    Raises:
        struct.error: the file has no end.
    """
    at, name = 8, b""
    while name != b"IEND":
        length, name = struct.unpack_from(">I4s", content, at)
        end = at + 12 + length
        yield name, at, end
        at = end


def _without_texts(content: bytes) -> bytes:
    """Leave out a PNG's colour profile and texts: nothing of them is kept, and Pillow refuses a
    file where they are large. A text that may say which side is up stays."""
    kept = [content[:8]]
    for name, begin, end in _png_chunks(content):
        if name not in TEXTS or content.startswith(TELLS_TURN, begin + 8):
            kept.append(content[begin:end])
    return b"".join(kept)


def _no_parts(_content: bytes) -> Iterator[bytes]:
    """A WebP's own decoder goes through it whole before it decodes anything."""
    return iter(())


PARTS: Mapping[str, Callable[[bytes], Iterator[bytes]]] = {
    PNG: _png_parts,
    JPEG: _jpeg_parts,
    WEBP: _no_parts,
}


def _turn(image: ImageFile) -> Image.Transpose | None:
    """What makes a picture upright; None: nothing, or its EXIF cannot be read."""
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # Pillow raises nearly anything here too, and the picture itself is whole
        return None


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=1, compress_type=3)  # quick; as artifacts are
    return buffer.getvalue()
