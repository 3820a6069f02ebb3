"""Contact sheet: a job's pictures in rows, each row with its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

CELL = 144
"""Width and height of a picture on the sheet, in pixels."""

GAP = 14
MARGIN = 40
LABEL_WIDTH = 208
TITLE_HEIGHT = 92
HEAD_HEIGHT = 30
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
    pictures: Sequence[Image.Image]


def contact_sheet(
    title: str, subtitle: str, heads: Sequence[str], rows: Sequence[Row]
) -> Image.Image:
    """Draw pictures in rows, with the prompts on the left and `heads` above the columns."""
    width = 2 * MARGIN + LABEL_WIDTH + len(heads) * (CELL + GAP) - GAP
    top = MARGIN + TITLE_HEIGHT + HEAD_HEIGHT
    sheet = Image.new("RGB", (width, top + len(rows) * (CELL + GAP) - GAP + MARGIN), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN), title, INK, _font(34))
    pen.text((MARGIN, MARGIN + 46), subtitle, FAINT, _font(16))
    for index, head in enumerate(heads):
        centre = MARGIN + LABEL_WIDTH + index * (CELL + GAP) + CELL // 2
        pen.text((centre, top - 12), head, FAINT, _font(14), anchor="ms")
    for number, row in enumerate(rows):
        y = top + number * (CELL + GAP)
        _label(pen, row.prompt, y + CELL // 2)
        for index, picture in enumerate(row.pictures):
            _place(sheet, picture, MARGIN + LABEL_WIDTH + index * (CELL + GAP), y)
    return sheet


def _place(sheet: Image.Image, picture: Image.Image, x: int, y: int) -> None:
    """Draw a picture in its cell, with round corners and a thin outline."""
    scaled = picture.convert("RGB").resize((CELL, CELL), Image.Resampling.LANCZOS)
    # The mask is drawn four times as large and scaled down, so that the corners are smooth.
    mask = Image.new("L", (4 * CELL, 4 * CELL), 0)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, 4 * CELL, 4 * CELL), 4 * CORNER, fill=255)
    sheet.paste(scaled, (x, y), mask.resize((CELL, CELL), Image.Resampling.LANCZOS))
    outline = (x - 1, y - 1, x + CELL, y + CELL)
    ImageDraw.Draw(sheet).rounded_rectangle(outline, CORNER + 1, outline=EDGE)


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
