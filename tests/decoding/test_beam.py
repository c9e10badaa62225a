from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bluejay.decoding import SamplingParams
from bluejay.decoding.beam import BeamRules, BeamSearch, beam_search
from bluejay.decoding.processors import processors_for
from bluejay.decoding.sampler import generator_for

EOS = 0


def language(vocab_size, seed, spread=2.0):
    """Logits that depend on the last two tokens: a model to search in."""
    table = torch.randn(vocab_size, vocab_size, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread
    return lambda history: table[history[-2], history[-1]]


def rules(params, prompt, max_new_tokens, vocab_size=8, **more):
    chain = processors_for(params, prompt, eos_ids=(EOS,), vocab_size=vocab_size)
    generator = generator_for(params, 0, torch.device("cpu")) if params.do_sample else None
    return BeamRules(params, prompt, chain, (EOS,), max_new_tokens, generator, **more)


def run(model, rules, kind=beam_search):
    """Search to the end; each row's logits are those of its own history, as a cache that forks would give them."""
    search = kind(rules)
    histories = [rules.prompt]
    while not search.done:
        step = search.step(torch.stack([model(history) for history in histories]))
        histories = [[*histories[row], token] for row, token in zip(step.parents, step.token_ids, strict=True)]
    return search.finish()


def log_prob(model, prompt, answer):
    history, total = list(prompt), 0.0
    for token in answer:
        total += float(model(history).log_softmax(-1)[token])
        history.append(token)
    return total


def likeliest(model, prompt, longest):
    answer = []
    while len(answer) < longest and (not answer or answer[-1] != EOS):
        answer.append(int(model([*prompt, *answer]).argmax()))
    return answer


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_one_beam_is_greedy(seed):
    model, prompt = language(8, seed), [1, 2]
    [answer] = run(model, rules(SamplingParams(early_stopping=True), prompt, 9), BeamSearch)
    assert answer.token_ids == likeliest(model, prompt, 9)


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_with_enough_beams_the_best_answer_of_all_is_found(seed):
    model, prompt, longest = language(4, seed), [1, 2], 3
    params = SamplingParams(num_beams=64, length_penalty=0.0, early_stopping="never")
    [best] = run(model, rules(params, prompt, longest, 4))
    answers = [[*body, EOS] for n in range(longest) for body in itertools.product((1, 2, 3), repeat=n)]
    answers += [list(body) for body in itertools.product((1, 2, 3), repeat=longest)]
    assert best.token_ids == max(answers, key=lambda answer: log_prob(model, prompt, answer))


@given(st.integers(0, 1000), st.sampled_from([-1.0, 0.0, 1.0, 2.0]), st.sampled_from([True, False, "never"]))
@settings(max_examples=40, deadline=None)
def test_scores_are_log_probabilities_over_lengths_best_first(seed, length_penalty, early_stopping):
    model, prompt = language(8, seed), [1, 2]
    params = SamplingParams(
        num_beams=4, num_return_sequences=4, length_penalty=length_penalty, early_stopping=early_stopping
    )
    answers = run(model, rules(params, prompt, 6))
    for answer in answers:
        expected = log_prob(model, prompt, answer.token_ids) / len(answer.token_ids) ** length_penalty
        assert answer.score == pytest.approx(expected, abs=1e-3)
        assert answer.complete == (answer.token_ids[-1] == EOS)
        assert answer.complete or len(answer.token_ids) == 6
        assert EOS not in answer.token_ids[:-1]
    assert [answer.score for answer in answers] == sorted((answer.score for answer in answers), reverse=True)
    assert len({tuple(answer.token_ids) for answer in answers}) == 4


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_groups_of_one_beam_are_greedy_where_the_penalty_is_nothing(seed):
    model, prompt = language(8, seed), [1, 2]
    greedy = likeliest(model, prompt, 5)
    params = SamplingParams(num_beams=3, num_beam_groups=3, diversity_penalty=1e-9, num_return_sequences=3)
    assert [answer.token_ids for answer in run(model, rules(params, prompt, 5))] == [greedy] * 3


def test_a_high_diversity_penalty_makes_groups_begin_with_different_tokens():
    params = SamplingParams(num_beams=3, num_beam_groups=3, diversity_penalty=100.0, num_return_sequences=3)
    answers = run(language(8, 1), rules(params, [1, 2], 4))
    assert len({answer.token_ids[0] for answer in answers}) == 3


def test_rows_of_a_group_that_is_done_are_gone():
    # Everyone likes to end; a group that has its two answers leaves, the others go on.
    def model(history):
        return torch.tensor([3.0, 2.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]) if len(history) < 4 else torch.zeros(8)

    params = SamplingParams(
        num_beams=4, num_beam_groups=2, diversity_penalty=0.3, num_return_sequences=4, early_stopping=True
    )
    search = beam_search(rules(params, [1, 2], 30))
    histories, widths = [[1, 2]], []
    while not search.done:
        step = search.step(torch.stack([model(history) for history in histories]))
        histories = [[*histories[row], token] for row, token in zip(step.parents, step.token_ids, strict=True)]
        widths.append(len(histories))
    assert widths == sorted(widths, reverse=True)
    assert {2, 4} <= {*widths, 2}
    assert len(search.finish()) == 4


def test_early_stopping_ends_as_soon_as_there_are_enough_answers():
    def steps(early_stopping, length_penalty=1.0):
        params = SamplingParams(num_beams=2, early_stopping=early_stopping, length_penalty=length_penalty)
        search, count = beam_search(rules(params, [1, 2], 40)), 0
        logits = torch.tensor([[4.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
        while not search.done:
            step = search.step(logits)
            logits = logits[:1].expand(len(step.token_ids), -1)
            count += 1
        return count

    assert steps(True) == 2
    assert steps(True) <= steps(False) < steps("never") < 40


def test_running_out_of_time_returns_what_there_is():
    params = SamplingParams(num_beams=3, num_return_sequences=3)
    search = beam_search(rules(params, [1, 2], 40))
    model = language(8, 3)
    step = search.step(model([1, 2])[None])
    search.step(torch.stack([model([2, token]) for token in step.token_ids]), out_of_time=True)
    assert search.done
    answers = search.finish()
    assert len(answers) == 3
    assert all(1 <= len(answer.token_ids) <= 2 for answer in answers)


@pytest.mark.parametrize("groups", [{}, {"num_beam_groups": 2, "diversity_penalty": 0.1}])
def test_a_stop_text_ends_an_answer(groups):
    params = SamplingParams(num_beams=2, **groups)
    model = language(8, 5)
    found = run(model, rules(params, [1, 2], 12, is_stopped=lambda answer: len(answer) == 3))
    assert [(len(answer.token_ids), answer.complete) for answer in found if answer.token_ids[-1] != EOS] in (
        [(3, True)],
        [],
    )
    assert all(len(answer.token_ids) <= 3 for answer in found)


def test_beam_samples_repeat_with_their_seed():
    model = language(8, 6)

    def sample(seed):
        params = SamplingParams(num_beams=3, do_sample=True, seed=seed, num_return_sequences=3, top_k=0)
        return run(model, rules(params, [1, 2], 8))

    assert sample(1) == sample(1)
    assert len({tuple(sample(seed)[0].token_ids) for seed in range(10)}) > 1


def test_where_nothing_can_be_drawn_the_search_ends():
    params = SamplingParams(num_beams=2, do_sample=True, seed=1)
    search = beam_search(rules(params, [1, 2], 8))
    search.step(torch.full((1, 8), math.nan))
    assert search.done
    assert search.finish()[0].token_ids == []
