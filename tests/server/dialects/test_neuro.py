"""Neuro's API on a running server."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from .golden_pairs import check, pairs

PROMPT = "When I visit Bath I will"
GREEDY = {"do_sample": False, "max_new_tokens": 4}


@pytest.fixture(scope="module")
def http(server: Any) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def saved(*arrays: Any, **named: Any) -> bytes:
    """What the client sends of a list: an array for each item, named by its number."""
    file = io.BytesIO()
    np.savez(file, *arrays, **named)
    return file.getvalue()


def numbered(texts: list[str]) -> bytes:
    return saved(**{str(number): np.array(text) for number, text in enumerate(texts)})


def sync_predict(http: httpx.Client, file: bytes, **asked: Any) -> httpx.Response:
    """As the client sends it."""
    files = {"file": ("file", file), "json": (None, json.dumps(asked).encode(), "application/json")}
    return http.post("/SyncPredict?include_result=True", files=files)


@pytest.mark.parametrize("pair", pairs("neuro/json"))
def test_answers_are_as_recorded(http: httpx.Client, pair: dict[str, Any]) -> None:
    check(http, pair)


def test_items_keep_their_order_and_lengths_count_the_prompt(http: httpx.Client) -> None:
    texts = [f"Number {number} is" for number in range(11)]
    answer = sync_predict(http, numbered(texts), modelId="60ca2a1e54f6ecb69867c72c", input_kwargs=GREEDY).json()
    assert answer["state"] == "COMPLETE"
    generated = [item["generated_text"] for item in answer["result"]]
    assert [one.startswith(text) for one, text in zip(generated, texts, strict=True)] == [True] * 11
    shorter = sync_predict(http, numbered(texts), input_kwargs={**GREEDY, "max_new_tokens": 3}).json()["result"]
    assert all(one.startswith(item["generated_text"]) for one, item in zip(generated, shorter, strict=True))


def test_the_prompt_can_be_left_out_and_it_draws_unless_told_otherwise(http: httpx.Client) -> None:
    kept = sync_predict(http, numbered([PROMPT]), input_kwargs=GREEDY).json()["result"]
    left_out = sync_predict(http, numbered([PROMPT]), input_kwargs={**GREEDY, "remove_input": True}).json()["result"]
    assert kept[0]["generated_text"] == PROMPT + left_out[0]["generated_text"]
    kwargs = {"max_length": 40, "penalty": 1.0}
    assert len({sync_predict(http, numbered([PROMPT]), input_kwargs=kwargs).text for _ in range(3)}) == 3


def test_a_file_of_text_is_one_prompt(http: httpx.Client) -> None:
    answer = sync_predict(http, PROMPT.encode(), generic_file=True, input_kwargs=GREEDY)
    assert answer.json()["result"][0]["generated_text"].startswith(PROMPT)


@pytest.mark.parametrize(
    "file, asked, message",
    [
        (saved(np.array([{"a": 1}], dtype=object)), {}, "pickled objects"),
        (saved(np.zeros(3)), {}, "'<f8'"),
        (b"PK\x03\x04 nothing", {}, "no valid .npz"),
        (b"\xff\xfe", {"generic_file": True}, "no text in UTF-8"),
        (b"text", {}, "no .npz file"),
        (numbered(["a"]), {"data": "a"}, "in the part 'file'"),
        (numbered(["a"]), {"scripts": ["x"]}, "scripts"),
        (numbered(["a"] * 257), {}, "256 arrays"),
    ],
)
def test_data_that_are_none_are_refused(http: httpx.Client, file: bytes, asked: dict[str, Any], message: str) -> None:
    answer = sync_predict(http, file, **asked)
    assert answer.status_code == 400
    assert message in answer.json()["error"]


def upload(http: httpx.Client, file: bytes, **told: Any) -> httpx.Response:
    told = {"hash": hashlib.md5(file).hexdigest(), "collection": 1, "given_name": "", "project": "", **told}
    files = {"file": ("file", file, "application/octet-stream"), "json": (None, json.dumps(told), "application/json")}
    return http.post("/UploadData", files=files)


def run_task(http: httpx.Client, **asked: Any) -> dict[str, Any]:
    """A task's last status."""
    answer = http.post("/Predict", json={"input_kwargs": GREEDY, "scripts": [], **asked})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/plain; charset=utf-8"), answer.text
    until = time.monotonic() + 60
    while time.monotonic() < until:
        told: dict[str, Any] = http.request("GET", f"/status/{answer.text}?include_result=False", json={}).json()
        assert {"state", "taskType", "progress"} == set(told)
        if told["state"] in ("COMPLETE", "FAILURE", "STOPPED"):
            return dict(http.get(f"/status/{answer.text}?include_result=True").json())
        time.sleep(0.02)
    pytest.fail(f"still {told}")


def test_a_task_predicts_of_what_was_uploaded(http: httpx.Client) -> None:
    file = numbered(["One day", "A fox", "A bird"])
    asked = {"hash": hashlib.md5(file).hexdigest(), "collection": 1}
    assert http.request("GET", "/Hash", params=asked, json=asked).status_code == 204
    sent = upload(http, file, given_name="three")
    assert sent.status_code == 201
    assert upload(http, file, given_name="a trio").json() == sent.json()
    assert http.request("GET", "/Hash", params=asked, json=asked).json() == sent.json()
    told = run_task(http, dataId=sent.json(), modelId="60a40f81b635d67d627bf6b2")
    assert (told["state"], told["taskType"], told["progress"]) == ("COMPLETE", "Predict", 1.0)
    assert [item["generated_text"][:5] for item in told["result"]] == ["One d", "A fox", "A bir"]
    sliced = run_task(http, data_name="three", data_start=1, data_end=2)
    assert sliced["result"] == told["result"][1:2]
    none = http.post("/Predict", json={"data_name": "a trio", "data_start": 3})
    assert (none.status_code, none.json()["error"][:15]) == (400, "no item is left")


def hash_of(*chunks: np.ndarray) -> str:
    """As the client names the data of a loader whose chunks hold one array each."""
    return hashlib.md5(hashlib.md5(b"".join(chunk.tobytes() for chunk in chunks)).digest()).hexdigest()


def test_data_of_a_loader_come_in_chunks(http: httpx.Client) -> None:
    chunks = [np.array([f"Chunk {number}", "A fox"]) for number in range(2)]
    told = {"hash": hash_of(*chunks), "chunked": True, "size": 10, "input_shape": [[2]]}
    for number, chunk in enumerate(chunks):
        sent = upload(http, saved(chunk), **told, is_last=number == 1)
    result = run_task(http, dataId=sent.json())["result"]
    assert [item["generated_text"][:7] for item in result[::2]] == ["Chunk 0", "Chunk 1"]


def test_chunks_of_two_that_send_the_same_data_at_once_do_not_mix(http: httpx.Client) -> None:
    chunks = [np.array([f"Mixed {number}"]) for number in range(2)]
    told = {"hash": hash_of(*chunks), "chunked": True, "given_name": "mixed"}
    for chunk in (chunks[0], chunks[0]):
        assert upload(http, saved(chunk), **told).status_code == 201
    mixed = upload(http, saved(chunks[1]), **told, is_last=True)
    assert (mixed.status_code, "not those that hash was made of" in mixed.json()["error"]) == (400, True)
    assert http.post("/Predict", json={"data_name": "mixed"}).status_code == 404
    for number, chunk in enumerate(chunks):
        sent = upload(http, saved(chunk), **told, is_last=number == 1)
    assert len(run_task(http, dataId=sent.json())["result"]) == 2


def test_an_upload_that_was_cut_off_begins_anew(http: httpx.Client) -> None:
    hashed = hash_of(np.array(["Chunk 1"]))
    first = upload(http, saved(np.array(["Chunk 0"])), hash=hashed, chunked=True)
    assert http.post("/Predict", json={"dataId": first.json()}).status_code == 404
    assert http.get("/Hash", params={"hash": hashed}).status_code == 204
    sent = upload(http, saved(np.array(["Chunk 1"])), hash=hashed, chunked=True, is_last=True)
    assert len(run_task(http, dataId=sent.json())["result"]) == 1


def test_a_task_that_cannot_be_done_has_failed_and_says_why(http: httpx.Client) -> None:
    sent = upload(http, numbered(["many words " * 40]))
    told = run_task(http, dataId=sent.json(), input_kwargs={"max_length": 5})
    assert told["state"] == "FAILURE"
    assert "max_length is 5" in told["result"]


def test_more_than_may_be_kept_is_refused_and_what_was_there_stays(http: httpx.Client) -> None:
    hashed = hashlib.md5(b"many chunks").hexdigest()
    chunk = saved(np.array(["Chunk"])) + bytes(4_000_000)
    answers = [upload(http, chunk, hash=hashed, chunked=True, given_name="large") for _ in range(9)]
    assert [answer.status_code for answer in answers] == [201] * 8 + [413]
    assert "33,554,432" in answers[-1].json()["error"]


def test_a_damaged_upload_is_noticed(http: httpx.Client) -> None:
    answer = upload(http, numbered(["a"]), hash="0" * 32)
    assert answer.status_code == 400
    assert "hash" in answer.json()["error"]
    assert upload(http, b"", hash="0" * 32).json() == {"error": "the form has no part 'file'"}
