from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bluejay.decoding import SamplingParams
from bluejay.decoding import processors as P
from bluejay.errors import InvalidRequest

INF = math.inf


def scores(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def banned(result):
    return [[i for i, score in enumerate(row) if score == -INF] for row in result.tolist()]


def chain(prompt=(1, 2), eos_ids=(0,), vocab_size=6, **options):
    return P.processors_for(SamplingParams(**options), list(prompt), eos_ids=eos_ids, vocab_size=vocab_size)


def test_defaults_process_nothing():
    assert chain() == []
    assert chain(num_beams=4) == []
    assert chain(temperature=0.5, top_p=0.5) == []  # nothing is drawn
    assert chain(do_sample=True, top_k=0) == []


def test_repetition_penalty_makes_seen_tokens_less_likely_whatever_their_sign():
    result = P.repetition_penalty(scores([2, -2, 3], [2, -2, 3]), [[0, 1, 1], [2]], [2.0, 2.0])
    assert result.tolist() == [[1, -4, 3], [2, -2, 1.5]]


def test_a_bias_is_added_to_the_tokens_it_names():
    result = P.logit_bias(scores([1, -INF, 3], [1, 2, 3]), [[0], [0]], [{0: 2.0, 1: 100.0}, {2: -100.0}])
    assert result.tolist() == [[3, -INF, 3], [1, 2, -97]]
    [processor] = chain(logit_bias={5: -1.0})
    assert processor(torch.zeros(1, 6), [[1]]).tolist() == [[0, 0, 0, 0, 0, -1]]
    assert chain(logit_bias={}) == []


def test_a_bias_outside_the_vocabulary_is_refused():
    with pytest.raises(InvalidRequest, match=r"logit_bias names \[6\], expected ids from 0 to 5") as error:
        chain(logit_bias={6: 1.0, 2: 1.0})
    assert error.value.param == "logit_bias"


def test_penalties_count_the_answer_alone():
    values = [(0.5, 1.0, 2), (0.25, 0.0, 1), (0.5, 1.0, 3)]
    result = P.answer_penalties(torch.zeros(3, 4), [[3, 3, 1, 1, 2], [3, 0], [1, 1, 1]], values)
    assert result.tolist() == [[0, -2, -1.5, 0], [-0.25, 0, 0, 0], [0, 0, 0, 0]]
    assert P.answer_penalties(torch.ones(1, 2), [[1]], [(2.0, 2.0, 1)]).tolist() == [[1, 1]]
    [processor] = chain(prompt=(1, 1), presence_penalty=-1.0)
    assert processor(torch.zeros(1, 3), [[1, 1, 2]]).tolist() == [[0, 0, 1]]


@pytest.mark.parametrize(
    ("history", "size", "expected"),
    [
        ([1, 2, 3, 1, 2], 3, [3]),
        ([1, 2, 3, 1, 4], 3, []),
        ([1, 2, 1, 3, 1], 2, [2, 3]),
        ([1, 3], 1, [1, 3]),
        ([1], 3, []),
        ([1, 1], 2, [1]),
    ],
)
def test_an_ngram_does_not_come_twice(history, size, expected):
    assert banned(P.no_repeat_ngram(torch.zeros(1, 6), [history], [size])) == [expected]


def test_ngrams_of_the_prompt_do_not_come_in_the_answer():
    [processor] = chain(prompt=[1, 2, 3], encoder_no_repeat_ngram_size=2)
    assert banned(processor(torch.zeros(3, 6), [[1, 2, 3], [1, 2, 3, 1], [1, 2, 3, 4, 5, 4]])) == [[], [2], []]


def test_bad_words_are_banned_at_their_last_token():
    words = [[5], [1, 2], [3, 1, 4]]
    rows = [[9, 1], [3, 1], [7, 3, 1], [1]]
    result = banned(P.bad_words(torch.zeros(4, 6), rows, [words] * 4))
    assert result == [[2, 5], [2, 5], [2, 4, 5], [5]]  # the whole word must fit into the history, as in transformers


def test_an_end_of_text_alone_is_no_bad_word():
    [processor] = chain(eos_ids=(0, 3), bad_words_ids=[[0], [3], [4], [1, 0]])
    assert banned(processor(torch.zeros(2, 6), [[2, 2], [2, 1]])) == [[4], [0, 4]]


def test_bad_words_outside_the_vocabulary_are_refused():
    with pytest.raises(InvalidRequest, match=r"bad_words_ids names \[6, 7\], expected ids from 0 to 5") as error:
        chain(bad_words_ids=[[1, 7], [6]])
    assert error.value.param == "bad_words_ids"


@pytest.mark.parametrize(
    ("options", "first_free"),
    [
        ({"min_length": 4}, 4),
        ({"min_new_tokens": 3}, 5),
        ({"min_length": 9, "min_new_tokens": 1}, 3),
    ],
)
def test_no_end_before_the_smallest_length(options, first_free):
    [processor] = chain(prompt=[1, 2], eos_ids=(0, 3, 50256), **options)
    for length in range(2, 8):
        expected = [0, 3] if length < first_free else []
        assert banned(processor(torch.zeros(1, 6), [[1] * length])) == [expected]


def test_a_smallest_length_without_an_end_of_text_processes_nothing():
    assert chain(eos_ids=(), min_new_tokens=5) == []
    assert chain(prompt=[1, 2, 3], min_length=3) == []


def test_invalid_values_become_finite_and_ids_without_a_token_stay_out():
    largest = torch.finfo(torch.float32).max
    values = scores([math.nan, INF, -INF, 1])
    assert P.finite(values).tolist() == [[0, largest, -largest, 1]]
    assert P.finite(values, torch.tensor([False, True, False, True])).tolist() == [[0, -INF, -largest, -INF]]


def test_top_k_keeps_equals_of_the_last():
    assert banned(P.top_k(scores([1, 3, 2, 2]), [2])) == [[0]]
    assert banned(P.top_k(scores([1, 3, 2, 2]), [9])) == [[]]


@pytest.mark.parametrize(
    ("p", "keep", "expected"), [(0.0, 1, [0, 1, 2]), (0.5, 1, [0, 1, 2]), (0.55, 1, [0, 1]), (0.0, 3, [0])]
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(p, keep, expected):
    assert banned(P.top_p(scores([0.1, 0.15, 0.25, 0.5]).log(), 1 - p, [keep])) == [expected]


def test_min_p_is_relative_to_the_likeliest():
    assert banned(P.min_p(scores([0.1, 0.3, 0.6]).log(), 0.4, [1])) == [[0]]
    assert banned(P.min_p(scores([0.1, 0.3, 0.6]).log(), 1.0, [2])) == [[0]]


def test_typical_p_prefers_expected_surprise_to_likelihood():
    even = torch.cat((torch.tensor([0.4]), torch.full((6,), 0.1)))[None].log()
    assert banned(P.typical_p(even, 0.2, [1])) == [[0]]


def test_beams_keep_a_token_besides_every_end_of_text():
    options = {"do_sample": True, "top_k": 1, "num_beams": 2}
    [top_k] = chain(eos_ids=(0, 3), **options)
    assert banned(top_k(scores([1, 2, 3, 4, 5, 6]), [[1]])) == [[0, 1, 2]]
    [top_k] = chain(eos_ids=(), **options)
    assert banned(top_k(scores([1, 2, 3, 4, 5, 6]), [[1]])) == [[0, 1, 2, 3]]


def test_later_groups_pay_for_each_time_a_token_was_chosen():
    assert P.diversity(scores([1, 1, 1]), [2, 0, 2], 0.5).tolist() == [[0.5, 1, 0]]
    assert P.diversity(scores([1, 1, 1]), [7], 0.5).tolist() == [[1, 1, 1]]


def test_scores_that_come_in_stay_as_they_are():
    options = {"repetition_penalty": 2.0, "no_repeat_ngram_size": 1, "min_new_tokens": 9, "bad_words_ids": [[4]]}
    options |= {"frequency_penalty": 1.0, "logit_bias": {3: 1.0}}
    options |= {"do_sample": True, "temperature": 0.5, "top_k": 2, "top_p": 0.5, "min_p": 0.1, "typical_p": 0.5}
    values = torch.randn(2, 6)
    before = values.clone()
    processors = chain(remove_invalid_values=True, encoder_no_repeat_ngram_size=2, **options)
    assert len(processors) == 13
    P.process(processors, values, [[1, 2, 3], [3, 4, 4]])
    assert torch.equal(values, before)


@given(
    st.lists(st.floats(-20, 20, width=32), min_size=3, max_size=30),
    st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.floats(0.05, 5),
            "top_k": st.integers(0, 40),
            "top_p": st.floats(0, 1),
            "min_p": st.floats(0, 1),
            "typical_p": st.floats(0.01, 1),
        },
    ),
)
@settings(max_examples=60, deadline=None)
def test_narrowing_leaves_a_distribution_with_the_likeliest_token_or_a_typical_one(values, options):
    processors = chain(vocab_size=len(values), do_sample=True, **options)
    result = P.process(processors, scores(values), [[0]])
    probs = result.softmax(-1)
    assert float(probs.sum()) == pytest.approx(1, abs=1e-5)
    assert (result > -INF).any()
    if "typical_p" not in options:
        assert result.argmax() in (result == result.max()).nonzero()[:, 1]
        assert scores(values)[0, int(result.argmax())] == max(scores(values)[0])
