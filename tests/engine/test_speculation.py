from __future__ import annotations

import random
from collections import Counter
from itertools import product

import pytest
import torch

from bluejay.decoding import SamplingParams
from bluejay.engine import speculation
from bluejay.engine.engine import Engine
from bluejay.engine.network import Network
from bluejay.engine.options import EngineOptions
from bluejay.engine.request import GenerationRequest
from bluejay.engine.speculation import Lengths, NgramSpeculation
from bluejay.errors import ConfigError
from bluejay.model import CausalAttention, ModelConfig

from .requests import EXACT, CheckedEngine, assert_same, checked, mixed_request

SMALL_DRAFT = ModelConfig(
    model_type="gpt_neo", vocab_size=280, n_positions=128, n_embd=16, n_layer=1, n_head=2,
    attention_layers=("global",), window_size=8, tie_word_embeddings=True, eos_token_id=0,
)  # fmt: skip


@pytest.fixture
def always(monkeypatch) -> None:
    """Guess four tokens whatever it costs."""
    monkeypatch.setattr(Lengths, "best", lambda self, sequence, num_decoding: _four(sequence))


def _four(sequence) -> int:
    continuation = sequence.continuation
    return 0 if continuation is None else min(4, continuation.max_new_tokens - continuation.num_new_tokens - 1)


def guessing(model, draft, **options) -> CheckedEngine:
    return CheckedEngine(Network(model), EngineOptions(**{**EXACT, **options}), draft=draft)


def good_draft(model, make_model) -> Network:
    """A draft that is mostly right: the model itself, a little changed."""
    copy = make_model(model.config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in copy.parameters():
            weight += 0.002 * torch.randn(weight.shape, generator=generator)
    return Network(copy)


@pytest.mark.parametrize("kind", ["ngram", "good", "small"])
@pytest.mark.parametrize("blocks", [512, 40])
def test_text_is_the_same_with_guesses_and_without(tiny_model, make_model, always, kind, blocks) -> None:
    rng = random.Random(f"{kind} {blocks}")
    requests = [mixed_request(rng, longest=60) for _ in range(50)]
    draft = {"ngram": "ngram", "good": good_draft(tiny_model, make_model), "small": Network(make_model(SMALL_DRAFT))}
    engine = guessing(tiny_model, draft[kind], cache_memory_bytes=blocks * 16 * 2 * 2 * 32 * 4)
    found = engine.generate(requests)
    for one, other in zip(found, checked(tiny_model).generate(requests), strict=True):
        assert_same(one, other)
    statistics = engine.statistics()
    assert statistics.held_blocks == 0
    assert statistics.drafted_tokens > 20
    if kind == "good":
        assert statistics.accepted_tokens > 0.6 * statistics.drafted_tokens
    assert sum(output.usage.accepted_tokens for output in found) == statistics.accepted_tokens


def test_the_model_itself_is_always_right(tiny_model, always) -> None:
    """Also where it draws: it sees the numbers that will be drawn with. So a step brings five tokens."""
    for options in ({}, {"do_sample": True, "seed": 3, "temperature": 1.5, "repetition_penalty": 1.2}):
        engine = guessing(tiny_model, Network(tiny_model))
        engine.add(GenerationRequest([5, 6], SamplingParams(max_new_tokens=41, ignore_eos=True, **options)))
        while engine.has_work:
            engine.step()
        statistics = engine.statistics()
        assert statistics.accepted_tokens == statistics.drafted_tokens == 32
        assert statistics.steps == 9


@pytest.mark.parametrize("kind", ["ngram", "draft"])
def test_drawn_tokens_keep_their_distribution(make_model, always, kind) -> None:
    """A chi-square test over 6,000 draws of three tokens, on a vocabulary of four."""
    config = ModelConfig(
        model_type="gptj", vocab_size=4, n_positions=32, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, eos_token_id=0
    )
    model, prompt = make_model(config), [1, 2, 3, 1, 2, 0, 3, 3, 1, 0, 0, 2, 1]
    draft = "ngram" if kind == "ngram" else Network(make_model(config, seed=1))
    engine = Engine(Network(model), EngineOptions(**EXACT), draft=draft)
    found: Counter[tuple[int, ...]] = Counter()
    for seed in range(300):
        params = SamplingParams(
            do_sample=True, top_k=0, max_new_tokens=4, ignore_eos=True, num_return_sequences=20, seed=seed
        )
        [output] = engine.generate([GenerationRequest(prompt, params)])
        found.update(tuple(sequence.token_ids[:3]) for sequence in output.sequences)
    statistics = engine.statistics()
    assert 500 < statistics.accepted_tokens < 0.9 * statistics.drafted_tokens
    observed = torch.tensor([found[triple] for triple in product(range(4), repeat=3)], dtype=torch.float64)
    wanted = 6000 * torch.tensor([_probability(model, prompt, triple) for triple in product(range(4), repeat=3)])
    rare = wanted < 5  # a chi-square wants five of each: the rare ones count together
    observed = torch.cat((observed[~rare], observed[rare].sum()[None]))
    wanted = torch.cat((wanted[~rare], wanted[rare].sum()[None]))
    statistic = float(((observed - wanted) ** 2 / wanted.clamp(min=1e-9)).sum())
    freedom = len(wanted) - 1
    # Wilson and Hilferty's normal approximation of the 99.99 % quantile.
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.719 * (2 / (9 * freedom)) ** 0.5) ** 3


@torch.inference_mode()
def _probability(model, prompt: list[int], answer: tuple[int, ...]) -> float:
    ids = [*prompt, *answer[:-1]]
    hidden = model(torch.tensor([ids]), torch.arange(len(ids))[None], CausalAttention())
    probs = model.logits(hidden)[0, len(prompt) - 1 :].softmax(-1)
    return float(probs[range(len(answer)), list(answer)].prod())


def test_guesses_are_as_many_as_pay(tiny_gptj) -> None:
    engine = guessing(tiny_gptj, "ngram")
    engine.add(GenerationRequest([1, 2, 1, 2], SamplingParams(max_new_tokens=60, ignore_eos=True)))
    engine.step()
    [request] = engine._scheduler.running
    [sequence] = request.sequences

    def lengths(acceptance: float, step_s: float, draft_s: float) -> Lengths:
        made = Lengths()
        made._step_s, made._draft_s, made._num_steps = {1: [step_s] * 9, 9: [step_s] * 9}, draft_s, 1
        made._records[sequence] = speculation._Record(acceptance)
        return made

    assert lengths(0.95, 1.0, 0.01).best(sequence, 1) == speculation.MOST_DRAFTS
    assert lengths(0.6, 1.0, 0.1).best(sequence, 1) in (2, 3)
    assert lengths(0.1, 1.0, 0.3).best(sequence, 1) == 0
    assert lengths(0.95, 1.0, 1.0).best(sequence, 1) == 0  # a guess as dear as a step
    assert lengths(0.95, 1.0, 0.01).best(sequence, 9) == 0  # the batch is full
    hopeless = lengths(0.0, 1.0, 0.3)
    tries = [hopeless.best(sequence, 1) for _ in range(7 * speculation.PROBE_EVERY)]
    assert sum(tries) == 3  # after one, two and four times so many steps


def test_acceptance_and_costs_are_learned(tiny_gptj, make_model) -> None:
    """With a clock by which a guess costs a tenth of a step: a draft that is right is asked for more and more."""
    now = [0.0]
    engine = CheckedEngine(Network(tiny_gptj), EngineOptions(**EXACT), draft=Network(tiny_gptj), clock=lambda: now[0])
    forward = engine._runner.forward

    def timed(readings):
        now[0] += 1.0 + 0.1 * (sum(len(reading.token_ids) for reading in readings) - len(readings))
        return forward(readings)

    engine._runner.forward = timed
    engine.add(GenerationRequest([1, 2], SamplingParams(max_new_tokens=100, ignore_eos=True)))
    while engine.has_work:
        engine.step()
    assert engine.statistics().accepted_tokens > 70
    assert engine.statistics().steps < 32


@pytest.mark.parametrize(
    ("ids", "count", "expected"),
    [
        ([1, 2, 3, 4, 9, 1, 2], 2, [3, 4]),
        ([1, 2, 7, 1, 2, 8, 1, 2], 1, [8]),  # what followed the last time
        ([5, 6, 5, 6], 4, [5, 6, 5, 6]),  # running on into its own guesses
        ([1, 2, 3, 9, 8, 2, 3, 7, 1, 2, 3], 1, [9]),  # three tokens that agree before two
        ([1, 2, 3], 3, []),
        ([1], 3, []),
    ],
)
def test_what_followed_is_guessed(tiny_gptj, ids, count, expected) -> None:
    from bluejay.engine.scheduler import Part, Schedule
    from bluejay.engine.sequence import Sequence

    ngram, sequence = NgramSpeculation(), Sequence(None, 0, ids)
    for length in range(1, len(ids)):  # as it grew
        ngram._follower(Sequence(None, 0, ids[:length]))
    part = Part(sequence, len(ids) - 1, 1, num_drafts=count)
    ngram.draft(Schedule([part], []))
    assert part.drafts == expected


def test_a_draft_must_reach_as_far_as_the_model(tiny_gptj, make_model) -> None:
    short = ModelConfig(**{**SMALL_DRAFT.__dict__, "n_positions": 64})
    with pytest.raises(ConfigError, match="64 tokens, the model's 128"):
        guessing(tiny_gptj, Network(make_model(short)))
