"""Random requests of every kind, and engines whose books are checked after every step."""

from __future__ import annotations

import random

import torch

from bluejay.decoding import SamplingParams
from bluejay.engine.engine import Engine
from bluejay.engine.network import Network
from bluejay.engine.options import EngineOptions
from bluejay.engine.request import GenerationEvent, GenerationRequest, RequestOutput
from bluejay.model.gpt_neo import GPTNeo
from bluejay.model.gptj import GPTJ

EXACT = {"cache_dtype": "float32"}


class CheckedEngine(Engine):
    """Checks the books of blocks after every step."""

    def step(self) -> list[GenerationEvent]:
        events = super().step()
        self.check_integrity()
        return events


def checked(model: GPTJ | GPTNeo, **options: object) -> CheckedEngine:
    return CheckedEngine(Network(model), EngineOptions(**{**EXACT, **options}))


def mixed_request(
    rng: random.Random, vocab_size: int = 300, longest: int = 90, most_new: int = 24
) -> GenerationRequest:
    """Any mode, any of the usual options; four prompts of ten begin alike."""
    options: dict[str, object] = {"max_new_tokens": rng.randint(1, most_new)}
    mode = rng.choice(["greedy", "greedy", "sample", "samples", "beam", "beam_sample", "group_beam"])
    if "sample" in mode:
        options |= {"do_sample": True, "seed": rng.randrange(2**32), "temperature": rng.choice([0.7, 1.0, 1.3])}
        options |= {"top_k": rng.choice([0, 5, 50]), "top_p": rng.choice([1.0, 0.9])}
    if mode == "samples":
        options["num_return_sequences"] = rng.randint(2, 4)
    if mode in ("beam", "beam_sample"):
        options["num_beams"] = rng.randint(2, 4)
        options["num_return_sequences"] = rng.randint(1, options["num_beams"])
    if mode == "group_beam":
        options |= {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.7, "num_return_sequences": 2}
    for chance, more in (
        (0.3, {"repetition_penalty": 1.3}),
        (0.2, {"frequency_penalty": 0.7, "presence_penalty": -0.4}),
        (0.1, {"logit_bias": {5: 4.0, 9: -100.0}}),
        (0.2, {"no_repeat_ngram_size": 2}),
        (0.2, {"logprobs": 2}),
        (0.2, {"prompt_logprobs": 1}),
        (0.2, {"min_new_tokens": 3}),
        (0.1, {"bad_words_ids": [[5], [6, 7]]}),
        (0.1, {"ignore_eos": True}),
    ):
        if rng.random() < chance:
            options |= more
    prompt = [rng.randrange(vocab_size) for _ in range(rng.choice([1, 3, longest // 4, longest // 2, longest]))]
    if rng.random() < 0.4:
        prompt = [7] * (longest // 2) + prompt[: longest // 2]
    return GenerationRequest(prompt, SamplingParams(**options), priority=rng.choice([0, 0, 0, 1]))


def said(output: RequestOutput) -> list[tuple[list[int], str | None]]:
    """What must be equal to the last token."""
    return [(sequence.token_ids, sequence.finish_reason) for sequence in output.sequences]


def assert_same(found: RequestOutput, wanted: RequestOutput) -> None:
    """Tokens and reasons to the last, scores to what sums in another order differ by."""
    assert said(found) == said(wanted)
    for one, other in zip(found.sequences, wanted.sequences, strict=True):
        assert (one.beam_score is None) == (other.beam_score is None)
        if one.beam_score is not None:
            torch.testing.assert_close(one.beam_score, other.beam_score, rtol=1e-4, atol=1e-4)
        _assert_same_logprobs(one.logprobs, other.logprobs)
    _assert_same_logprobs(found.prompt_logprobs, wanted.prompt_logprobs)


def _assert_same_logprobs(found: list | None, wanted: list | None) -> None:
    assert (found is None) == (wanted is None)
    for one, other in zip(found or [], wanted or [], strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.token_id == other.token_id
            assert len(one.top) == len(other.top)
            torch.testing.assert_close(one.logprob, other.logprob, rtol=1e-4, atol=1e-4)
