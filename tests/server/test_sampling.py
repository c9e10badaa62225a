"""From callers' options to sampling."""

from __future__ import annotations

from typing import Any

import pytest

from bluejay.errors import InvalidRequest, UnsupportedOption
from bluejay.server.sampling import known_only, refuse_untold, sampling_params


def test_later_layers_count_and_none_says_nothing() -> None:
    params = sampling_params({"max_length": 50, "do_sample": True}, None, {"max_length": 9, "do_sample": None})
    assert (params.max_length, params.do_sample) == (9, True)


def test_unknown_options_are_named_with_those_that_there_are() -> None:
    with pytest.raises(InvalidRequest, match=r"'colour', 'size'; there are: max_length") as refused:
        sampling_params({"size": 1, "colour": 2})
    assert refused.value.param == "colour"


@pytest.mark.parametrize("value", [10**400, -(10**400), float("inf"), "1", True, [1]])
@pytest.mark.parametrize("name", ["temperature", "max_time", "length_penalty"])
def test_numbers_that_are_none_are_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=name) as refused:
        sampling_params({name: value})
    assert len(str(refused.value)) < 300


def test_what_is_said_later_of_lengths_counts_by_whatever_name() -> None:
    params = sampling_params({"max_length": 50, "min_length": 1}, {"max_new_tokens": 30}, {"max_length": 200})
    assert (params.max_length, params.max_new_tokens, params.min_length) == (200, None, 1)
    params = sampling_params({"min_length": 10}, {"min_new_tokens": 2, "max_length": 9, "max_new_tokens": 5})
    assert (params.min_length, params.min_new_tokens, params.max_length, params.max_new_tokens) == (0, 2, 9, 5)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("stop", ["x"] * 33, "stop has 33 entries, expected at most 32"),
        ("stop", "x" * 257, "more than 256 characters"),
        ("stop", ["x", "x" * 257], "more than 256 characters"),
        ("eos_token_id", list(range(33)), "eos_token_id has 33 entries"),
        ("bad_words_ids", [[1]] * 1025, "bad_words_ids has 1,025 entries"),
        ("bad_words_ids", [[1] * 513, [2] * 512], "more than 1,024 token ids"),
        ("logit_bias", {str(token): 1 for token in range(1025)}, "logit_bias has 1,025 entries"),
    ],
)
def test_lists_that_each_step_looks_through_are_bound(name: str, value: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as refused:
        sampling_params({name: value})
    assert refused.value.param == name


def test_a_long_wrong_value_is_not_told_back_whole() -> None:
    with pytest.raises(InvalidRequest, match="stop is") as refused:
        sampling_params({"stop": [[1] * 100_000]})
    assert len(str(refused.value)) < 300


def test_token_ids_may_be_texts_as_json_has_them() -> None:
    assert sampling_params({"logit_bias": {"7": -100, 8: 1.5}}).logit_bias == {7: -100, 8: 1.5}
    with pytest.raises(InvalidRequest, match="logit_bias"):
        sampling_params({"logit_bias": {"seven": 1}})


def test_what_an_answer_cannot_tell_is_refused() -> None:
    refuse_untold({"logprobs": None, "top_k": 3})
    with pytest.raises(UnsupportedOption, match="prompt_logprobs is not told"):
        refuse_untold({"prompt_logprobs": 1})


def test_of_names_that_are_none_the_first_ones_are_told_and_how_many_more() -> None:
    chosen = {"top_k": 1, **{f"colour{number:02}": 1 for number in range(12)}}
    kept, headers = known_only(chosen, ignore_unknown=True)
    first = ", ".join(f"colour{number:02}" for number in range(8))
    assert (kept, headers) == ({"top_k": 1}, {"X-Ignored-Options": f"{first}, and 4 more"})
    _, headers = known_only({"top_k": 1, "é": 2}, ignore_unknown=True, beside=["top_k"])
    assert headers == {"X-Ignored-Options": "top_k, ?"}
    assert known_only({"top_k": 1}, ignore_unknown=True)[1] == {}
    assert known_only(chosen, ignore_unknown=False) == (chosen, {})
