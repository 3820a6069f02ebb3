"""Texts in JPEG and WebP files: the web UI's text in EXIF, the farm's JSON in XMP.

AUTOMATIC1111's web UI writes its `parameters` text of both formats into EXIF's UserComment, in
UTF-16. Readers such as sd-parsers look for it there. The farm's JSON is in an XMP packet (ISO
16684-1) as `farm:provenance`: XMP is UTF-8, and made for custom properties.
"""

from __future__ import annotations

import html
import re
import struct
from collections.abc import Mapping

EXIF_IFD, USER_COMMENT = 0x8769, 0x9286
LONG, UNDEFINED = 4, 7
COMMENT_AT = 44
"""Offset of the comment from the TIFF header: 8 bytes of header, 2 x 18 of directories."""

BEFORE = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:farm="urn:farm:provenance"><farm:provenance>'
)
AFTER = '</farm:provenance></rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
PROVENANCE = re.compile(rb"<farm:provenance>([^<]*)</farm:provenance>")
NO_XML = str.maketrans({"\ufffe": "\\ufffe", "\uffff": "\\uffff"})
"""Characters that XML cannot contain and JSON does not escape."""


def exif(comment: str) -> bytes:
    """Build an EXIF block whose only field is UserComment (EXIF 2.32, 4.6.5)."""
    body = b"UNICODE\0" + comment.encode("utf-16-be")
    return b"".join(
        (
            b"Exif\0\0MM\0*",
            struct.pack(">IHHHIII", 8, 1, EXIF_IFD, LONG, 1, 26, 0),
            struct.pack(">HHHIII", 1, USER_COMMENT, UNDEFINED, len(body), COMMENT_AT, 0),
            body,
        )
    )


def xmp(provenance: str) -> bytes:
    """Build an XMP packet with a JSON text."""
    return (BEFORE + html.escape(provenance.translate(NO_XML), quote=False) + AFTER).encode()


def provenance_of(info: Mapping[str | tuple[int, int], object]) -> str | None:
    """Find the farm's JSON in Pillow's `info`. Return None if there is none."""
    packet = info.get("xmp")
    found = PROVENANCE.search(packet) if isinstance(packet, bytes) else None
    return html.unescape(found[1].decode(errors="replace")) if found else None


def text_bytes(*texts: str) -> int:
    """Return the size of texts, in bytes, in the larger of the two blocks."""
    in_exif = sum(len(text.encode("utf-16-be")) for text in texts)
    in_xmp = 0
    for text in texts:
        escaped = html.escape(text.translate(NO_XML), quote=False)
        in_xmp += len(escaped.encode()) + sum(ESCAPED[c] for c in text if c in ESCAPED)
    return max(in_exif, in_xmp)


ESCAPED = {chr(code): 5 for code in range(32)} | {'"': 1, "\\": 1}
"""Maximum number of bytes that JSON adds to a character."""
