"""KServe's V1 protocol on a running server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import httpx
import pytest

PREDICT = "/v1/models/eleutherai-gpt-j-6b:predict"


@pytest.fixture(scope="module")
def http(server: Any) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def test_one_instance_gives_a_flat_list_several_nested_ones(http: httpx.Client) -> None:
    one = http.post(PREDICT, json={"instances": ["A bird"], "parameters": {"max_length": 10}})
    assert one.status_code == 200
    assert one.headers["x-served-model"] == "bluejay"
    [answer] = one.json()["predictions"]
    assert answer["generated_text"].startswith("A bird")
    two = http.post(PREDICT, json={"instances": ["A bird", "A fox"], "parameters": {"max_length": 10}})
    predictions = two.json()["predictions"]
    assert [len(texts) for texts in predictions] == [1, 1]
    assert [texts[0]["generated_text"][:5] for texts in predictions] == ["A bir", "A fox"]


def test_predictions_can_be_nested_always(start_server: Callable[..., AbstractContextManager[Any]]) -> None:
    settings = "[server]\nkserve_always_nested = true\nkserve_defaults = {max_length = 7, do_sample = false}\n"
    with start_server(settings=settings) as serving, serving.client() as http:
        predictions = http.post(PREDICT, json={"instances": ["A bird"]}).json()["predictions"]
        again = http.post(PREDICT, json={"instances": ["A bird"], "parameters": {"max_length": 7}}).json()
    assert [[list(text) for text in texts] for texts in predictions] == [[["generated_text"]]]
    assert predictions == again["predictions"]


def test_lengths_count_the_prompt_and_names_have_any_case(http: httpx.Client) -> None:
    greedy = {"DO_SAMPLE": False, "repetition_penalty": 1.0, "Min_Length": 12}
    answers = [
        http.post(
            PREDICT, json={"instances": ["Once upon a time"], "parameters": {**greedy, "MAX_LENGTH": length}}
        ).json()
        for length in (12, 12, 14)
    ]
    texts = [answer["predictions"][0]["generated_text"] for answer in answers]
    assert texts[0] == texts[1]
    assert texts[2].startswith(texts[0])
    assert len(texts[2]) > len(texts[0])


def test_it_draws_unless_told_otherwise(http: httpx.Client) -> None:
    body = {"instances": ["Once upon a time"], "parameters": {"max_length": 40}}
    assert len({http.post(PREDICT, json=body).text for _ in range(3)}) == 3


@pytest.mark.parametrize(
    "body, status, message",
    [
        (b'{"instances": ["a"', 400, "no JSON"),
        (b"", 400, "empty"),
        (b"[]", 400, "valid dictionary"),
        (b"{}", 400, "instances"),
        (b'{"instances": []}', 400, "at least 1 item"),
        (b'{"instances": [3]}', 400, "instances.0"),
        (b'{"instances": ["a"], "parameters": {"top_k": -1}}', 400, "top_k is -1"),
        (b'{"instances": ["a"], "parameters": {"top_p": 1e309}}', 400, "larger than any number"),
        (b'{"instances": ["a"], "parameters": {"colour": 1}}', 400, "unknown option 'colour'"),
        (b'{"instances": ["a"], "parameters": {"top_k": 1, "TOP_K": 2}}', 400, "twice"),
        (b'{"instances": ["a \\ud800"]}', 400, "surrogate"),
        (b'{"instances": ["a"], "parameters": {"max_length": 0}}', 400, "max_length is 0"),
        (json.dumps({"instances": ["many words " * 5000]}).encode(), 400, "characters"),
        (json.dumps({"instances": ["word " * 1500]}).encode(), 400, "token"),
    ],
)
def test_what_is_wrong_is_named(http: httpx.Client, body: bytes, status: int, message: str) -> None:
    answer = http.post(PREDICT, content=body, headers={"content-type": "application/x-www-form-urlencoded"})
    assert answer.status_code == status
    assert list(answer.json()) == ["error"]
    assert message in answer.json()["error"]


def test_other_paths_answer_as_kserve_does(http: httpx.Client) -> None:
    assert http.get("/").json() == {"status": "alive"}
    assert http.get("/v1/models").json()["models"] == ["bluejay"]
    assert http.get("/v1/models/bluejay").json().items() >= {"name": "bluejay", "ready": True}.items()
    assert http.get("/v1/models/nope").status_code == 404
    assert http.post("/v1/models/nope:predict", json={"instances": ["a"]}).status_code == 404
    explained = http.post("/v1/models/bluejay:explain", json={})
    assert (explained.status_code, explained.json()) == (501, {"error": "Could not find explainer_host."})
    wrong = http.delete(PREDICT)
    assert (wrong.status_code, wrong.json()) == (405, {"detail": "Method Not Allowed"})


def test_old_programs_options_that_are_none_may_be_passed_over(
    start_server: Callable[..., AbstractContextManager[Any]],
) -> None:
    chosen = {"max_length": 6, "Colour": 1, "é": 2}
    with start_server(settings="[server]\nignore_unknown = true\n") as serving, serving.client() as http:
        answer = http.post(PREDICT, json={"instances": ["Once"], "parameters": chosen})
        assert (answer.status_code, answer.headers["x-ignored-options"]) == (200, "colour, ?")
        answer = http.post("/SyncPredict", json={"data": "Once", "input_kwargs": chosen})
        assert (answer.status_code, answer.headers["x-ignored-options"]) == (200, "Colour, ?")
        answer = http.post(
            "/SyncPredict", json={"data": "Once", "top_k": 1, "input_kwargs": chosen}
        )  # beside them, too
        assert (answer.status_code, answer.headers["x-ignored-options"]) == (200, "top_k, Colour, ?")
        answer = http.post("/Predict", json={"dataId": "none", "colour": 1})
        assert (answer.status_code, "colour" in answer.text) == (404, False)
        told = http.post("/predict", json={"prompt": "Once", **chosen}).json()
        assert told["message"] == "passed over, as it is no option: Colour, ?"
        wrong = http.post(PREDICT, json={"instances": ["Once"], "parameters": {"top_k": -1, "colour": 1}})
        assert (wrong.status_code, "colour" in wrong.text) == (400, False)
        answer = http.post(PREDICT, json={"instances": ["Once"], "parameters": {"max_length": 6}})
        assert "x-ignored-options" not in answer.headers


def test_a_server_of_strict_names_knows_its_own_alone(
    start_server: Callable[..., AbstractContextManager[Any]],
) -> None:
    with start_server("--strict-names", "--name", "jay", "--name", "blue") as serving, serving.client() as http:
        assert http.post(PREDICT, json={"instances": ["a"]}).status_code == 404
        for name in ("jay", "blue"):
            answer = http.post(f"/v1/models/{name}:predict", json={"instances": ["a"], "parameters": {"max_length": 4}})
            assert answer.headers["x-served-model"] == "jay"
