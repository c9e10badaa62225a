"""Forms of several parts, with which clients send files; read from bytes that are all there, and were counted."""

from __future__ import annotations

import re

from bluejay.errors import InvalidRequest

MAX_PARTS = 8
MAX_HEADER_BYTES = 4096  # of one part

_BOUNDARY = re.compile(r';\s*boundary=(?:"([^"]{1,70})"|([^\s";,]{1,70}))', re.IGNORECASE)
_NAME = re.compile(
    rb'^content-disposition:\s*form-data\s*;(?:.*;)?\s*name="([^"]{1,100})"', re.IGNORECASE | re.MULTILINE
)
_ENCODING = re.compile(rb"^content-transfer-encoding:\s*(\S+)", re.IGNORECASE | re.MULTILINE)


def is_form(content_type: str) -> bool:
    """Whether a body of this type is such a form."""
    return content_type.partition(";")[0].strip().lower() == "multipart/form-data"


def read_form(content_type: str, body: bytes) -> dict[str, bytes]:
    """The parts by their names.

    Raises: InvalidRequest for a form that is none, is cut off, or has more than a few parts.
    Source: RFC 7578, RFC 2046 section 5.1.
    """
    found = _BOUNDARY.search(content_type)
    if found is None:
        raise InvalidRequest("the form's Content-Type names no boundary")
    boundary = (found[1] or found[2]).encode("latin-1", "replace")  # as headers are read
    # What stands before the first boundary is for nobody; then each part, then "--" behind the last boundary.
    pieces = (b"\r\n" + body).split(b"\r\n--" + boundary, MAX_PARTS + 2)[1:]
    if len(pieces) > MAX_PARTS + 1:
        raise InvalidRequest(f"the form has more than {MAX_PARTS} parts")
    if not pieces or not pieces[-1].startswith(b"--"):
        raise InvalidRequest("the form is cut off: its last boundary is not there")
    parts: dict[str, bytes] = {}
    for piece in pieces[:-1]:
        name, data = _read_part(piece)
        if name in parts:
            raise InvalidRequest(f"the form has the part {name!r} twice")
        parts[name] = data
    return parts


def _read_part(piece: bytes) -> tuple[str, bytes]:
    end = piece.find(b"\r\n\r\n", 0, MAX_HEADER_BYTES)
    if end < 0 or not piece.lstrip(b" \t").startswith(b"\r\n"):
        raise InvalidRequest(f"a part of the form has no headers, or more than {MAX_HEADER_BYTES:,} bytes of them")
    headers = piece[:end]
    encoding = _ENCODING.search(headers)
    if encoding is not None and encoding[1].lower() not in (b"binary", b"8bit", b"7bit"):
        raise InvalidRequest(f"a part of the form comes in {encoding[1][:40].decode('latin-1')}, expected binary")
    name = _NAME.search(headers)
    if name is None:
        raise InvalidRequest("a part of the form has no name")
    return name[1].decode("latin-1"), piece[end + 4 :]
