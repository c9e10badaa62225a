from __future__ import annotations

import pytest
import torch

from bluejay.decoding import SamplingParams
from bluejay.engine.network import Network
from bluejay.engine.plain import PlainEngine
from bluejay.engine.request import GenerationRequest
from bluejay.engine.scorer import Scorer
from bluejay.errors import ContextLengthExceeded, InvalidRequest
from bluejay.model import CausalAttention

PROMPTS = [[5, 6, 7], [200, 3], [9] * 20, [41]]


def ask(engine, prompts, **options):
    return engine.generate([GenerationRequest(prompt, SamplingParams(**options)) for prompt in prompts])


def test_score_sums_log_probabilities_and_knows_what_greedy_says(tiny_model):
    engine, scorer = PlainEngine(tiny_model), Scorer(Network(tiny_model), max_rows=2)
    greedy = [output.token_ids for output in ask(engine, PROMPTS, max_new_tokens=4, ignore_eos=True)]
    other = [[(ids[0] + 1) % 300, *ids[1:]] for ids in greedy]
    scores = scorer.score([*zip(PROMPTS, greedy, strict=True), *zip(PROMPTS, other, strict=True)])
    assert [score.is_greedy for score in scores] == [True] * 4 + [False] * 4
    for prompt, ids, score in zip(PROMPTS, greedy, scores, strict=False):
        [output] = ask(engine, [prompt + ids], max_new_tokens=1, prompt_logprobs=0)
        expected = sum(token.logprob for token in output.prompt_logprobs[len(prompt) :])
        assert score.logprob == pytest.approx(expected, abs=1e-4)
    assert scorer.score([([5], [])])[0].logprob == 0


def test_score_reads_as_much_as_the_context_holds(tiny_model):
    scorer = Scorer(Network(tiny_model))
    assert scorer.score([([5] * 100, [6] * 29)])[0].logprob < 0
    with pytest.raises(ContextLengthExceeded, match="129 tokens"):
        scorer.score([([5] * 100, [6] * 30)])
    with pytest.raises(InvalidRequest, match="no token"):
        scorer.score([([], [6])])


def test_embed_is_the_mean_of_the_last_hidden_states(tiny_model):
    scorer = Scorer(Network(tiny_model), max_rows=2)
    embedded = scorer.embed(PROMPTS)
    assert embedded.shape == (4, 32)
    for prompt, vector in zip(PROMPTS, embedded, strict=True):
        with torch.inference_mode():
            hidden = tiny_model(torch.tensor([prompt]), torch.arange(len(prompt))[None], CausalAttention())
        assert torch.allclose(vector, hidden[0].mean(0), atol=1e-5)
    assert scorer.embed([]).shape == (0, 32)
    with pytest.raises(InvalidRequest, match="no token"):
        scorer.embed([[]])
