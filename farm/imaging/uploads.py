"""Uploaded image files: checked before decoding, and normalised to one format. Pure functions.

The stored image is what diffusers would make of the file: turned upright by its EXIF, then
`convert("RGB")`. It is a PNG without metadata, so the same content gives the same bytes.
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

from farm.domain.image_formats import JPEG, PNG, WEBP, media_type_of
from farm.errors import InvalidRequest, RenderError, UnsupportedMediaType

# One opener per type: Image.open accepts any format, and passes some to external programs.
OPENERS: Mapping[str, type[ImageFile]] = {
    PNG: PngImageFile,
    JPEG: JpegImageFile,
    WEBP: WebPImageFile,
}
ALLOWED = f"{PNG}, {JPEG} or {WEBP}"


MIN_SIDE = 8
"""Minimum width and height, in pixels."""

MAX_SCANS = 100
"""Maximum number of scans of a JPEG. Each decodes the whole image again; a dozen is usual."""

MAX_PARTS = 1_000
"""Maximum number of parts of a file, without a PNG's pixels. Each costs time, more if packed."""

EIGHT_BITS = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK"})
"""Modes of Pillow with 8 bits per channel or fewer."""

TURNS: Mapping[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transposition that turns an image upright, by its EXIF orientation."""

TEXTS = {b"tEXt", b"zTXt", b"iTXt", b"iCCP"}
TELLS_TURN = (b"Raw profile type exif\0", b"Raw profile type APP1\0", b"XML:com.adobe.xmp\0")
"""Keywords of texts in which Pillow looks for EXIF."""

# The next JPEG marker with a length. FF 00 is data; FF D0 to D7 and FF 01 have no length.
JPEG_MARKER = re.compile(rb"\xff([\x02-\xcf\xd8-\xfe])")
START_OF_SCAN, END_OF_IMAGE = b"\xda", b"\xd9"


@dataclass(frozen=True)
class NormalisedImage:
    """An image as the farm stores it."""

    content: bytes
    """An RGB PNG without metadata."""
    width: int
    """Width, in pixels."""
    height: int
    """Height, in pixels."""

    @property
    def sha256(self) -> bytes:
        """The hash of its bytes."""
        return hashlib.sha256(self.content).digest()


def normalised(content: bytes, declared: str, *, max_pixels: int) -> NormalisedImage:
    """Check an image file, and convert it to the stored form.

    Args:
        content: the file.
        declared: its media type, from the Content-Type header.
        max_pixels: maximum of width times height, checked before decoding.

    Raises:
        UnsupportedMediaType: `declared` is not an allowed type.
        InvalidRequest: the file has another type, is damaged, too large, too small, animated, or
            has more than 8 bits per channel.
    """
    kind = declared.partition(";")[0].strip().lower()
    kind = JPEG if kind == "image/jpg" else kind  # the name in many libraries
    if kind not in OPENERS:
        raise UnsupportedMediaType(
            f"Content-Type: {declared[:100]!r} is not allowed. Send an image as {ALLOWED}.",
            param="Content-Type",
        )
    found = media_type_of(content)
    if found != kind:
        raise InvalidRequest(
            f"Content-Type: says {kind}, but the image is {found or f'not {ALLOWED}'}.",
            param="Content-Type",
        )
    picture = _picture(content, kind, max_pixels)
    return NormalisedImage(_png(picture), picture.width, picture.height)


def decoded(content: bytes, image_id: str) -> Image.Image:
    """Decode the PNG of a normalised image, as RGB.

    Raises:
        RenderError: the content is not the image with this ID.
    """
    if hashlib.sha256(content).hexdigest() != image_id:
        raise RenderError(
            f"The stored object of image {image_id} has other content. Upload the image again."
        )
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
        upright.info = {}  # or a colour profile or transparent colour would be saved too
        return upright.convert("RGB")


@contextmanager
def _reading(kind: str) -> Iterator[None]:
    """Refuse a file that Pillow cannot read. On damaged files it raises almost any exception."""
    try:
        yield
    except Exception as error:
        raise InvalidRequest(
            f"The image cannot be read as {kind}: it is damaged, cut short, or in a rare form. "
            "Save it again with another program.",
            param="image",
        ) from error


def _announced_size(content: bytes, kind: str) -> tuple[int, int] | None:
    """Read width and height from the first bytes. None if only opening the file shows them.

    A WebP decoder allocates its memory when it opens the file, so its size is checked before.
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
            f"{max_pixels}. Scale it down.",
            param="image",
        )
    if min(size) < MIN_SIDE:
        raise InvalidRequest(
            f"The image is {width}x{height} pixels; each side must have at least {MIN_SIDE}.",
            param="image",
        )


def _check_form(image: ImageFile, kind: str) -> None:
    # For an animated PNG, Pillow returns another media type.
    if getattr(image, "n_frames", 1) > 1 or image.get_format_mimetype() != kind:
        raise InvalidRequest("The image is animated; send a single picture.", param="image")
    # Pillow silently drops the lower half of 16-bit colours.
    sixteen = any(";16" in str(tile.args) for tile in image.tile)
    if sixteen or image.mode not in EIGHT_BITS:
        raise InvalidRequest(
            "The image has more than 8 bits per channel; convert it to 8 bits first.", param="image"
        )


def _check_parts(parts: Sequence[bytes]) -> None:
    if len(parts) > MAX_PARTS or parts.count(START_OF_SCAN) > MAX_SCANS:
        raise InvalidRequest(
            f"The image file has more than {MAX_PARTS} parts, or {MAX_SCANS} scans; save it in a "
            "simpler form.",
            param="image",
        )


def _jpeg_parts(content: bytes) -> Iterator[bytes]:
    """Iterate over a JPEG's markers up to its end marker, which decoding does not check.

    Raises:
        EOFError: the file has no end marker.
    """
    at = 2
    while found := JPEG_MARKER.search(content, at):
        if found[1] == END_OF_IMAGE:
            return
        yield found[1]
        at = found.end() + max(2, int.from_bytes(content[found.end() : found.end() + 2], "big"))
    raise EOFError


def _png_parts(content: bytes) -> Iterator[bytes]:
    """Iterate over a PNG's chunks, checking its end and checksums, which decoding skips.

    Raises:
        struct.error: the file has no end.
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
    """Yield the name, start and end of each chunk.

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
    """Remove a PNG's colour profile and texts, which are not stored. Pillow refuses files in which
    they are large. Texts that may contain the orientation stay."""
    kept = [content[:8]]
    for name, begin, end in _png_chunks(content):
        if name not in TEXTS or content.startswith(TELLS_TURN, begin + 8):
            kept.append(content[begin:end])
    return b"".join(kept)


def _no_parts(_content: bytes) -> Iterator[bytes]:
    """Return no parts: a WebP decoder checks the whole file before it decodes."""
    return iter(())


PARTS: Mapping[str, Callable[[bytes], Iterator[bytes]]] = {
    PNG: _png_parts,
    JPEG: _jpeg_parts,
    WEBP: _no_parts,
}


def _turn(image: ImageFile) -> Image.Transpose | None:
    """Return the transposition that turns an image upright. None without readable EXIF."""
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # Pillow raises almost any exception here too; the pixels are fine
        return None


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=1, compress_type=3)  # fast, like artifacts
    return buffer.getvalue()
