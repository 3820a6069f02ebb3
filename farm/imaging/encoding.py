"""Encode an image with its provenance as a PNG, JPEG or WebP file, and read it back.

The expensive parts of encoding release the interpreter lock. The same image and provenance give the
same bytes, with the library versions that the provenance lists.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable

from PIL import Image, UnidentifiedImageError
from pydantic import ValidationError

from farm.domain.image_formats import Format
from farm.domain.spec import FrameSpec
from farm.errors import InvalidRequest, RenderError
from farm.imaging.exif_xmp import exif, provenance_of, xmp
from farm.imaging.png import png
from farm.imaging.provenance import Provenance, ProvenanceWriter, RenderEnvironment

KEYWORD = "farm"
"""Keyword of the PNG chunk with the farm's own JSON."""

JPEG_QUALITY = 95
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
"""Exceptions of Pillow for images that are damaged, or made to do harm."""


class Encoder:
    """Encodes the images of one loaded pipeline. Safe to share between threads."""

    def __init__(
        self, environment: RenderEnvironment, threads_of: Callable[[FrameSpec], int] | None = None
    ) -> None:
        """Encode with the provenance of this environment; see ProvenanceWriter."""
        self._provenance = ProvenanceWriter(environment, threads_of)

    def provenance(self, frame: FrameSpec) -> str:
        """Return everything that decides the bytes of a frame's file, as JSON."""
        return self._provenance.json(frame)

    def kept_apart(self, frame: FrameSpec) -> str | None:
        """Return the provenance of a frame whose file must not hold it; else None."""
        return self.provenance(frame) if frame.metadata == "none" else None

    def encode(self, image: Image.Image, frame: FrameSpec) -> bytes:
        """Encode a frame's image in the format of the frame.

        Raises:
            RenderError: that format cannot store the image or its texts.
        """
        try:
            if frame.metadata == "none":
                return _without_texts(image, frame.format)
            own, shown = self._provenance.json(frame), self._provenance.parameters(frame)
            if frame.format == "png":
                return png(image, {KEYWORD: own, "parameters": shown})
            return _by_pillow(image, frame.format, exif(shown), xmp(own))
        except (OSError, ValueError) as error:
            raise RenderError(f"The picture cannot be stored as {frame.format}: {error}") from error


def encode(image: Image.Image, provenance: Provenance) -> bytes:
    """Encode one image in the format of its frame, with its provenance.

    Raises:
        RenderError: that format cannot store the image or its texts.
    """
    return Encoder(provenance).encode(image, provenance.frame)


def pixels_as_stored(image: Image.Image, form: Format) -> Image.Image:
    """Return an image as it is read back from a file. JPEG changes its pixels."""
    if form != "jpeg":
        return image
    return Image.open(io.BytesIO(_by_pillow(image, form, b"", b"")))


def _without_texts(image: Image.Image, form: Format) -> bytes:
    return png(image, {}) if form == "png" else _by_pillow(image, form, b"", b"")


def _by_pillow(image: Image.Image, form: Format, exif_block: bytes, xmp_packet: bytes) -> bytes:
    buffer = io.BytesIO()
    if form == "jpeg":
        # 4:4:4: colour keeps its full resolution.
        image.save(
            buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0, exif=exif_block, xmp=xmp_packet
        )
    else:
        # Method 0 is the fastest, and its files are already smaller than PNG (ADR 20).
        image.save(
            buffer,
            "WEBP",
            lossless=True,
            exact=True,
            method=0,
            quality=0,
            exif=exif_block,
            xmp=xmp_packet,
        )
    return buffer.getvalue()


def read_pixels(content: bytes) -> Image.Image:
    """Read an image of a format that the farm writes, from any origin.

    Raises:
        InvalidRequest: the file is not a PNG, JPEG or WebP, or is damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # Only these: Pillow passes some other formats to external programs.
            image = Image.open(io.BytesIO(content), formats=["PNG", "JPEG", "WEBP"])
            image.load()
            return image
    except UnidentifiedImageError as error:
        raise InvalidRequest(
            "The file is not a PNG, JPEG or WebP, or its beginning is damaged."
        ) from error
    except UNREADABLE as error:
        raise InvalidRequest(f"The picture cannot be read: {error}.") from error


def read(content: bytes) -> tuple[Image.Image, Provenance, Format]:
    """Read an image, its provenance and its format.

    Raises:
        InvalidRequest: the file is not a PNG, JPEG or WebP, or was not rendered by the farm.
    """
    image = read_pixels(content)
    form = _format_of(image)
    text = image.info.get(KEYWORD) if form == "png" else provenance_of(image.info)
    if not isinstance(text, str):
        raise InvalidRequest(
            "The picture has no metadata of the farm, so it cannot be rendered again. Use the "
            "original file. If its job asked for files without metadata, pass the job and the "
            "ordinal: farm replay JOB ORDINAL."
        )
    return image, read_provenance(text), form


def read_provenance(text: str) -> Provenance:
    """Read a provenance.

    Raises:
        InvalidRequest: it is damaged.
    """
    try:
        return Provenance.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidRequest(
            f"The picture's metadata of the farm is damaged: {where}: {first['msg']}."
        ) from error


def _format_of(image: Image.Image) -> Format:
    if image.format == "PNG":
        return "png"
    return "webp" if image.format == "WEBP" else "jpeg"  # MPO too: a JPEG followed by more JPEGs
