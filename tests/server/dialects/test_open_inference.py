"""The Open Inference Protocol over HTTP, on a running server."""

from __future__ import annotations

import asyncio
import gzip
import json
import struct
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from bluejay.decoding.params import SamplingParams
from bluejay.engine.request import FinishReason, GenerationEvent
from bluejay.errors import EngineError
from bluejay.server.dialects.open_inference import _pieces

GOLDEN = sorted((Path(__file__).parent / "golden" / "open_inference").glob("*.json"))
INFER = "/v2/models/bluejay/infer"
GENERATE = "/v2/models/bluejay/generate"
LENGTH = "Inference-Header-Content-Length"
GREEDY = {"max_length": 12}


@pytest.fixture(scope="module")
def http(server: Any) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def texts(*data: Any, **changes: Any) -> dict[str, Any]:
    return {"name": "text_input", "shape": [len(data)], "datatype": "BYTES", "data": list(data), **changes}


def packed(*parts: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(part)) + part for part in parts)


def binary(asked: dict[str, Any], *blobs: bytes) -> dict[str, Any]:
    """A request whose tensors' bytes stand behind the JSON."""
    head = json.dumps(asked).encode()
    return {"content": head + b"".join(blobs), "headers": {LENGTH: str(len(head))}}


def unpacked(answer: httpx.Response) -> tuple[dict[str, Any], bytes]:
    length = int(answer.headers[LENGTH])
    return json.loads(answer.content[:length]), answer.content[length:]


def fits(told: Any, golden: Any) -> bool:
    """Whether an answer is a golden one, in which "…" is any further text and "#" any number."""
    if isinstance(golden, dict):
        return isinstance(told, dict) and list(told) == list(golden) and all(fits(told[k], golden[k]) for k in golden)
    if isinstance(golden, list):
        return isinstance(told, list) and len(told) == len(golden) and all(map(fits, told, golden))
    if golden == "#":
        return isinstance(told, int)
    if isinstance(golden, str) and golden.endswith("…"):
        return isinstance(told, str) and told.startswith(golden[:-1])
    return bool(told == golden)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_pairs(http: httpx.Client, path: Path) -> None:
    golden = json.loads(path.read_text(encoding="utf-8"))
    answer = http.request(golden["request"]["method"], golden["request"]["path"], json=golden["request"].get("json"))
    assert answer.status_code == golden["answer"]["status"], answer.text
    assert fits(answer.json(), golden["answer"]["json"]), answer.text
    assert answer.headers["content-type"] == "application/json"


def test_binary_tensors_go_both_ways(http: httpx.Client) -> None:
    asked = {"name": "text_input", "shape": [2], "datatype": "BYTES"}
    plain = http.post(INFER, json={"inputs": [texts("Once", "Füchse 🦊")], "parameters": GREEDY}).json()
    blob = packed(b"Once", "Füchse 🦊".encode())
    told = {**asked, "parameters": {"binary_data_size": len(blob)}}
    outputs = [{"name": "num_tokens", "parameters": {"binary_data": True}}, {"name": "text_output"}]
    answer = http.post(INFER, **binary({"inputs": [told], "outputs": outputs, "parameters": GREEDY}, blob))
    head, raw = unpacked(answer)
    assert answer.headers["content-type"] == "application/octet-stream"
    assert head["outputs"][0]["parameters"] == {"binary_data_size": 16}
    assert len(np.frombuffer(raw, "<i8")) == 2
    assert head["outputs"][1]["data"] == plain["outputs"][0]["data"]

    all_binary = {"inputs": [told], "parameters": {**GREEDY, "binary_data_output": True}}
    head, raw = unpacked(http.post(INFER, **binary(all_binary, blob)))
    assert raw == packed(*(text.encode() for text in plain["outputs"][0]["data"]))
    assert head["outputs"] == [
        {"name": "text_output", "shape": [2], "datatype": "BYTES", "parameters": {"binary_data_size": len(raw)}}
    ]


def test_ids_and_options_may_be_binary_tensors(http: httpx.Client) -> None:
    ids, most = np.array([[7, 8], [9, 10]], "<u2").tobytes(), np.array([5], "<i8").tobytes()
    inputs = [
        {"name": "input_ids", "shape": [2, 2], "datatype": "UINT16", "parameters": {"binary_data_size": len(ids)}},
        {"name": "max_length", "shape": [1, 1], "datatype": "INT64", "parameters": {"binary_data_size": len(most)}},
        {"name": "exclude_prompt", "shape": [1], "datatype": "BOOL", "data": [True]},
    ]
    answer = http.post(INFER, **binary({"inputs": inputs}, ids, most)).json()
    assert answer["outputs"][0]["shape"] == [2, 3]
    whole = http.post(INFER, **binary({"inputs": inputs[:2], "outputs": [{"name": "output_ids"}]}, ids, most)).json()
    rows = np.reshape(whole["outputs"][0]["data"], (2, 5))
    assert rows[:, :2].tolist() == [[7, 8], [9, 10]]
    assert rows[:, 2:].flatten().tolist() == answer["outputs"][0]["data"]


def test_shorter_rows_of_ids_are_filled_with_no_token(http: httpx.Client) -> None:
    asked = {"inputs": [texts("Once upon a time", "One")], "outputs": [{"name": "output_ids"}]}
    output = http.post(INFER, json={**asked, "parameters": {"max_new_tokens": 2}}).json()["outputs"][0]
    long, short = np.reshape(output["data"], output["shape"]).tolist()
    assert -1 not in long
    assert short[-1] == -1


@pytest.mark.parametrize("encoding, compress", [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_bodies_may_be_compressed(http: httpx.Client, encoding: str, compress: Callable[[bytes], bytes]) -> None:
    body = json.dumps({"inputs": [texts("Once")], "parameters": GREEDY}).encode()
    answer = http.post(INFER, content=compress(body), headers={"content-encoding": encoding})
    assert answer.json() == http.post(INFER, content=body).json()
    for wrong in (body, compress(body)[:-9], compress(body) + b"more"):
        refused = http.post(INFER, content=wrong, headers={"content-encoding": encoding})
        assert refused.status_code == 400
        assert encoding in refused.json()["error"]
    bomb = http.post(INFER, content=compress(bytes(2**24)), headers={"content-encoding": encoding})
    assert (bomb.status_code, "when inflated" in bomb.text) == (413, True)


def test_a_text_comes_in_pieces(http: httpx.Client) -> None:
    body = {"id": "7", "text_input": "Once upon a time", "max_tokens": 8}
    whole = http.post(GENERATE, json={**body, "exclude_input_in_output": True}).json()
    with http.stream("POST", f"{GENERATE}_stream", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [json.loads(line.removeprefix("data: ")) for line in answer.iter_lines() if line]
    assert "".join(event["text_output"] for event in events) == whole["text_output"]
    assert len(events) > 1
    assert [event.get("finish_reason") for event in events[-2:]] == [None, "length"]
    assert {event["id"] for event in events} == {"7"}
    one = http.post(f"{GENERATE}_stream", json={**body, "stream": False, "exclude_prompt": True}).text
    assert json.loads(one.removeprefix("data: ")) == whole


def test_pieces_tell_of_which_answer_they_are(http: httpx.Client) -> None:
    body = {"text_input": "Once", "parameters": {"max_tokens": 4, "do_sample": True, "num_return_sequences": 2}}
    lines = http.post(f"{GENERATE}_stream", json=body).text.splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert sorted(event["index"] for event in events if "finish_reason" in event) == [0, 1]


def test_it_takes_the_likeliest_tokens_unless_told_otherwise(http: httpx.Client) -> None:
    body = {"inputs": [texts("Once upon a time")], "parameters": {"max_length": 40}}
    assert len({http.post(INFER, json=body).text for _ in range(2)}) == 1
    body["parameters"]["do_sample"] = True
    assert len({http.post(INFER, json=body).text for _ in range(3)}) == 3


BOTH = [texts("a"), texts("b", name="prompt")]


@pytest.mark.parametrize(
    "body, message",
    [
        (b'{"inputs": [', "no JSON"),
        ({"inputs": []}, "no prompts; expected one of: text_input"),
        ({"inputs": "a"}, "inputs: Input should be a valid list"),
        ({"inputs": [texts("a")], "colour": 1}, "colour: Extra inputs"),
        ({"inputs": BOTH}, "both hold prompts"),
        ({"inputs": [texts("a", name="colour")]}, "unknown input 'colour'"),
        ({"inputs": [texts("a", shape=[2])]}, "the shape [2] holds 2 elements, the data 1"),
        ({"inputs": [texts("a", shape=[-1])]}, "the shape is [-1]"),
        ({"inputs": [texts("a", shape=[2**63])]}, "the shape is [9223372036854775808]"),
        ({"inputs": [texts("a", shape=[2**62, 4])]}, "elements, expected at most 1,048,576"),
        ({"inputs": [texts("a", shape=[1, 1, 1])]}, "shape: List should have at most 2 items"),
        ({"inputs": [texts("a", shape=["a"] * 100)]}, "inputs.0.shape.0: Input should be a valid integer, got 'a'"),
        ({"inputs": [texts("a", shape=[1.5])]}, "shape"),
        ({"inputs": [texts("a", shape=[True])]}, "shape"),
        ({"inputs": [texts("a", shape=[])]}, "expected [n] or [n, 1]"),
        ({"inputs": [texts("a", "b", shape=[1, 2])]}, "expected [n] or [n, 1]"),
        ({"inputs": [texts(shape=[0])]}, "no prompt"),
        ({"inputs": [texts(1)]}, "'1' is no BYTES"),
        ({"inputs": [texts(None)]}, "'None' is no BYTES"),
        ({"inputs": [texts("a \ud800")]}, "surrogate"),
        ({"inputs": [texts("a", datatype="STRING")]}, "the datatype is 'STRING'"),
        ({"inputs": [texts(1.0, datatype="FP32")]}, "FP32, expected BYTES"),
        ({"inputs": [texts("a", data=None)]}, "neither data nor binary_data_size"),
        ({"inputs": [texts("a", parameters={"binary_data_size": 1})]}, "both data and binary_data_size"),
        ({"inputs": [texts("a", parameters={"classification": 1})]}, "the parameter 'classification'"),
        ({"inputs": [texts(1, shape=[1], name="input_ids", datatype="INT64")]}, "expected [prompts, tokens"),
        ({"inputs": [texts(-1, shape=[1, 1], name="input_ids", datatype="INT64")]}, "token ids [-1]"),
        ({"inputs": [texts(2**63, shape=[1, 1], name="input_ids", datatype="INT64")]}, "is no INT64"),
        ({"inputs": [texts(1e9, shape=[1, 1], name="input_ids", datatype="FP64")]}, "input_ids' is FP64"),
        ({"inputs": [texts("a"), texts(1, 2, name="top_k", datatype="INT32")]}, "'top_k' is an option, and has 2"),
        ({"inputs": [texts("a"), texts(1, name="top_k", datatype="INT32")], "parameters": {"top_k": 1}}, "told twice"),
        ({"inputs": [texts("a")], "parameters": {"max_tokens": 1, "max_new_tokens": 1}}, "told twice"),
        ({"inputs": [texts("a")], "parameters": {"max_length": "many"}}, "max_length is 'many'"),
        ({"inputs": [texts("a")], "parameters": {"priority": 1}}, "unknown option 'priority'"),
        ({"inputs": [texts("a")], "parameters": {"exclude_prompt": 1}}, "exclude_prompt is '1'"),
        ({"inputs": [texts("a")], "parameters": {"stream": True}}, "stream is true"),
        ({"inputs": [texts("a")], "parameters": {"binary_data_output": "yes"}}, "binary_data_output is 'yes'"),
        (b'{"inputs": [], "parameters": {"temperature": 1e309}}', "larger than any number"),
        ({"inputs": [texts("a")], "outputs": [{"name": "colour"}]}, "unknown output 'colour'"),
        ({"inputs": [texts("a")], "outputs": [{"name": "num_tokens"}] * 2}, "asked for twice"),
        (
            {"inputs": [texts("a")], "outputs": [{"name": "num_tokens", "parameters": {"classification": 3}}]},
            "the parameter 'classification'",
        ),
        ({"inputs": [texts(*["a"] * 257)]}, "there are 257 prompts"),
        ({"inputs": [texts("many words " * 5000)]}, "characters"),
    ],
)
def test_what_is_wrong_is_named(http: httpx.Client, body: Any, message: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = http.post(INFER, content=content, headers={"content-type": "text/plain"})
    assert answer.status_code == 400, answer.text
    assert list(answer.json()) == ["error"]
    assert message in answer.json()["error"]


ONE = {"name": "text_input", "shape": [1], "datatype": "BYTES"}


def sized(size: Any, **changes: Any) -> dict[str, Any]:
    return {"inputs": [{**ONE, **changes, "parameters": {"binary_data_size": size}}]}


@pytest.mark.parametrize(
    "asked, blob, message",
    [
        (sized(6), b"", "0 bytes are left"),
        (sized(-1), b"", "binary_data_size is -1"),
        (sized(2**63), b"", "binary_data_size is 9223372036854775808"),
        (sized("5"), packed(b"a"), "binary_data_size is 5, and 5 bytes are left"),
        (sized(5), packed(b"a") + b"x", "1 bytes behind the JSON belong to no input"),
        (sized(3), b"\x01\x00\x00", "ends within an element"),
        (sized(6), b"\xff\xff\xff\xffab", "ends within an element"),
        (sized(5, shape=[2]), packed(b"a"), "holds 2 elements, the data 1"),
        (sized(5), packed(b"\xff"), "in UTF-8, at byte 0"),
        (sized(4, name="input_ids", shape=[1, 1], datatype="INT64"), bytes(4), "takes 8 bytes, and there are 4"),
        (sized(8, name="input_ids", shape=[2**62, 2], datatype="INT64"), bytes(8), "expected at most"),
    ],
)
def test_what_is_wrong_with_binary_tensors_is_named(
    http: httpx.Client, asked: dict[str, Any], blob: bytes, message: str
) -> None:
    answer = http.post(INFER, **binary(asked, blob))
    assert answer.status_code == 400
    assert message in answer.json()["error"]


@pytest.mark.parametrize("length", ["-1", "many", "99999", "9" * 30, "1.5"])
def test_a_wrong_length_of_the_header_is_named(http: httpx.Client, length: str) -> None:
    answer = http.post(INFER, content=b"{}", headers={LENGTH: length})
    assert answer.status_code == 400
    assert LENGTH in answer.json()["error"]


@pytest.mark.parametrize(
    "path, body, message",
    [
        ("generate", {"text_input": "a", "max_tokens": 1, "parameters": {"max_tokens": 1}}, "told twice"),
        ("generate", {"text_input": "a", "stream": True}, "use generate_stream"),
        ("generate", {"text_input": "a", "colour": 1}, "unknown option 'colour'"),
        ("generate", {"text_input": ["a"]}, "text_input"),
        ("generate_stream", {"text_input": "a", "max_tokens": 0}, "max_new_tokens is 0"),
        ("generate_stream", {"text_input": "a", "exclude_prompt": False}, "pieces of an answer tell only what is new"),
    ],
)
def test_what_is_wrong_is_named_where_texts_are_generated(
    http: httpx.Client, path: str, body: Any, message: str
) -> None:
    answer = http.post(f"/v2/models/bluejay/{path}", json=body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]


def test_only_an_administrator_unloads_and_loads(keyed: Any) -> None:
    user, admin = ({"authorization": f"Bearer {key}"} for key in (keyed.user, keyed.admin))
    asked = {"inputs": [texts("Once")], "parameters": GREEDY}
    unload, load = (f"/v2/repository/models/bluejay/{verb}" for verb in ("unload", "load"))
    with keyed.serving.client() as http:
        assert [http.post(unload).status_code, http.post(unload, headers=user).status_code] == [401, 403]
        assert http.post(INFER, json=asked).status_code == 401
        assert http.get("/v2/health/ready").json() == {"ready": True}
        said = http.post(INFER, json=asked, headers=user)
        assert said.headers["x-served-model"] == "bluejay"

        assert http.post(unload, headers=admin).json() == {"name": "bluejay", "unload": True}
        [state] = http.post("/v2/repository/index", headers=user).json()
        assert (state["state"], state["reason"]) == ("UNAVAILABLE", "stopped")
        assert http.post("/v2/repository/index", json={"ready": True}, headers=user).json() == []
        assert http.get("/v2/models/bluejay/ready", headers=user).status_code == 503
        refused = http.post(INFER, json=asked, headers=user)
        assert (refused.status_code, "was unloaded" in refused.json()["error"]) == (503, True)

        assert http.post(load, headers=admin, json={"parameters": {}}).json() == {"name": "bluejay", "load": True}
        assert http.post(INFER, json=asked, headers=user).json() == said.json()


def test_why_a_stream_could_not_be_finished_is_for_the_log() -> None:
    async def events() -> AsyncIterator[GenerationEvent]:
        yield GenerationEvent(0, 0, [], finish_reason=FinishReason.ERROR, error="the worker died")

    async def read() -> None:
        run: Any = SimpleNamespace(events=events)
        asked: Any = SimpleNamespace(params=SamplingParams())
        async for _ in _pieces(run, asked, {}):
            pass

    with pytest.raises(EngineError, match=r"^the worker died$"):
        asyncio.run(read())
