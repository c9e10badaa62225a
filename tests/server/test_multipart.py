"""Forms, as clients write them and as nobody should."""

from __future__ import annotations

import pytest

from bluejay.errors import InvalidRequest
from bluejay.server.multipart import is_form, read_form

TYPE = "multipart/form-data; boundary=xyz"
WHOLE = (
    b'preamble\r\n--xyz\r\nContent-Disposition: form-data; filename="f"; name="file"\r\n\r\n\x00--xyz\r\n\xff\r\n'
    b'--xyz \r\ncontent-disposition: form-data; name="json"\r\nContent-Type: application/json\r\n\r\n{}\r\n--xyz--\r\n'
)


def part(name: str, headers: bytes = b"") -> bytes:
    return b'--xyz\r\nContent-Disposition: form-data; name="%s"\r\n%s\r\nvalue\r\n' % (name.encode(), headers)


def test_parts_are_found_with_their_bytes_as_they_are() -> None:
    assert read_form(TYPE, WHOLE) == {"file": b"\x00--xyz\r\n\xff", "json": b"{}"}
    assert read_form('multipart/form-data; charset=utf-8; boundary="xyz"', part("a") + b"--xyz--") == {"a": b"value"}
    assert read_form(TYPE, b"--xyz--") == {}


def test_only_a_form_is_one() -> None:
    assert is_form("Multipart/Form-Data; boundary=x")
    assert not is_form("application/json")


@pytest.mark.parametrize("length", range(len(WHOLE) - len("--\r\n")))
def test_a_form_that_is_cut_off_is_refused(length: int) -> None:
    with pytest.raises(InvalidRequest):
        read_form(TYPE, WHOLE[:length])


@pytest.mark.parametrize(
    "content_type, body, message",
    [
        ("multipart/form-data", WHOLE, "names no boundary"),
        (TYPE, b"", "cut off"),
        (TYPE, part("a") * 2 + b"--xyz--", "twice"),
        (TYPE, b"".join(part(str(n)) for n in range(9)) + b"--xyz--", "more than 8 parts"),
        (TYPE, b"--xyz\r\n" * 100_000 + b"--xyz--", "more than 8 parts"),
        (TYPE, b"--xyz\r\nA: b\r\n\r\nvalue\r\n--xyz--", "no name"),
        (TYPE, b"--xyz\r\nA: " + b"b" * 5000 + b"\r\n\r\nvalue\r\n--xyz--", "4,096 bytes"),
        (TYPE, b"--xyzA: b\r\n\r\nvalue\r\n--xyz--", "no headers"),
        (TYPE, part("a", b"Content-Transfer-Encoding: base64\r\n") + b"--xyz--", "base64, expected binary"),
    ],
)
def test_what_is_wrong_is_named(content_type: str, body: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        read_form(content_type, body)
