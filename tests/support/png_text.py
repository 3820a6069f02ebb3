"""sd-parsers: an independent reader of the text that web UIs write into pictures."""

from __future__ import annotations

import sys
from typing import IO

from sd_parsers import ParserManager
from sd_parsers.data import PromptInfo

REMEMBERING = ("_jpeg_usercomment", "_png_stenographic_alpha")
"""Its modules that cache the last picture's text by `id()`. A later picture may have the same."""


def parsed(picture: str | IO[bytes]) -> PromptInfo:
    """Read a picture's text, with the caches of earlier pictures cleared.

    Args:
        picture: a path, or an open file.
    """
    for name in REMEMBERING:
        vars(sys.modules[f"sd_parsers.extractors.{name}"])["_image_id"] = None
    info = ParserManager().parse(picture)
    assert info is not None, "it found no text"
    return info
