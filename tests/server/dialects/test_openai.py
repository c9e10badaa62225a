"""OpenAI's protocol on a running server."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest

from bluejay import LLM
from bluejay.decoding.params import SamplingParams

GOLDEN = sorted(Path(__file__).with_name("golden").joinpath("openai").glob("*.json"))
ANYTHING = "…"
GREEDY = {"prompt": "Once upon a time", "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def http(server: Any) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM()


def complete(http: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def texts(http: httpx.Client, **body: Any) -> list[str]:
    return [choice["text"] for choice in complete(http, **body)["choices"]]


def refused(http: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = http.post("/v1/completions", content=json.dumps({"prompt": "a", **body}))
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error


def events(answer: httpx.Response) -> list[Any]:
    """What a stream sent, the last mark as a text."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    parts = answer.text.split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data: ") for part in parts)
    return [part[6:] if part == "data: [DONE]" else json.loads(part[6:]) for part in parts]


def streamed(http: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    *chunks, done = events(http.post("/v1/completions", json={**body, "stream": True}))
    assert done == "[DONE]"
    return chunks


def joined(chunks: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The choices of a stream put together, by their index."""
    choices: dict[int, dict[str, Any]] = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        own = choices.setdefault(choice["index"], {"text": "", "finish_reason": None, "logprobs": None})
        assert own["finish_reason"] is None
        own["text"] += choice["text"]
        own["finish_reason"] = choice["finish_reason"]
        for name, column in (choice["logprobs"] or {}).items():
            own["logprobs"] = own["logprobs"] or {}
            own["logprobs"].setdefault(name, []).extend(column)
    return choices


def matches(found: Any, wanted: Any) -> bool:
    if wanted == ANYTHING:
        return True
    if isinstance(wanted, dict):
        return (
            isinstance(found, dict)
            and found.keys() == wanted.keys()
            and all(matches(found[key], value) for key, value in wanted.items())
        )
    if isinstance(wanted, list):
        return (
            isinstance(found, list)
            and len(found) == len(wanted)
            and all(matches(one, other) for one, other in zip(found, wanted, strict=True))
        )
    return bool(found == wanted)


@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.stem)
def test_a_golden_request_gets_its_golden_answer(http: httpx.Client, file: Path) -> None:
    golden = json.loads(file.read_text(encoding="utf-8"))
    answer = http.post(golden["path"], json=golden["request"])
    assert answer.status_code == golden["status"]
    found = events(answer) if golden["request"].get("stream") else answer.json()
    assert matches(found, golden["response"]), json.dumps(found, indent=1)


def test_it_says_what_the_engine_says(http: httpx.Client, llm: LLM) -> None:
    [expected] = llm.generate(GREEDY["prompt"], SamplingParams(max_new_tokens=12))
    assert texts(http, **GREEDY) == [expected.text]
    [beams] = llm.generate(GREEDY["prompt"], SamplingParams(max_new_tokens=8, num_beams=3, num_return_sequences=2))
    found = texts(http, prompt=GREEDY["prompt"], max_new_tokens=8, num_beams=3, n=2)
    assert found == [sequence.text for sequence in beams.sequences]
    [drawn] = llm.generate(GREEDY["prompt"], SamplingParams(max_new_tokens=16, do_sample=True, top_k=0, seed=5))
    assert texts(http, prompt=GREEDY["prompt"], seed=5) == [drawn.text]


def test_prompts_are_texts_or_tokens(http: httpx.Client) -> None:
    tokens = http.post("/tokenize", json={"prompt": GREEDY["prompt"]}).json()["tokens"]
    [text] = texts(http, **GREEDY)
    assert texts(http, **{**GREEDY, "prompt": tokens}) == [text]
    assert texts(http, **{**GREEDY, "prompt": [tokens, tokens[:2], tokens]})[::2] == [text, text]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"echo": True},
        {"logprobs": 2},
        {"echo": True, "logprobs": 1},
        {"echo": True, "logprobs": 1, "max_tokens": 0},
        {"stop": [" little"]},
        {"n": 3, "temperature": 1.0, "seed": 4},
        {"n": 2, "echo": True, "logprobs": 0, "temperature": 1.0, "seed": 4},
        {"num_beams": 3, "n": 2},
        {"prompt": ["Once upon a time", "A bird", "The"], "n": 2, "seed": 1, "temperature": 0.7, "echo": True},
    ],
)
def test_a_stream_says_what_comes_without_one(http: httpx.Client, more: dict[str, Any]) -> None:
    whole = {choice["index"]: choice for choice in complete(http, **{**GREEDY, **more})["choices"]}
    chunks = streamed(http, **{**GREEDY, **more})
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    pieces = joined(chunks)
    assert pieces.keys() == whole.keys()
    for index, choice in whole.items():
        assert pieces[index]["text"] == choice["text"]
        assert pieces[index]["finish_reason"] == choice["finish_reason"]
        found, wanted = pieces[index]["logprobs"], choice["logprobs"]
        assert (found is None) == (wanted is None)
        if found is not None:
            assert (found["tokens"], found["text_offset"]) == (wanted["tokens"], wanted["text_offset"])
            assert found["token_logprobs"] == pytest.approx(wanted["token_logprobs"], abs=1e-4)


def test_logprobs_stand_where_their_tokens_do(http: httpx.Client) -> None:
    prompt = "A bird — ’tis 🐦"
    [choice] = complete(http, prompt=prompt, max_tokens=8, temperature=0, echo=True, logprobs=3)["choices"]
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert len({len(column) for column in logprobs.values()}) == 1
    assert any(token.startswith("bytes:\\x") for token in logprobs["tokens"])
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert token.startswith("bytes:") or choice["text"][offset : offset + len(token)] == token
    for logprob, top in zip(logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True):
        assert logprob in top.values()
        assert 3 <= len(top) <= 4 or any(token.startswith("bytes:") for token in top)


@pytest.fixture(scope="module")
def exact(start_server: Callable[..., AbstractContextManager[Any]]) -> Iterator[httpx.Client]:
    """A server that keeps keys and values as they are computed, not in half of that."""
    with start_server(settings="[engine]\ncache_dtype = 'float32'\n") as serving, serving.client() as client:
        yield client


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_scores_are_the_engines_own(exact: httpx.Client, http: httpx.Client, llm: LLM, max_tokens: int) -> None:
    for client, tolerance in ((exact, 1e-5), (http, 5e-4)):
        _check_scores(client, llm, max_tokens, tolerance)


def _check_scores(http: httpx.Client, llm: LLM, max_tokens: int, tolerance: float) -> None:
    """As lm-eval reads them: prompts as tokens, the continuation's log-probabilities, greedy where each is the best.

    Args: tolerance: for each token.
    """
    pairs = [
        ("Once upon a time", " there was a little girl"),
        ("The cat sat on", " the granite seventeen"),
        ("", "One day, Tom went to the park."),
        ("Once upon a time there was a bird." * 20, " The bird was happy."),
    ]
    contexts = [llm.encode(context.rstrip()) for context, _ in pairs]
    whole = [ids + llm.tokenizer.encode(said) for ids, (_, said) in zip(contexts, pairs, strict=True)]
    answer = complete(http, prompt=whole, max_tokens=max_tokens, temperature=0, logprobs=1, echo=True, seed=1234)
    scores = llm.score(pairs)
    for choice, context, ids, score in zip(answer["choices"], contexts, whole, scores, strict=True):
        logprobs = choice["logprobs"]
        assert len(logprobs["tokens"]) == len(ids) + max_tokens
        found = logprobs["token_logprobs"][len(context) : len(ids)]
        best = [max(top.values()) for top in logprobs["top_logprobs"][len(context) : len(ids)]]
        assert sum(found) == pytest.approx(score.logprob, abs=tolerance * len(found))
        assert (found == best) == score.is_greedy
    assert answer["usage"]["completion_tokens"] == max_tokens * len(pairs)


def test_log_probabilities_of_a_long_prompt_are_those_of_its_parts(http: httpx.Client, llm: LLM) -> None:
    ids = [*llm.encode("Once upon a time, there was a little bird. "), *llm.encode("It sang. ") * 150][:500]
    asked = {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 20, "temperature": 0}
    [whole] = complete(http, **asked)["choices"]
    [short] = complete(http, **{**asked, "prompt": ids[:40]})["choices"]  # few enough to be written on the loop
    assert len(whole["logprobs"]["tokens"]) == 500
    for name in ("tokens", "text_offset"):
        assert whole["logprobs"][name][:40] == short["logprobs"][name]
    assert whole["logprobs"]["token_logprobs"][1:40] == pytest.approx(short["logprobs"]["token_logprobs"][1:], abs=2e-2)
    assert all(len(top) in (20, 21) for top in whole["logprobs"]["top_logprobs"][1:])
    assert joined(streamed(http, **asked))[0]["logprobs"] == whole["logprobs"]


def test_best_of_is_the_likeliest_by_token(http: httpx.Client) -> None:
    drawn = {**GREEDY, "temperature": 1.0, "seed": 9, "logprobs": 0}
    everything = complete(http, **drawn, n=6)["choices"]

    def likelihood(choice: dict[str, Any]) -> float:
        found = choice["logprobs"]["token_logprobs"]
        return float(sum(found) / len(found))

    wanted = [choice["text"] for choice in sorted(everything, key=likelihood, reverse=True)[:2]]
    answer = complete(http, **{**drawn, "logprobs": None}, n=2, best_of=6)
    assert [choice["text"] for choice in answer["choices"]] == wanted
    assert [choice["logprobs"] for choice in answer["choices"]] == [None, None]
    assert answer["usage"]["completion_tokens"] == sum(len(one["logprobs"]["tokens"]) for one in everything)


def test_penalties_keep_words_from_coming_again(http: httpx.Client) -> None:
    prompt = "the cat the cat the cat the cat"
    plain = {"prompt": prompt, "max_tokens": 32, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    for name in ("frequency_penalty", "presence_penalty"):
        [less] = complete(http, **plain, **{name: 2.0})["choices"]
        [more] = complete(http, **plain, **{name: -2.0})["choices"]
        assert len(set(less["logprobs"]["tokens"])) > len(set(more["logprobs"]["tokens"]))


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"prompt": []}, "prompt", "expected a text"),
        ({"prompt": [[]]}, "prompt", "expected a text"),
        ({"prompt": [1, "a"]}, "prompt", "expected a text"),
        ({"prompt": [True]}, "prompt", "expected a text"),
        ({"prompt": [-1]}, "prompt", "expected a text"),
        ({"prompt": None}, "prompt", "expected a text"),
        ({"prompt": [10**6]}, "prompt", "token ids [1000000]"),
        ({"prompt": [10**6], "stream": True}, "prompt", "token ids [1000000]"),
        ({"prompt": "a \ud800"}, None, "surrogate"),
        ({"max_tokens": "8"}, "max_tokens", "integer"),
        ({"max_tokens": 3, "max_new_tokens": 3}, "max_tokens", "say the same"),
        ({"n": 600}, "n", "at most 512"),
        ({"n": 3, "num_beams": 2}, "n", "n is 3, expected 1 to 2"),
        ({"logprobs": 21}, "logprobs", "at most 20"),
        ({"prompt": [[1] * 999] * 26, "echo": True, "logprobs": 20}, "logprobs", "expected at most 524,288"),
        ({"best_of": 2, "stream": True}, "best_of", "stream"),
        ({"best_of": 2, "num_beams": 2}, "best_of", "beams"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "without stream"),
        ({"stream": True, "stream_options": {"colour": 1}}, "stream_options", "colour"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "'x' is no token id"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "from -100 to 100"),
        ({"logit_bias": {"999999": 1}}, "logit_bias", "expected ids from 0"),
        ({"do_sample": True, "temperature": 0}, "temperature", "above 0"),
        ({"num_beams": 4, "num_beam_groups": 3, "diversity_penalty": 1.0}, "num_beam_groups", "divisor"),
        ({"stop": [""]}, "stop", "at least 1 character"),
        ({"num_return_sequences": 2}, "num_return_sequences", "not permitted"),
    ],
)
def test_what_is_wrong_is_named(http: httpx.Client, body: dict[str, Any], param: str | None, message: str) -> None:
    error = refused(http, **body)
    assert error["param"] == param
    assert message in error["message"]


def test_embeddings_are_the_engines_own(http: httpx.Client, llm: LLM) -> None:
    texts = ["a blue jay", "a fox", "a blue jay " * 200]
    plain = http.post("/v1/embeddings", json={"input": texts}).json()
    coded = http.post("/openai/v1/embeddings", json={"input": texts, "encoding_format": "base64"}).json()
    expected = llm.embed(texts).tolist()
    for found, other, vector in zip(plain["data"], coded["data"], expected, strict=True):
        assert found["embedding"] == pytest.approx(vector, abs=1e-3)
        raw = base64.b64decode(other["embedding"])
        assert list(struct.unpack(f"<{len(vector)}f", raw)) == pytest.approx(vector, abs=1e-3)
    assert plain["usage"]["prompt_tokens"] == sum(len(llm.encode(text)) for text in texts)
    for wrong in ("", ["a", ""], [], "word " * 2000, [[1] * 1025], [10**6]):
        answer = http.post("/v1/embeddings", json={"input": wrong})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input"), answer.text


def test_tokens_there_and_back(http: httpx.Client, llm: LLM) -> None:
    text = "Once upon a time, ’twas <|endoftext|> 🐦"
    found = http.post("/tokenize", json={"prompt": text, "add_special_tokens": False, "return_token_strs": True}).json()
    assert found["tokens"] == llm.encode(text)
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), 1024)
    assert found["token_strs"][0] == "Once"
    assert http.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": text}
    wrong = http.post("/detokenize", json={"tokens": [10**6]})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "tokens")
    about = http.get("/tokenizer_info").json()
    assert (about["eos_token"], about["eos_token_id"]) == ("<|endoftext|>", llm.tokenizer.eos_token_id)
    assert about["model_max_length"] == 1024


def test_the_same_stands_below_kserves_prefix(http: httpx.Client) -> None:
    answer = http.post("/openai/v1/completions", json=GREEDY)
    assert answer.json()["choices"] == complete(http, **GREEDY)["choices"]
    assert answer.headers["x-served-model"] == "bluejay"
    assert http.get("/openai/v1/models").json()["data"][0]["id"] == "bluejay"
    assert http.get("/openai/v1/models/bluejay").json()["ready"] is True
    assert http.post("/openai/v1/chat/completions", json={}).status_code == 404


def test_a_models_defaults_stand_before_openais(start_server: Callable[..., AbstractContextManager[Any]]) -> None:
    settings = "[models.jay]\nsource = 'default'\ndefaults = {max_length = 9, do_sample = false}\n"
    with start_server(settings=settings) as serving, serving.client() as http:
        prompt = GREEDY["prompt"]
        [plain] = complete(http, prompt=prompt)["choices"]
        assert complete(http, prompt=prompt)["usage"]["total_tokens"] == 9
        assert texts(http, prompt=prompt, max_tokens=5, temperature=0) == [plain["text"]]
        assert complete(http, prompt=prompt, max_tokens=3)["usage"]["completion_tokens"] == 3
