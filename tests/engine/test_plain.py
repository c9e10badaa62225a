from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from bluejay.decoding import FinishReason, SamplingParams
from bluejay.engine.plain import PlainEngine
from bluejay.engine.request import GenerationRequest
from bluejay.errors import ContextLengthExceeded, InvalidRequest, UnsupportedOption
from bluejay.model import CausalAttention
from bluejay.tokenizer import Tokenizer
from bluejay.tokenizer.byte_level import BYTE_OF_SYMBOL, byte_level_backend

PROMPTS = [[5, 6, 7], [200, 3], [9] * 20, [41]]


def ask(engine, prompts, *options, **shared):
    options = options or [shared] * len(prompts)
    return engine.generate([GenerationRequest(p, SamplingParams(**o)) for p, o in zip(prompts, options, strict=True)])


def naive(model, prompt, num_tokens):
    """Greedy with the whole text read anew for each token."""
    ids = list(prompt)
    for _ in range(num_tokens):
        hidden = model(torch.tensor([ids]), torch.arange(len(ids))[None], CausalAttention())
        ids.append(int(model.logits(hidden)[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def byte_tokenizer():
    """One token for each byte, id = byte + 1; id 0 is the end of text."""
    import tokenizers

    symbols = {symbol: byte + 1 for symbol, byte in BYTE_OF_SYMBOL.items()}
    backend = byte_level_backend(tokenizers.models.BPE({"<|endoftext|>": 0, **symbols}, []))
    backend.add_special_tokens(["<|endoftext|>"])
    return Tokenizer(backend)


class Script:
    """A model that says a given text, byte by byte, and then the end of text; positions tell it where it is."""

    def __init__(self, config, text, num_prompt):
        self.config = config
        self._ids = [byte + 1 for byte in text.encode()] + [0]
        self._num_prompt = num_prompt

    def __call__(self, input_ids, positions, attend):
        return positions[..., None].float()

    def logits(self, hidden):
        places = (hidden[..., 0].long() - self._num_prompt + 1).clamp(0, len(self._ids) - 1)
        wanted = torch.tensor(self._ids)[places]
        return torch.nn.functional.one_hot(wanted, self.config.vocab_size).float() * 9


@pytest.fixture
def say(tiny_gptj, byte_tokenizer):
    def say(text, **options):
        engine = PlainEngine(Script(tiny_gptj.config, text, 2), byte_tokenizer)
        requests = [GenerationRequest([1, 2], SamplingParams(**{"max_new_tokens": 100, **options}))]
        pieces = [event.text for event in engine.stream(requests)]
        [output] = engine.generate(requests)
        assert "".join(pieces) == output.text or options.get("num_beams", 1) > 1
        return output, pieces

    return say


def test_greedy_equals_reading_everything_anew(tiny_model):
    outputs = ask(PlainEngine(tiny_model), PROMPTS, max_new_tokens=30, ignore_eos=True)
    with torch.inference_mode():
        assert [output.token_ids for output in outputs] == [naive(tiny_model, prompt, 30) for prompt in PROMPTS]
    assert {output.finish_reason for output in outputs} == {FinishReason.LENGTH}


@pytest.mark.parametrize("max_rows", [1, 3, 32])
def test_batched_equals_alone(tiny_model, max_rows):
    options = [
        {"max_new_tokens": 12},
        {"max_new_tokens": 25, "do_sample": True, "seed": 3, "num_return_sequences": 2, "top_p": 0.9},
        {"max_new_tokens": 5, "do_sample": True, "seed": 3, "repetition_penalty": 1.2},
        {"max_new_tokens": 9, "num_beams": 3, "num_return_sequences": 2},
    ]
    together = ask(PlainEngine(tiny_model, max_rows=max_rows), PROMPTS, *options)
    alone = [ask(PlainEngine(tiny_model), [prompt], o)[0] for prompt, o in zip(PROMPTS, options, strict=True)]
    assert together == alone
    assert [len(output.sequences) for output in together] == [1, 2, 1, 2]


def test_a_seed_says_the_same_again_and_its_sequences_differ(tiny_model):
    engine = PlainEngine(tiny_model)
    options = {"do_sample": True, "max_new_tokens": 10, "top_k": 0, "seed": 11, "num_return_sequences": 3}
    first, second = ask(engine, [[5, 6]], **options)[0], ask(engine, [[5, 6]], **options)[0]
    assert first == second
    assert len({tuple(sequence.token_ids) for sequence in first.sequences}) == 3
    assert ask(engine, [[5, 6]], **{**options, "num_return_sequences": 1})[0].token_ids == first.token_ids


def test_events_join_to_the_output(tiny_model):
    engine = PlainEngine(tiny_model)
    requests = [
        GenerationRequest(p, SamplingParams(max_new_tokens=n, logprobs=1))
        for p, n in zip(PROMPTS, (4, 9, 1, 6), strict=True)
    ]
    joined: dict[int, list[int]] = {}
    ended = []
    for event in engine.stream(requests):
        assert len(event.logprobs) == len(event.token_ids) == 1
        joined.setdefault(event.request, []).extend(event.token_ids)
        if event.finish_reason:
            ended.append(event.request)
    assert [joined[i] for i in range(4)] == [output.token_ids for output in engine.generate(requests)]
    assert sorted(ended) == [0, 1, 2, 3]


def test_an_answer_is_cut_where_the_context_ends(tiny_model):
    [output] = ask(PlainEngine(tiny_model), [[7] * 120], max_new_tokens=50, ignore_eos=True)
    assert len(output.token_ids) == 8
    assert output.finish_reason == "length"


def test_requests_are_refused_before_anything_runs(tiny_model):
    engine = PlainEngine(tiny_model)
    with pytest.raises(ContextLengthExceeded, match="128 tokens"):
        engine.stream([GenerationRequest([1], SamplingParams()), GenerationRequest([7] * 128, SamplingParams())])
    with pytest.raises(InvalidRequest, match=r"token ids \[-1, 300\], expected 0 to 299"):
        ask(engine, [[300, 5, -1]])
    with pytest.raises(UnsupportedOption, match="stop needs a tokenizer"):
        ask(engine, [[1]], stop="x")
    with pytest.raises(InvalidRequest, match="no token"):
        ask(engine, [[]])


def test_text_comes_in_whole_characters_and_without_the_end_of_text(say):
    output, pieces = say("Löwe 🦁!")
    assert output.text == "Löwe 🦁!"
    assert output.token_ids[-1] == 0
    assert output.finish_reason == "stop"
    assert "🦁" in pieces
    assert all("�" not in piece for piece in pieces)


def test_a_character_that_is_cut_is_shown_as_such(say):
    assert say("ab🦁", max_new_tokens=4)[0].text == "ab�"


@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_stop_text_ends_the_text_and_is_not_part_of_it(say, num_beams):
    output, pieces = say("one END. two", stop=["END", "two"], num_beams=num_beams)
    assert output.text == "one "
    assert output.finish_reason == "stop"
    assert len(output.token_ids) == len("one END")
    assert all("E" not in piece for piece in pieces)


def test_what_only_began_a_stop_text_is_shown_in_the_end(say):
    output, _ = say("one EN", stop="END")
    assert output.text == "one EN"


def test_time_ends_an_answer(tiny_model):
    ticks = iter(range(1000))
    engine = PlainEngine(tiny_model, clock=lambda: next(ticks))
    [output] = ask(engine, [[5]], max_new_tokens=50, max_time=3.5, ignore_eos=True)
    assert (len(output.token_ids), output.finish_reason) == (4, "length")
    [output] = ask(engine, [[5]], max_new_tokens=50, max_time=3.5, ignore_eos=True, num_beams=2)
    assert (len(output.token_ids), output.finish_reason) == (4, "length")


def test_ids_without_a_token_are_never_chosen(tiny_model, byte_tokenizer):
    """The model has 300 ids, the tokenizer 257."""
    with torch.no_grad():
        plain = PlainEngine(tiny_model)
        careful = PlainEngine(tiny_model, byte_tokenizer)
    options = {"do_sample": True, "top_k": 0, "temperature": 5.0, "max_new_tokens": 40, "seed": 1, "ignore_eos": True}
    assert max(ask(plain, [[5]], **options)[0].token_ids) > 256
    for extra in ({}, {"remove_invalid_values": True}, {"num_beams": 3}, {"logprobs": 3}):
        [output] = ask(careful, [[5]], **options, **extra)
        assert max(output.token_ids) <= 256
        assert all(token <= 256 for step in output.logprobs or [] for token, _ in step.top)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "seed": 1, "temperature": 3.0}])
def test_logprobs_are_the_models_own(tiny_model, options):
    engine = PlainEngine(tiny_model)
    [output] = ask(
        engine, [[5, 6, 7]], max_new_tokens=6, logprobs=2, prompt_logprobs=3, repetition_penalty=1.5, **options
    )
    text = [5, 6, 7, *output.token_ids]
    with torch.inference_mode():
        hidden = tiny_model(torch.tensor([text]), torch.arange(len(text))[None], CausalAttention())
        log_probs = tiny_model.logits(hidden)[0].log_softmax(-1)
    assert output.prompt_logprobs[0] is None
    known = [*output.prompt_logprobs[1:], *output.logprobs]
    for place, token in enumerate(known, start=1):
        assert token.token_id == text[place]
        assert token.logprob == pytest.approx(float(log_probs[place - 1, text[place]]), abs=1e-4)
        assert len(token.top) == (3 if place < 3 else 2)
        assert token.top[0][0] == int(log_probs[place - 1].argmax())
    assert output.sequences[0].cumulative_logprob == pytest.approx(sum(t.logprob for t in output.logprobs))


def test_a_beam_score_is_the_mean_log_probability(tiny_model):
    [output] = ask(PlainEngine(tiny_model), [[5, 6]], max_new_tokens=6, num_beams=3, logprobs=0, num_return_sequences=3)
    for sequence in output.sequences:
        mean = sequence.cumulative_logprob / len(sequence.token_ids)
        assert sequence.beam_score == pytest.approx(mean, abs=1e-4)


def test_where_no_token_can_be_drawn_only_that_sequence_ends(tiny_model):
    class Broken:
        config = tiny_model.config

        def __call__(self, *arguments):
            return tiny_model(*arguments)

        def logits(self, hidden):
            logits = tiny_model.logits(hidden).clone()
            logits[0] = math.nan
            return logits

    broken, fine = ask(PlainEngine(Broken()), [[5], [6]], do_sample=True, seed=1, max_new_tokens=3)
    assert (broken.token_ids, broken.finish_reason) == ([], "error")
    assert fine.finish_reason in ("stop", "length", "error")
    [beams] = ask(PlainEngine(Broken()), [[5]], do_sample=True, seed=1, max_new_tokens=3, num_beams=2)
    assert (beams.token_ids, beams.finish_reason) == ([], "error")


def test_an_end_of_text_outside_the_vocabulary_never_comes(make_model, tiny_gptj):
    model = make_model(replace(tiny_gptj.config, eos_token_id=50256))
    options = {"max_new_tokens": 5, "min_new_tokens": 2}
    outputs = ask(
        PlainEngine(model),
        [[5]] * 2,
        options,
        {**options, "num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1},
    )
    assert [len(output.token_ids) for output in outputs] == [5, 5]


def test_many_answers_to_one_prompt_run_in_batches(tiny_gptj):
    widths = []
    tiny_gptj.register_forward_pre_hook(lambda module, inputs: widths.append(inputs[0].shape[0]))
    options = {"do_sample": True, "seed": 3, "num_return_sequences": 7, "max_new_tokens": 4, "ignore_eos": True}
    together = ask(PlainEngine(tiny_gptj), PROMPTS[:2], **options)
    assert max(widths) == 14
    widths.clear()
    apart = ask(PlainEngine(tiny_gptj, max_rows=3), PROMPTS[:2], **options)
    assert max(widths) == 3
    assert [[s.token_ids for s in o.sequences] for o in apart] == [[s.token_ids for s in o.sequences] for o in together]
