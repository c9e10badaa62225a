from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bluejay.decoding import SamplingParams
from bluejay.decoding.processors import Processor, bad_words
from bluejay.decoding.sampler import Choice, choose, draw, generator_for, token_logprobs

CPU = torch.device("cpu")


def sampling(seed, index=0):
    return Choice((), generator_for(SamplingParams(do_sample=True, seed=seed), index, CPU))


def test_greedy_takes_the_first_of_the_likeliest():
    assert choose(torch.tensor([[1.0, 3.0, 3.0], [5.0, 1.0, 1.0]]), [Choice(), Choice()], [[0], [0]]) == [1, 0]


def test_each_row_has_its_own_way():
    ban_first = Choice([Processor(bad_words, [[0]])])
    logits = torch.tensor([[9.0, 1.0, 2.0]] * 3)
    only_two = torch.tensor([[-math.inf, -math.inf, 0.0]])
    rows = torch.cat((logits, only_two))
    assert choose(rows, [Choice(), ban_first, Choice(), sampling(1)], [[0]] * 4) == [0, 2, 0, 2]


@given(st.integers(0, 2**64 - 1), st.integers(1, 4), st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_a_seed_draws_the_same_whatever_else_is_in_the_batch(seed, others, place):
    logits = torch.zeros(1, 1000)
    alone = choose(logits, [sampling(seed)], [[0]])
    choices = [sampling(None) for _ in range(others)]
    place = min(place, others)
    choices.insert(place, sampling(seed))
    together = choose(logits.expand(others + 1, -1), choices, [[0]] * (others + 1))
    assert together[place] == alone[0]


def test_the_sequences_of_a_seed_differ_and_share_nothing_with_the_next_seed():
    drawn = [
        torch.rand(4, generator=generator_for(SamplingParams(seed=seed), index, CPU)).tolist()
        for seed in range(5)
        for index in range(5)
    ]
    assert len({tuple(values) for values in drawn}) == 25


def test_the_first_sequence_draws_as_torch_does_with_the_seed():
    torch.manual_seed(123)
    expected = torch.multinomial(torch.ones(1, 500) / 500, 1)
    assert choose(torch.zeros(1, 500), [sampling(123)], [[0]]) == [int(expected)]


@pytest.mark.parametrize("logits", [[-math.inf] * 3, [math.nan, 0.0, 0.0], [math.inf, 0.0, 0.0]])
def test_where_nothing_has_a_probability_nothing_is_drawn(logits):
    assert choose(torch.tensor([logits]), [sampling(1)], [[0]]) == [None]


@pytest.mark.parametrize("logits", [[-math.inf] * 3, [math.nan, 0.0, 0.0]])
def test_where_nothing_is_likely_nothing_is_the_likeliest(logits):
    rows = torch.tensor([[0.0, 2.0, 1.0], logits])
    assert choose(rows, [Choice(), Choice()], [[0], [0]]) == [1, None]
    banned = Choice([Processor(bad_words, [[1], [2]])])
    assert choose(torch.tensor([logits]), [banned], [[0]]) == [None]


def test_draws_follow_the_distribution():
    generator = torch.Generator().manual_seed(0)
    scores = torch.tensor([[0.1, 0.2, 0.7]]).log()
    counts = torch.zeros(3)
    for _ in range(1000):
        counts[draw(scores, 1, generator)] += 1
    assert torch.allclose(counts / 1000, torch.tensor([0.1, 0.2, 0.7]), atol=0.05)


def test_several_draws_do_not_repeat():
    ids = draw(torch.zeros(1, 5), 5, torch.Generator().manual_seed(0))
    assert sorted(ids[0].tolist()) == [0, 1, 2, 3, 4]


def test_logprobs_are_the_models_own_with_the_likeliest_first():
    probs = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.8, 0.1]])
    first, second = token_logprobs(probs.log() + 7, [1, 1], 2)
    assert first.token_id == 1
    assert first.logprob == pytest.approx(math.log(0.2), abs=1e-6)
    assert [token for token, _ in first.top] == [0, 2]
    assert [value for _, value in first.top] == pytest.approx([math.log(0.5), math.log(0.3)], abs=1e-6)
    assert second.top[0] == (1, second.logprob)


def test_logprobs_name_no_more_tokens_than_were_asked_for_or_exist():
    logits = torch.zeros(1, 3)
    assert token_logprobs(logits, [0], 0)[0].top == ()
    assert len(token_logprobs(logits, [0], 9)[0].top) == 3
