"""Server-sent events, as streams of OpenAI's and of KServe's generate are sent.

Source: WHATWG HTML, section 9.2, "Server-sent events".
"""

from __future__ import annotations

import json
from typing import Any

from bluejay.server.dumps import dumps_in_parts

# What follows `data: ` never holds a line break: in JSON they are escaped.
DONE = b"data: [DONE]\n\n"


def event(data: Any) -> bytes:
    """One event that carries JSON."""
    return b"data: " + json.dumps(data, allow_nan=False, separators=(",", ":")).encode() + b"\n\n"


def large_event(data: Any) -> bytes:
    """The same event, written in a thread: others get their turn meanwhile."""
    return b"data: " + dumps_in_parts(data, ensure_ascii=True).encode() + b"\n\n"


class TextEvents:
    """Events that differ in nothing but one text: what stands around it is written once.

    Args:
        data: of the event, with `MARK` where the text goes.
    """

    MARK = "\0text\0"

    def __init__(self, data: Any) -> None:
        before, after = event(data).split(json.dumps(self.MARK).encode())
        self._before, self._after = before, after

    def event(self, text: str) -> bytes:
        """The event with this text."""
        return b"%b%b%b" % (self._before, _quoted(text).encode(), self._after)


_quoted = json.encoder.encode_basestring_ascii  # what json.dumps makes of a text, without the way there
