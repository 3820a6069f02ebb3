"""Contact sheet: pictures in rows, each row with its prompt, and columns with their heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont, ImageOps

CELL = 144
"""Width and height of a picture on the sheet, in pixels."""

GAP = 14
MARGIN = 40
LABEL_WIDTH = 208
TITLE_HEIGHT = 92
HEAD_HEIGHT, HEAD_LINE = 30, 18
CORNER = 8

PAPER = (250, 249, 246)
INK = (34, 36, 42)
FAINT = (128, 130, 136)
EDGE = (222, 220, 214)

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


@dataclass(frozen=True)
class Row:
    """A prompt and its pictures."""

    prompt: str
    pictures: Sequence[Image.Image | None]
    """None: there is no picture."""


def contact_sheet(
    title: str, subtitle: str, heads: Sequence[str], rows: Sequence[Row]
) -> Image.Image:
    """Draw pictures in rows, with the prompts on the left and `heads` above the columns."""
    font = _font(14)
    tops = [
        [part for line in head.split("\n") for part in wrapped(line, CELL, font)] for head in heads
    ]
    width = 2 * MARGIN + LABEL_WIDTH + len(heads) * (CELL + GAP) - GAP
    top = MARGIN + TITLE_HEIGHT + HEAD_HEIGHT + HEAD_LINE * (max(map(len, tops), default=1) - 1)
    sheet = Image.new("RGB", (width, top + len(rows) * (CELL + GAP) - GAP + MARGIN), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN), title, INK, _font(34))
    pen.text((MARGIN, MARGIN + 46), subtitle, FAINT, _font(16))
    for index, lines in enumerate(tops):
        centre = MARGIN + LABEL_WIDTH + index * (CELL + GAP) + CELL // 2
        for above, line in enumerate(reversed(lines)):
            pen.text((centre, top - 12 - above * HEAD_LINE), line, FAINT, font, anchor="ms")
    for number, row in enumerate(rows):
        y = top + number * (CELL + GAP)
        _label(pen, row.prompt, y + CELL // 2)
        for index, picture in enumerate(row.pictures):
            _place(sheet, picture, MARGIN + LABEL_WIDTH + index * (CELL + GAP), y)
    return sheet


def _place(sheet: Image.Image, picture: Image.Image | None, x: int, y: int) -> None:
    """Draw a picture in the middle of its cell, with round corners and a thin outline."""
    pen = ImageDraw.Draw(sheet)
    if picture is None:
        pen.rounded_rectangle((x - 1, y - 1, x + CELL, y + CELL), CORNER + 1, outline=EDGE)
        pen.text((x + CELL // 2, y + CELL // 2), "no picture", FAINT, _font(14), anchor="mm")
        return
    size = CELL, CELL
    scaled = ImageOps.contain(picture.convert("RGB"), size, Image.Resampling.LANCZOS)
    width, height = scaled.size
    x, y = x + (CELL - width) // 2, y + (CELL - height) // 2
    # The mask is drawn four times as large and scaled down, so that the corners are smooth.
    mask = Image.new("L", (4 * width, 4 * height), 0)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, 4 * width, 4 * height), 4 * CORNER, fill=255)
    sheet.paste(scaled, (x, y), mask.resize(scaled.size, Image.Resampling.LANCZOS))
    pen.rounded_rectangle((x - 1, y - 1, x + width, y + height), CORNER + 1, outline=EDGE)


def _label(pen: ImageDraw.ImageDraw, prompt: str, middle: int) -> None:
    font = _font(18)
    text = "\n".join(wrapped(prompt, LABEL_WIDTH - 24, font))
    pen.multiline_text((MARGIN, middle), text, INK, font, anchor="lm", spacing=7)


def wrapped(text: str, width: int, font: Font) -> list[str]:
    """Break a text into lines of at most `width` pixels, between words."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _font(size: int) -> Font:
    return ImageFont.load_default(size)
