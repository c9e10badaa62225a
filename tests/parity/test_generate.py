"""`generate` against transformers': equal tokens without draws, equal distributions and equal draws with them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from bluejay.decoding import SamplingParams
from bluejay.decoding.processors import process, processors_for
from bluejay.engine.plain import PlainEngine
from bluejay.engine.request import GenerationRequest
from bluejay.errors import InvalidRequest
from bluejay.model import CausalAttention, ModelConfig

V = 48
CONFIGS = {
    "gptj": ModelConfig(
        "gptj", vocab_size=V, n_positions=64, n_embd=32, n_layer=2, n_head=2, rotary_dim=8, eos_token_id=0
    ),
    "gpt_neo": ModelConfig(
        "gpt_neo",
        vocab_size=V,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        attention_layers=("global", "local"),
        window_size=8,
        tie_word_embeddings=True,
        eos_token_id=0,
    ),
}


@dataclass
class Pair:
    """One model, opened here and there."""

    model: Any
    engine: PlainEngine
    oracle: Any
    handle: int


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def pair(request, oracle, make_model, write_hf):
    model = make_model(CONFIGS[request.param], seed=3)
    with torch.no_grad():  # spread the logits, so that rounding decides nothing
        model.transformer.ln_f.weight.mul_(1.5)
    handle = oracle.open(write_hf(model))
    yield Pair(model, PlainEngine(model), oracle, handle)
    oracle.close(handle)


def some_eos(rng: random.Random) -> dict[str, Any]:
    kind = rng.randrange(4)
    if kind == 0:
        return {}
    if kind == 1:
        return {"eos_token_id": rng.randrange(V)}
    return {"eos_token_id": [rng.randrange(V) for _ in range(rng.randint(1, 5))]}


def some_lengths(rng: random.Random, num_prompt: int) -> dict[str, Any]:
    options: dict[str, Any] = {}
    kind = rng.randrange(6)
    if kind < 4:
        options["max_new_tokens"] = rng.randint(1, 24)
    if kind in (3, 4):
        options["max_length"] = num_prompt + rng.randint(1, 24)
    if rng.random() < 0.3:
        options["min_length"] = rng.randint(0, num_prompt + 28)
    if rng.random() < 0.3:
        options["min_new_tokens"] = rng.randint(0, 28)
    return options


def some_words(rng: random.Random) -> list[list[int]]:
    words = [[rng.randrange(V) for _ in range(rng.choice((1, 1, 2, 2, 3)))] for _ in range(rng.randint(1, 8))]
    return [*words, [1, rng.randrange(V)]]  # with nothing but an end-of-text transformers refuses the list


def some_penalties(rng: random.Random) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if rng.random() < 0.35:
        options["repetition_penalty"] = rng.choice((0.6, 0.9, 1.1, 1.3, 2.0, 5.0))
    if rng.random() < 0.3:
        options["no_repeat_ngram_size"] = rng.choice((1, 2, 2, 3, 4))
    if rng.random() < 0.25:
        options["encoder_no_repeat_ngram_size"] = rng.choice((1, 2, 2, 3))
    if rng.random() < 0.3:
        options["bad_words_ids"] = some_words(rng)
    if rng.random() < 0.15:
        options["remove_invalid_values"] = True
    if rng.random() < 0.2:
        # transformers takes no id 0.
        options["logit_bias"] = {rng.randrange(1, V): rng.choice((-100.0, -1.5, 0.5, 3.0, 100.0)) for _ in range(4)}
    return options


def some_beams(rng: random.Random, mode: str) -> dict[str, Any]:
    options: dict[str, Any] = {
        "early_stopping": rng.choice((True, False, "never")),
        "length_penalty": rng.choice((-2.0, -0.5, 0.0, 0.3, 1.0, 1.0, 2.0)),
    }
    groups = 1
    if mode == "group_beam":
        groups = rng.choice((2, 2, 3))
        options["num_beam_groups"] = groups
        options["diversity_penalty"] = rng.choice((0.1, 0.5, 1.0, 3.0, 20.0))
    options["num_beams"] = groups * rng.randint(1, 3) if groups > 1 else rng.randint(2, 5)
    options["num_return_sequences"] = rng.randint(1, options["num_beams"])
    return options


def some_warpers(rng: random.Random) -> dict[str, Any]:
    options: dict[str, Any] = {"do_sample": True, "seed": rng.randrange(2**31)}
    if rng.random() < 0.6:
        options["temperature"] = rng.choice((0.2, 0.7, 1.3, 2.5))
    if rng.random() < 0.7:
        options["top_k"] = rng.choice((0, 1, 2, 5, 20, 100))
    if rng.random() < 0.4:
        options["top_p"] = rng.choice((0.0, 0.1, 0.5, 0.9, 0.99))
    if rng.random() < 0.3:
        options["min_p"] = rng.choice((0.0, 0.05, 0.3, 1.0))
    if rng.random() < 0.3:
        options["typical_p"] = rng.choice((0.1, 0.5, 0.9))
    return options


def some_case(rng: random.Random, mode: str) -> tuple[list[int], dict[str, Any]]:
    """A prompt and options; few different tokens, so that n-grams come again."""
    prompt = [rng.randrange(rng.choice((4, V))) for _ in range(rng.choice((1, 2, 3, 5, 12, 20)))]
    options = {**some_lengths(rng, len(prompt)), **some_eos(rng), **some_penalties(rng)}
    if "beam" in mode:
        options |= some_beams(rng, mode)
    if "sample" in mode:
        options |= some_warpers(rng)
    return prompt, options


def theirs(options: dict[str, Any]) -> dict[str, Any]:
    """The same options for transformers; end-of-text is its padding too, as is its habit."""
    eos = options.get("eos_token_id", 0)
    if "logit_bias" in options:
        bias = [[[token], value] for token, value in options["logit_bias"].items()]
        options = {**{name: value for name, value in options.items() if name != "logit_bias"}, "sequence_bias": bias}
    return {**options, "pad_token_id": eos if isinstance(eos, int) else eos[0]}


def ours(pair: Pair, prompt: list[int], options: dict[str, Any]) -> list[list[int]]:
    [output] = pair.engine.generate([GenerationRequest(prompt, SamplingParams(**options))])
    return [sequence.token_ids for sequence in output.sequences]


def differences(pair: Pair, mode: str, seeds: range) -> list[str]:
    found = []
    for seed in seeds:
        prompt, options = some_case(random.Random(f"{mode} {seed}"), mode)
        here = ours(pair, prompt, options)
        there = pair.oracle.generate(pair.handle, [prompt], **theirs(options)).sequences
        if here != there:
            found.append(f"case {seed}: {prompt} {options}\n  here  {here}\n  there {there}")
    return found


@pytest.mark.parametrize(("mode", "num_cases"), [("greedy", 60), ("beam", 80), ("group_beam", 60), ("sample", 30)])
def test_tokens_equal_transformers(pair, mode, num_cases):
    found = differences(pair, mode, range(num_cases))
    assert not found, f"{len(found)} of {num_cases}\n" + "\n".join(found[:5])


def test_beam_samples_equal_transformers_draws(pair):
    found = differences(pair, "beam_sample", range(30))
    assert not found, f"{len(found)} of 30\n" + "\n".join(found[:5])


@pytest.mark.parametrize("mode", ["sample", "beam_sample"])
def test_processed_distributions_equal_transformers(pair, mode):
    for seed in range(100, 125):
        worst, case = distribution_difference(pair, mode, seed)
        assert worst < 1e-5, case


@torch.inference_mode()
def distribution_difference(pair: Pair, mode: str, seed: int) -> tuple[float, str]:
    """The largest difference of a probability, over all steps and rows, with transformers' own histories."""
    prompt, options = some_case(random.Random(f"{mode} {seed}"), mode)
    there = pair.oracle.processed(pair.handle, [prompt], **theirs(options)).arrays
    params = SamplingParams(**options)
    chain = processors_for(params, prompt, eos_ids=params.eos_ids(0), vocab_size=V)
    worst = 0.0
    for scores, padded in zip(there["scores"], there["histories"], strict=True):
        histories = padded[:, padded[0] >= 0]
        positions = torch.arange(histories.shape[1]).expand_as(histories)
        logits = pair.model.logits(pair.model(histories, positions, CausalAttention()))[:, -1]
        if mode == "beam_sample":
            logits = logits.log_softmax(-1)
        here = process(chain, logits, histories.tolist())
        worst = max(worst, float((here.softmax(-1) - scores.softmax(-1)).abs().max()))
    return worst, f"case {seed}: {prompt} {options}"


def test_ragged_batches_equal_transformers_left_padding(pair):
    rng = random.Random(5)
    for _ in range(10):
        prompts = [[rng.randrange(V) for _ in range(rng.randint(1, 20))] for _ in range(rng.randint(2, 6))]
        options = {"max_new_tokens": rng.randint(4, 20), **some_eos(rng)}
        there = pair.oracle.generate(pair.handle, prompts, **theirs(options)).sequences
        requests = [GenerationRequest(prompt, SamplingParams(**options)) for prompt in prompts]
        assert [output.token_ids for output in pair.engine.generate(requests)] == there


def test_a_batch_of_mixed_requests_equals_each_alone(pair):
    rng = random.Random(6)
    cases = [some_case(rng, mode) for mode in ("greedy", "sample", "beam", "group_beam", "beam_sample") * 4]
    requests = [GenerationRequest(prompt, SamplingParams(**options)) for prompt, options in cases]
    together = pair.engine.generate(requests)
    for request, output in zip(requests, together, strict=True):
        assert output.sequences == pair.engine.generate([request])[0].sequences


@pytest.mark.parametrize(
    "options",
    [
        {"num_return_sequences": 2},
        {"num_beams": 2, "num_return_sequences": 3},
        {"num_beams": 4, "num_beam_groups": 2},
        {"num_beams": 4, "num_beam_groups": 3, "diversity_penalty": 1.0},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0, "do_sample": True},
        {"num_beams": 4, "diversity_penalty": 1.0},
        {"diversity_penalty": 1.0},
        {"num_beams": 2, "early_stopping": "always"},
        {"max_new_tokens": 0},
        {"max_length": 3},
        {"do_sample": True, "temperature": 0.0},
        {"do_sample": True, "top_k": -1},
        {"do_sample": True, "top_p": -0.1},
        {"do_sample": True, "min_p": 1.1},
        {"do_sample": True, "typical_p": 0.0},
        {"repetition_penalty": 0.0},
        {"bad_words_ids": []},
        {"bad_words_ids": [[V]]},
    ],
)
def test_what_transformers_refuses_is_refused(pair, options):
    with pytest.raises(Exception, match="Error: "):
        pair.oracle.generate(pair.handle, [[1, 2, 3]], **theirs(options))
    with pytest.raises(InvalidRequest):
        ours(pair, [1, 2, 3], options)
