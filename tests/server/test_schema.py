"""/openapi.json and /docs: whole, of one piece, and without a word from another host."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from bluejay.server.schema import PAGES


@pytest.fixture(scope="module")
def http(server: Any) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def test_the_schema_tells_of_every_operation_what_a_client_must_know(http: httpx.Client) -> None:
    answer = http.get("/openapi.json")
    schema = answer.json()
    assert schema["openapi"].startswith("3.1.")
    operations = [(path, each) for path, methods in schema["paths"].items() for each in methods.values()]
    names = [operation["operationId"] for _, operation in operations]
    assert len(set(names)) == len(names)
    for path, operation in operations:
        told = {parameter["name"] for parameter in operation["parameters"] if parameter["in"] == "path"}
        assert told == set(re.findall(r"\{(\w+)\}", path)), path
        assert operation["summary"], path
        assert operation["x-access"] in ("public", "user", "admin")
        assert "422" not in operation["responses"]
        assert "security" not in operation  # this server has no keys
    assert "/v1/models/{model}:predict" in schema["paths"]
    assert not re.search(r'"\$ref": ?"#/components', answer.text) or schema["components"]["schemas"]


def test_the_page_needs_no_other_host(http: httpx.Client) -> None:
    for path in ("/docs", *(f"/docs/{name}" for name in PAGES)):
        answer = http.get(path)
        assert answer.status_code == 200
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert not re.search(r"https?://|//[a-z]+\.|innerHTML|<script>|style=| on[a-z]+=", answer.text), path
    page = http.get("/docs").text
    for name in re.findall(r'(?:src|href)="(docs/[^"]+)"', page):
        assert http.get(f"/{name}").headers["content-type"].partition(";")[0] in PAGES.values()


@pytest.mark.parametrize("name", ["nope", "..%2Fapp.py", "%2e%2e/app.py", "docs.html%00"])
def test_no_other_file_is_handed_out(http: httpx.Client, name: str) -> None:
    assert http.get(f"/docs/{name}").status_code == 404
