"""What is read from bodies, and what is told of what is wrong with them."""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, StrictInt

from bluejay import errors
from bluejay.errors import InvalidRequest
from bluejay.server import admin
from bluejay.server.call import (
    LARGE_BODY,
    MAX_NESTED,
    MAX_VALUES,
    Call,
    checked,
    json_response,
    note_failure,
    read_json,
)
from bluejay.server.dialects import baseten, kserve_v1, neuro, open_inference, openai_bodies
from bluejay.server.errors import STATUS, ClientGone, NotServed, Rarely, failure_of
from bluejay.server.threads import Threads


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")
    number: StrictInt
    words: list[str] = []


@pytest.mark.parametrize(
    "body, message",
    [
        (b"", "empty"),
        (b"  \n", "empty"),
        (b"{", "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b'{"a": "\xff"}', "no valid utf-8"),
        (b"NaN", "no number"),
        (b"[Infinity]", "no number"),
        (b"1e309", "larger than any number"),
        (b"[" * 50_000, "nested"),
        (b"9" * 5000, "no JSON"),
        (b'{"a": 1}\x00', "no JSON"),
    ],
)
def test_what_is_no_json_is_refused(body: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        read_json(body)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_json_may_be_in_any_of_its_encodings(encoding: str) -> None:
    assert read_json('{"a": "ä"}'.encode(encoding)) == {"a": "ä"}


LONG = b'"' + rb"a, [\\\"" * (LARGE_BODY // 4) + b'"'  # a text; nothing in it counts


@pytest.mark.parametrize(
    "body, message",
    [
        (b"[" + b"1.5," * MAX_VALUES + b"1, 2]", "more than 524,288 values"),
        (b"[" + b'"",' * MAX_VALUES * 4 + b"1]", "more than 524,288 texts"),
        (b"[" * 100_000, "more than 32,768 lists, objects and fields"),
        (b"[" + b"[]," * MAX_NESTED + b"1]", "more than 32,768 lists, objects and fields"),
        (b"[" + b'{"a":1},' * MAX_NESTED + b"1]", "more than 32,768 lists, objects and fields"),
        (b"[" + LONG + b", 1e309]", "1e309 is larger than any number here"),
        (b"[" + LONG + b", NaN]", "NaN is no number in JSON"),
        (b"[" + LONG + b", " + b"9" * 5000 + b"]", "no JSON: Exceeds the limit"),
        (LONG[:-1] + b'\xff"', "no valid utf-8, at byte"),
    ],
)
def test_what_is_wrong_with_a_large_body_is_told_before_it_takes_long(body: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        read_json(body)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32-le"])
def test_a_large_body_says_what_a_small_one_does(encoding: str) -> None:
    value = {"text": 'ä, [{":\\"' * 100_000, "numbers": [-1, 2.5, 10**30, True, None] * 9}
    body = json.dumps(value, ensure_ascii=False)
    assert read_json(body.encode(encoding)) == value


def test_a_large_body_is_read_in_a_thread_and_a_small_one_is_not() -> None:
    house: Any = SimpleNamespace(reading=Threads("the reading of bodies", 1, 2**20))
    call = Call(None, house, None, None)  # type: ignore[arg-type]

    def parse(body: bytes) -> bool:
        return threading.current_thread() is threading.main_thread()

    assert asyncio.run(call.parsed(b" " * LARGE_BODY, parse))
    assert not asyncio.run(call.parsed(b" " * (LARGE_BODY + 1), parse))


@given(st.binary(max_size=200))
def test_any_bytes_are_json_or_refused(body: bytes) -> None:
    try:
        read_json(body)
    except InvalidRequest as error:
        assert error.args[0]


def test_everything_that_is_wrong_is_named_at_once() -> None:
    with pytest.raises(InvalidRequest) as refused:
        checked(Body, {"number": "7", "words": [1], "colour": "x" * 5000})
    message = str(refused.value)
    assert refused.value.param == "number"
    assert "got '7'" in message
    assert "words.0" in message
    assert "colour" in message
    assert len(message) < 500


def test_a_body_with_very_many_faults_gets_a_short_answer() -> None:
    with pytest.raises(InvalidRequest, match="and 992 more"):
        checked(Body, {"number": 1, "words": [0] * 1000})


BODIES = [
    kind
    for module in (admin, baseten, kserve_v1, neuro, open_inference, openai_bodies)
    for _, kind in inspect.getmembers(module, inspect.isclass)
    if issubclass(kind, BaseModel) and kind.__module__ == module.__name__
]
# The settings say how long these may be: their routes look.
BY_SETTINGS = {("Predict", "instances"), ("DetokenizeBody", "tokens")}


def lists(node: Any) -> Iterator[dict[str, Any]]:
    """The lists in a core schema of which each item is looked at."""
    if isinstance(node, dict):
        if node.get("type") == "list" and node.get("items_schema", {}).get("type", "any") != "any":
            yield node
        node = list(node.values())
    if isinstance(node, list):
        for one in node:
            yield from lists(one)


@pytest.mark.parametrize("kind", BODIES, ids=lambda kind: kind.__name__)
def test_a_list_is_bounded_and_its_first_fault_is_enough(kind: type[BaseModel]) -> None:
    schema: Any = kind.__pydantic_core_schema__
    while schema["type"] != "model-fields":
        schema = schema["schema"]
    for name, field in schema["fields"].items():
        for found in lists(field):
            assert found.get("fail_fast"), name
            assert "max_length" in found or (kind.__name__, name) in BY_SETTINGS, name


@pytest.mark.parametrize("text", ["plain", "ä — 鳥", "half \ud800", "\0"])
def test_any_text_can_be_told(text: str) -> None:
    response = json_response({"text": text}, 418, {"x-more": "1"})
    assert json.loads(response.body) == {"text": text}
    assert response.status_code == 418
    assert response.headers["content-length"] == str(len(response.body))


def test_every_error_has_a_status_of_its_own() -> None:
    public = [
        error
        for error in vars(errors).values()
        if isinstance(error, type) and issubclass(error, errors.RequestError | errors.AccessError | errors.EngineError)
    ]
    assert public
    for error in public:
        made = error("why", 2.0) if error in (errors.Overloaded, errors.QuotaExceeded) else error("why")
        assert failure_of(made).status in {400, 401, 403, 404, 429, 503}
    assert failure_of(NotServed("no")).status == 501
    assert set(STATUS) > {ClientGone, NotServed}


def test_nothing_of_the_inside_is_told() -> None:
    for error in (RuntimeError("/home/me"), errors.KernelError("/home/me"), errors.ConfigError("/home/me")):
        failure = failure_of(error)
        assert (failure.status, failure.kind) == (500, "InternalError")
        assert "/home" not in failure.message
    for error in (errors.EngineError("/home/me"), errors.StoreError("/home/me")):
        failure = failure_of(error)
        assert failure.status == 503
        assert "/home" not in failure.message


def test_why_is_logged_where_the_client_is_not_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    monkeypatch.setattr("bluejay.server.errors._reasons", Rarely(1.0, lambda: now[0]))

    def told(*raised: Exception) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            for error in raised:
                note_failure(error, "an-id")
        assert all(record.levelno == logging.WARNING for record in caplog.records)
        return [record.getMessage() for record in caplog.records]

    away, broken = errors.StoreError("the database d cannot be reached"), errors.EngineError("the worker died")
    expected = ["StoreError: the database d cannot be reached", "EngineError: the worker died"]
    assert told(away, broken, *[away, broken] * 9) == expected
    assert told(errors.Overloaded("later", 1.0), errors.QuotaExceeded("later", 1.0), InvalidRequest("no")) == []
    now[0] = 1.0
    assert told(away) == expected[:1]
    assert caplog.records[0].held_back == 9  # type: ignore[attr-defined]


def test_when_to_come_again_is_told_in_whole_seconds() -> None:
    assert failure_of(errors.Overloaded("full", 0.2)).headers == {"Retry-After": "1"}
    assert failure_of(errors.QuotaExceeded("used up", 30.1)).headers == {"Retry-After": "31"}
    assert failure_of(errors.Unauthenticated("who?")).headers == {"WWW-Authenticate": "Bearer"}
    assert failure_of(InvalidRequest("no")).headers == {}
