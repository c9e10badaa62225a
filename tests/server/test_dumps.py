"""JSON in parts: the same as in one, and no part of it takes long."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bluejay.server import dumps
from bluejay.server.dumps import PART, dumps_in_parts

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(
    LEAVES | st.lists(st.integers(0, 9), max_size=7),
    lambda inner: st.lists(inner, max_size=7) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=40,
)


@settings(max_examples=40)
@given(VALUES, st.booleans())
def test_parts_are_the_whole(value: Any, ensure_ascii: bool) -> None:
    whole = json.dumps(value, ensure_ascii=ensure_ascii, separators=(",", ":"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dumps, "PART", 2)
        assert dumps_in_parts(value, ensure_ascii=ensure_ascii) == whole
    assert dumps_in_parts(value, ensure_ascii=ensure_ascii) == whole


@pytest.mark.parametrize(
    "value",
    [
        {"data": [{"embedding": [0.1] * 4096} for _ in range(100)]},
        {"choices": [{"logprobs": {"top": [dict.fromkeys(map(str, range(21)), -0.5)] * 2048}}] * 3},
        [[[1.5] * 1000] * 70],
    ],
)
def test_no_part_is_large(monkeypatch: pytest.MonkeyPatch, value: Any) -> None:
    sizes: list[int] = []
    encode = json.JSONEncoder.encode

    def recorded(self: json.JSONEncoder, part: Any) -> str:
        sizes.append(len(text := encode(self, part)))
        return text

    expected = json.dumps(value, separators=(",", ":"))
    monkeypatch.setattr(json.JSONEncoder, "encode", recorded)
    assert dumps_in_parts(value, ensure_ascii=False) == expected
    assert max(sizes) < PART * PART * 12  # characters


def test_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        dumps_in_parts([[0.0, float("inf")]], ensure_ascii=False)
