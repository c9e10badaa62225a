"""Events as they are sent."""

from __future__ import annotations

import json

import pytest

from bluejay.server import sse


@pytest.mark.parametrize(
    "text", ["plain", "", 'a "quote"', "two\r\nlines\n\n", "été 🐦 \u2028", "\0", "\\", "a half \ud83d"]
)
def test_an_event_is_one_line_whatever_its_text(text: str) -> None:
    written = sse.TextEvents({"id": "7", "text": sse.TextEvents.MARK, "after": [None]}).event(text)
    assert written == sse.event({"id": "7", "text": text, "after": [None]})
    assert written.startswith(b"data: ")
    assert written.endswith(b"\n\n")
    assert len(written.splitlines()) == 2
    assert json.loads(written[6:]) == {"id": "7", "text": text, "after": [None]}


def test_no_number_of_json_is_no_event() -> None:
    with pytest.raises(ValueError, match="JSON"):
        sse.event({"logprob": float("-inf")})
