"""The `openai` package against a server with the default model, which the tests open in process as well."""

import base64
import struct

import pytest

import bluejay

from .answers import Answers, raised, returned

PROMPT = "Once upon a time"
FOX = "One day a fox"


@pytest.fixture(scope="module")
def answers(run_driver, server, model_name) -> Answers:
    return run_driver("openai", "openai_client", server.url, "any-key", model_name)


@pytest.fixture(scope="module")
def llm() -> bluejay.LLM:
    return bluejay.LLM()


def _greedy(llm: bluejay.LLM, prompt: str = PROMPT, new: int = 8, **options) -> str:
    (output,) = llm.generate([prompt], bluejay.SamplingParams(max_new_tokens=new, **options))
    return output.text


def _texts(answers: Answers, step: str) -> list[str]:
    choices = returned(answers, step)["choices"]
    assert [choice["index"] for choice in choices] == list(range(len(choices)))
    return [choice["text"] for choice in choices]


def test_models_are_listed_and_told(answers: Answers, model_name: str) -> None:
    listed = returned(answers, "models")
    assert model_name in [model["id"] for model in listed]
    assert {model["object"] for model in listed} == {"model"}
    assert returned(answers, "model")["id"] == model_name
    raised(answers, "unknown model", by="NotFoundError", saying="no-such-model")


def test_greedy_is_the_engines(answers: Answers, llm: bluejay.LLM, model_name: str) -> None:
    answer = returned(answers, "greedy")
    assert _texts(answers, "greedy") == [_greedy(llm)]
    assert answer["object"] == "text_completion"
    assert answer["model"] == model_name
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["choices"][0]["logprobs"] is None
    usage = {key: answer["usage"][key] for key in ("prompt_tokens", "completion_tokens", "total_tokens")}
    assert usage == {"prompt_tokens": 4, "completion_tokens": 8, "total_tokens": 12}
    assert _texts(answers, "greedy again") == _texts(answers, "greedy")
    assert returned(answers, "greedy again")["id"] != answer["id"]


def test_sixteen_tokens_are_the_default(answers: Answers) -> None:
    assert 1 <= returned(answers, "defaults")["usage"]["completion_tokens"] <= 16


def test_one_token_and_none(answers: Answers) -> None:
    assert returned(answers, "one token")["usage"]["completion_tokens"] == 1
    assert _texts(answers, "no token") == [PROMPT]
    logprobs = returned(answers, "no token")["choices"][0]["logprobs"]
    assert len(logprobs["token_logprobs"]) == 4


def test_a_seed_repeats(answers: Answers) -> None:
    assert _texts(answers, "seed 7") == _texts(answers, "seed 7 again")


def test_n_gives_as_many_choices(answers: Answers) -> None:
    texts = _texts(answers, "n")
    assert len(texts) == 3
    assert len(set(texts)) > 1
    usage = returned(answers, "n")["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"] <= 24) == (4, True)


def test_best_of_gives_the_likeliest_first(answers: Answers) -> None:
    answer = returned(answers, "best_of")
    means = [
        sum(choice["logprobs"]["token_logprobs"]) / len(choice["logprobs"]["token_logprobs"])
        for choice in answer["choices"]
    ]
    assert len(means) == 2
    assert means == sorted(means, reverse=True)
    assert answer["usage"]["completion_tokens"] > sum(
        len(choice["logprobs"]["tokens"]) for choice in answer["choices"]
    )  # all four count
    raised(answers, "best_of less than n", by="BadRequestError", saying="best_of")


def test_echo_gives_the_prompt_back(answers: Answers, llm: bluejay.LLM) -> None:
    assert _texts(answers, "echo") == [PROMPT + _greedy(llm)]


def _checked_logprobs(choice, *, top: int):
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"]
    count = len(logprobs["tokens"])
    assert len(logprobs["token_logprobs"]) == len(logprobs["text_offset"]) == count
    offsets = [sum(len(token) for token in logprobs["tokens"][:index]) for index in range(count)]
    assert [offset - logprobs["text_offset"][0] for offset in logprobs["text_offset"]] == offsets
    if top:
        assert len(logprobs["top_logprobs"]) == count
        for chosen, best in zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
            if chosen is not None:
                assert top <= len(best) <= top + 1
                assert chosen in best.values()  # the same float, whether or not it is among the best
    return logprobs


def test_logprobs_of_what_was_said(answers: Answers) -> None:
    (choice,) = returned(answers, "logprobs")["choices"]
    logprobs = _checked_logprobs(choice, top=3)
    best = [max(one.values()) for one in logprobs["top_logprobs"]]
    assert logprobs["token_logprobs"] == best  # greedy
    (choice,) = returned(answers, "logprobs 0")["choices"]
    assert _checked_logprobs(choice, top=0)["token_logprobs"] == logprobs["token_logprobs"]


def test_echo_with_logprobs_scores_the_prompt_but_for_its_first_token(answers: Answers) -> None:
    (choice,) = returned(answers, "echo with logprobs")["choices"]
    logprobs = _checked_logprobs(choice, top=2)
    assert choice["text"].startswith(PROMPT)
    assert logprobs["token_logprobs"][0] is None
    assert all(value <= 0 for value in logprobs["token_logprobs"][1:])


@pytest.mark.parametrize(("step", "stops"), [("stop", ["a"]), ("stop by a list", [".", ","])])
def test_stop_strings_are_not_said(answers: Answers, llm: bluejay.LLM, step: str, stops: list[str]) -> None:
    whole = _greedy(llm, new=40)
    assert _texts(answers, step) == [whole[: min(whole.index(stop) for stop in stops if stop in whole)]]
    assert returned(answers, step)["choices"][0]["finish_reason"] == "stop"


def test_penalties_change_what_repeats(answers: Answers, llm: bluejay.LLM) -> None:
    assert _texts(answers, "no penalties") == [_greedy(llm, new=24)]
    assert _texts(answers, "penalties") != _texts(answers, "no penalties")


@pytest.mark.parametrize("step", ["top_p", "top_k 1", "user"])
def test_a_nucleus_of_one_token_is_greedy(answers: Answers, step: str) -> None:
    assert _texts(answers, step) == _texts(answers, "greedy")


def test_prompts_are_texts_token_ids_and_batches_of_either(answers: Answers, llm: bluejay.LLM) -> None:
    assert _texts(answers, "batch of texts") == [_greedy(llm), _greedy(llm, FOX)]
    (one,) = _texts(answers, "token ids")
    first, second = _texts(answers, "batch of token ids")
    assert first == llm.tokenizer.decode([1, 2, 3]) + one
    assert second.startswith(llm.tokenizer.decode([4, 5]))
    assert returned(answers, "batch of token ids")["usage"]["prompt_tokens"] == 5
    assert len(_texts(answers, "batch with n")) == 4


def test_logit_bias_by_token_id(answers: Answers, llm: bluejay.LLM) -> None:
    assert _texts(answers, "logit_bias") == [llm.tokenizer.decode([42] * 4)]
    assert _texts(answers, "logit_bias against") == _texts(answers, "logit_bias")


@pytest.mark.parametrize(
    ("step", "new", "options"),
    [
        ("beams", 8, {"num_beams": 3, "length_penalty": 1.0}),
        ("groups of beams", 8, {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}),
        ("repetition_penalty", 24, {"repetition_penalty": 1.3}),
    ],
)
def test_generates_other_options_are_fields(answers: Answers, llm: bluejay.LLM, step: str, new: int, options) -> None:
    assert _texts(answers, step) == [_greedy(llm, new=new, **options)]


def _streamed(answers: Answers, step: str) -> dict[int, str]:
    """The texts by index; every chunk is of one answer, and each choice ends once."""
    chunks = returned(answers, step)
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    texts: dict[int, str] = {}
    ended: list[int] = []
    for choice in [choice for chunk in chunks for choice in chunk["choices"]]:
        assert choice["index"] not in ended
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        if choice.get("finish_reason"):
            ended.append(choice["index"])
    assert sorted(ended) == sorted(texts)
    return texts


def test_a_stream_says_what_the_whole_answer_says(answers: Answers) -> None:
    assert _streamed(answers, "stream") == {0: _texts(answers, "greedy")[0]}
    assert len(returned(answers, "stream")) > 3
    assert _streamed(answers, "stream with echo") == {0: _texts(answers, "echo")[0]}


def test_a_stream_counts_its_tokens_at_the_end_where_it_is_asked_to(answers: Answers) -> None:
    *chunks, last = returned(answers, "stream with usage")
    assert last["choices"] == []
    assert (last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]) == (4, 8)
    assert [chunk.get("usage") for chunk in chunks] == [None] * len(chunks)
    assert all(chunk.get("usage") is None for chunk in returned(answers, "stream"))


def test_a_stream_of_several_prompts_and_choices(answers: Answers) -> None:
    assert sorted(_streamed(answers, "stream of several")) == [0, 1, 2, 3]


def test_a_stream_has_logprobs(answers: Answers) -> None:
    chunks = returned(answers, "stream with logprobs")
    listed = [choice["logprobs"] for chunk in chunks for choice in chunk["choices"] if choice.get("logprobs")]
    streamed = [value for logprobs in listed for value in logprobs["token_logprobs"]]
    whole = returned(answers, "logprobs")["choices"][0]["logprobs"]["token_logprobs"]
    assert streamed == pytest.approx(whole, abs=1e-3)


def test_a_stream_that_cannot_be_is_an_error_before_it_begins(answers: Answers) -> None:
    raised(answers, "stream of an unknown model", by="NotFoundError", saying="no-such-model")


def test_a_stream_may_be_left(answers: Answers) -> None:
    assert returned(answers, "stream left early")["choices"]
    assert returned(answers, "after it")["choices"]


def _vectors(answers: Answers, step: str) -> list[list[float]]:
    data = returned(answers, step)["data"]
    assert [one["index"] for one in data] == list(range(len(data)))
    return [one["embedding"] for one in data]


def test_embeddings_are_the_engines_as_floats_and_as_base64(answers: Answers, llm: bluejay.LLM) -> None:
    expected = llm.embed("a blue jay")[0].tolist()
    (default,), (floats,), (coded,) = (
        _vectors(answers, step) for step in ("embedding", "embedding as floats", "embedding as base64")
    )
    assert default == pytest.approx(expected, abs=1e-3)
    assert floats == pytest.approx(expected, abs=1e-3)
    assert list(struct.unpack(f"<{len(expected)}f", base64.b64decode(coded))) == pytest.approx(expected, abs=1e-3)


def test_embeddings_of_several(answers: Answers) -> None:
    first, second, third = _vectors(answers, "embeddings")
    assert first == pytest.approx(third, abs=1e-4)
    assert first != pytest.approx(second, abs=1e-2)
    assert len(_vectors(answers, "embeddings of token ids")) == 2
    (one,) = _vectors(answers, "embedding of token ids")
    assert one == pytest.approx(_vectors(answers, "embeddings of token ids")[0], abs=1e-4)
    assert returned(answers, "embedding of token ids")["usage"]["prompt_tokens"] == 3


def test_embeddings_that_cannot_be(answers: Answers) -> None:
    raised(answers, "embedding of nothing", by="BadRequestError", saying="input")
    raised(answers, "embedding with dimensions", by="BadRequestError", saying="dimensions")
    raised(answers, "embedding of an unknown model", by="NotFoundError", saying="no-such-model")


@pytest.mark.parametrize(
    ("step", "param"),
    [
        ("temperature", "temperature"),
        ("type of max_tokens", "max_tokens"),
        ("too many tokens", "max_tokens"),
        ("too long", "prompt"),
        ("suffix", "suffix"),
        ("n", "n"),
        ("huge n", "n"),
        ("token id", "prompt"),
        ("no prompt", "prompt"),
        ("logit_bias", "logit_bias"),
        ("penalty", "presence_penalty"),
        ("unknown option", "no_such_option"),
        ("beams with a stream", "num_beam_groups"),
    ],
)
def test_what_is_wrong_is_named(answers: Answers, step: str, param: str) -> None:
    error = raised(answers, f"error: {step}", by="BadRequestError", saying=param)
    assert set(error["body"]) >= {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"].split(".")[0].split("[")[0] == param


def test_an_unknown_model_is_not_found(answers: Answers) -> None:
    error = raised(answers, "error: unknown model", by="NotFoundError", saying="no-such-model")
    assert (error["param"], error["code"]) == ("model", "model_not_found")


def test_chat_is_not_served(answers: Answers) -> None:
    raised(answers, "error: chat", by="NotFoundError")


def test_a_client_that_does_not_wait_times_out(answers: Answers) -> None:
    raised(answers, "timeout", by="APITimeoutError")


def test_answers_have_a_request_id(answers: Answers) -> None:
    assert returned(answers, "request id")


def test_many_at_once_are_answered_or_told_when_to_come_again(answers: Answers) -> None:
    outcomes = returned(answers, "many at once")
    assert len(outcomes) == 64
    assert any("text" in outcome for outcome in outcomes)
    for outcome in outcomes:
        if "text" not in outcome:
            assert outcome["raised"] in ("RateLimitError", "InternalServerError"), outcome
            assert outcome["status"] in (429, 503)
            assert float(outcome["retry-after"]) >= 0


def test_the_asynchronous_client_gets_the_same(answers: Answers) -> None:
    answer = returned(answers, "asynchronous")
    (text,) = _texts(answers, "greedy")
    assert answer["whole"] == "".join(answer["pieces"]) == text
    assert answer["width"] == len(_vectors(answers, "embedding")[0])
