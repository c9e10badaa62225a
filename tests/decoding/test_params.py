from __future__ import annotations

import math

import pytest

from bluejay.decoding import SamplingParams
from bluejay.errors import InvalidRequest


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ({}, "greedy"),
        ({"do_sample": True}, "sample"),
        ({"num_beams": 2}, "beam"),
        ({"num_beams": 2, "do_sample": True}, "beam_sample"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1}, "group_beam"),
    ],
)
def test_options_decide_the_mode(options, mode):
    assert SamplingParams(**options).mode == mode


def test_json_names_tokens_by_texts():
    assert SamplingParams.from_json({"logit_bias": {"7": -100, 8: 1.5}, "seed": 1}).logit_bias == {7: -100, 8: 1.5}
    for wrong in ("seven", "-7", "٧", "9" * 10, "9" * 5000):
        with pytest.raises(InvalidRequest, match=r"logit_bias is .*, expected a table of token ids"):
            SamplingParams.from_json({"logit_bias": {wrong: 1}})


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_length", [0, -1, 1.5, True, "3"]),
        ("max_new_tokens", [0, 2.0]),
        ("min_length", [-1, None]),
        ("min_new_tokens", [-1]),
        ("do_sample", [1, None, "yes"]),
        ("num_beams", [0, None, "4", 1001]),
        ("num_return_sequences", [0, 1001]),
        ("num_beam_groups", [0]),
        ("diversity_penalty", [-1.0, math.inf]),
        ("early_stopping", [1, None, "always"]),
        ("length_penalty", [math.nan, 51, "1"]),
        ("temperature", [-0.1, math.nan, math.inf, None, True]),
        ("top_k", [-1, 0.5]),
        ("top_p", [-0.1, 1.1]),
        ("min_p", [-0.1, 1.1]),
        ("typical_p", [0, 1.1]),
        ("repetition_penalty", [0, -1.0]),
        ("frequency_penalty", [-2.1, 2.1, None, math.nan]),
        ("presence_penalty", [-2.1, 2.1, "1"]),
        ("logit_bias", [{-1: 1.0}, {"1": 1.0}, {1: math.inf}, {1: 1e39}, {1: None}, [(1, 1.0)], {2**31: 1.0}]),
        ("no_repeat_ngram_size", [-1, 1.0]),
        ("encoder_no_repeat_ngram_size", [-1]),
        ("bad_words_ids", [[], [[]], [[-1]], [3], "ab", [["a"]]]),
        ("num_return_sequences", [0]),
        ("max_time", [-1.0, math.nan]),
        ("remove_invalid_values", [0]),
        ("stop", ["", ["a", ""], [1], None]),
        ("seed", [-1, 2**64, 1.0]),
        ("logprobs", [-1]),
        ("prompt_logprobs", [-1]),
        ("eos_token_id", [-1, [], [1.0], True, "a"]),
        ("ignore_eos", [None]),
    ],
)
def test_a_wrong_value_is_refused_by_name_with_what_is_expected(name, values):
    for value in values:
        with pytest.raises(InvalidRequest, match=f"{name} is .*, expected") as error:
            SamplingParams(**{name: value})
        assert error.value.param == name


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(InvalidRequest, match=r"num_beams is 0.*top_p is 3.*do_sample is 'no'") as error:
        SamplingParams(top_p=3, num_beams=0, do_sample="no")
    assert error.value.param == "num_beams"


@pytest.mark.parametrize(
    ("param", "options"),
    [
        ("num_return_sequences", {"num_return_sequences": 2}),
        ("num_return_sequences", {"num_return_sequences": 3, "num_beams": 2}),
        ("num_return_sequences", {"num_return_sequences": 3, "num_beams": 2, "do_sample": True}),
        ("temperature", {"do_sample": True, "temperature": 0}),
        ("diversity_penalty", {"diversity_penalty": 0.5}),
        ("diversity_penalty", {"diversity_penalty": 0.5, "num_beams": 4}),
        ("diversity_penalty", {"num_beams": 4, "num_beam_groups": 2}),
        ("num_beam_groups", {"num_beams": 4, "num_beam_groups": 3, "diversity_penalty": 0.5}),
        ("num_beam_groups", {"num_beams": 2, "num_beam_groups": 4, "diversity_penalty": 0.5}),
        ("do_sample", {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5, "do_sample": True}),
    ],
)
def test_options_that_exclude_each_other_are_refused(param, options):
    with pytest.raises(InvalidRequest) as error:
        SamplingParams(**options)
    assert error.value.param == param


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 0.5, "top_k": 3, "top_p": 0.5},
        {"length_penalty": 2, "early_stopping": "never"},
        {"num_beam_groups": 2},
        {"max_length": 10, "max_new_tokens": 3, "min_length": 50},
        {"top_k": None, "top_p": None, "min_p": None, "typical_p": None, "max_time": None},
    ],
)
def test_options_without_a_meaning_in_the_mode_are_accepted(options):
    assert SamplingParams(**options).mode == "greedy"


def test_values_are_brought_into_one_form():
    params = SamplingParams(temperature=2, length_penalty=-1, stop="x", bad_words_ids=[[1, 2]], eos_token_id=7)
    assert (params.temperature, type(params.temperature)) == (2.0, float)
    assert params.length_penalty == -1.0
    assert params.stop_texts == ("x",)
    assert params.bad_words_ids == ((1, 2),)
    assert hash(params) == hash(
        SamplingParams(temperature=2.0, length_penalty=-1.0, stop=["x"], bad_words_ids=((1, 2),), eos_token_id=[7])
    )


def test_the_models_end_of_text_counts_unless_another_or_none_is_asked_for():
    assert SamplingParams().eos_ids(5) == (5,)
    assert SamplingParams().eos_ids(None) == ()
    assert SamplingParams(eos_token_id=[3, 4]).eos_ids(5) == (3, 4)
    assert SamplingParams(eos_token_id=3, ignore_eos=True).eos_ids(5) == ()
