"""Requests and the answers that they must get, one a line in golden/; a text that ends in … is how one must begin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest


def pairs(name: str) -> list[Any]:
    """Parameters of a test: the pairs of golden/NAME.json."""
    found = json.loads(Path(__file__).with_name("golden").joinpath(f"{name}.json").read_text(encoding="utf-8"))
    return [pytest.param(pair, id=pair["name"]) for pair in found]


def check(http: httpx.Client, pair: dict[str, Any]) -> None:
    """Send a pair's request, as curl's -d would, and compare."""
    if "repeat" in pair:
        content = b" " * pair["repeat"]
    else:
        content = (json.dumps(pair["body"]) if "body" in pair else pair.get("text", "")).encode()
    response = http.request(
        pair.get("method", "POST"),
        pair["path"],
        content=content,
        headers={"content-type": "application/x-www-form-urlencoded"},
    )
    assert response.status_code == pair["status"], response.text
    if pair["status"] != 204:
        assert "content-length" in response.headers
    answer = response.json() if response.content else None
    assert fits(pair["answer"], answer), answer


def fits(expected: Any, found: Any) -> bool:
    """Whether an answer is as expected."""
    if isinstance(expected, dict) and isinstance(found, dict):
        return list(expected) == list(found) and all(fits(expected[key], found[key]) for key in expected)
    if isinstance(expected, list) and isinstance(found, list):
        return len(expected) == len(found) and all(map(fits, expected, found))
    if isinstance(expected, str) and expected.endswith("…") and isinstance(found, str):
        return found.startswith(expected[:-1]) and len(found) >= len(expected)
    return type(expected) is type(found) and bool(expected == found)
