from __future__ import annotations

import math
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from bluejay.decoding import FinishReason, SamplingParams
from bluejay.engine.engine import Engine
from bluejay.engine.network import Network
from bluejay.engine.options import EngineOptions
from bluejay.engine.plain import PlainEngine
from bluejay.engine.request import GenerationRequest
from bluejay.errors import ConfigError, EngineError, InvalidRequest
from bluejay.model.quantized import quantize

from .requests import EXACT, assert_same, checked, mixed_request, said

ENGINES = {
    "default": {},
    "short steps": {"max_batch_tokens": 24, "max_num_sequences": 6},
    "short of blocks": {"cache_memory_bytes": 28 * 16 * 2 * 2 * 32 * 4, "max_stall": 0},
    "no prefix cache": {"prefix_cache": False},
    "small blocks": {"block_size": 3, "max_stall": 0},
}


def greedy(prompt: list[int], **options: object) -> GenerationRequest:
    return GenerationRequest(prompt, SamplingParams(**{"max_new_tokens": 8, "ignore_eos": True, **options}))


def run(engine: Engine) -> dict[int, list]:
    """All events to the end, by request."""
    events: dict[int, list] = {}
    while engine.has_work:
        for event in engine.step():
            events.setdefault(event.request, []).append(event)
    return events


@pytest.mark.parametrize("name", ENGINES)
def test_the_engine_says_what_the_plain_loop_says(tiny_model, name) -> None:
    """100 mixed prompts for each engine and family, 1,000 in all: not one token differs."""
    rng = random.Random(name)
    requests = [mixed_request(rng) for _ in range(100)]
    plain = PlainEngine(tiny_model, cache_dtype=torch.float32)
    engine = checked(tiny_model, **ENGINES[name])
    for found, request in zip(engine.generate(requests), requests, strict=True):
        assert_same(found, plain.generate([request])[0])
    statistics = engine.statistics()
    assert statistics.held_blocks == 0
    assert (statistics.cached_tokens > 0) == (name != "no prefix cache")
    if name == "short of blocks":
        assert statistics.preemptions > 0


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_model_says_the_same_alone_and_in_a_batch(tiny_model, bits) -> None:
    """Its kernels compute each row by itself: here also what was drawn at a hair's breadth agrees."""
    quantize(tiny_model, bits)
    rng = random.Random(bits)
    requests = [mixed_request(rng) for _ in range(40)]
    plain = PlainEngine(tiny_model)
    for found, request in zip(checked(tiny_model, cache_dtype="auto").generate(requests), requests, strict=True):
        assert said(found) == said(plain.generate([request])[0])


def test_together_is_as_alone(tiny_model) -> None:
    rng = random.Random(3)
    requests = [mixed_request(rng) for _ in range(40)]
    together = checked(tiny_model).generate(requests)
    for found, request in zip(together, requests, strict=True):
        assert_same(checked(tiny_model).generate([request])[0], found)


def test_a_cached_prefix_is_as_a_cold_one(tiny_model) -> None:
    requests = [greedy([*range(40), last], logprobs=1) for last in (3, 4, 3)]
    warm = checked(tiny_model)
    outputs = [warm.generate([request])[0] for request in requests]
    assert [output.usage.cached_tokens for output in outputs] == [0, 32, 32]
    for output, request in zip(outputs, requests, strict=True):
        assert_same(output, checked(tiny_model, prefix_cache=False).generate([request])[0])


def test_an_answer_is_a_prefix_too(tiny_model) -> None:
    engine = checked(tiny_model)
    prompt = list(range(10))
    [first] = engine.generate([greedy(prompt, max_new_tokens=30)])
    [second] = engine.generate([greedy([*prompt, *first.token_ids], max_new_tokens=5)])
    assert second.usage.cached_tokens == 32  # 39 tokens were read, whole blocks are kept


def test_what_was_preempted_says_what_it_would_have_said(tiny_model) -> None:
    requests = [greedy([9 + row] * 30, max_new_tokens=40, **options) for row, options in enumerate([
        {}, {"do_sample": True, "seed": 4, "num_return_sequences": 3}, {"num_beams": 3, "num_return_sequences": 2}, {},
    ])]  # fmt: skip
    calm = checked(tiny_model).generate(requests)
    engine = checked(tiny_model)
    rng = random.Random(0)
    scheduler = engine._scheduler
    step = engine.step

    def disturbed():
        if scheduler.running and rng.random() < 0.5:
            scheduler._preempt(rng.choice(scheduler.running))
        return step()

    engine.step = disturbed
    for found, wanted in zip(engine.generate(requests), calm, strict=True):
        assert_same(found, wanted)
    assert engine.statistics().preemptions > 10


def test_chunks_are_as_whole_prompts(tiny_model) -> None:
    request = greedy(list(range(100)), prompt_logprobs=2, logprobs=0)
    whole = checked(tiny_model, max_stall=0).generate([request])[0]
    for size in (1, 7, 16, 33):
        assert_same(checked(tiny_model, max_batch_tokens=size).generate([request])[0], whole)


def test_a_seed_says_the_same_whatever_the_batch(tiny_model) -> None:
    request = GenerationRequest(
        [5, 6], SamplingParams(do_sample=True, seed=11, max_new_tokens=20, num_return_sequences=2)
    )
    alone = checked(tiny_model).generate([request])[0]
    rng = random.Random(8)
    for place in (0, 3, 9):
        others = [mixed_request(rng) for _ in range(9)]
        together = checked(tiny_model).generate([*others[:place], request, *others[place:]])
        assert said(together[place]) == said(alone)


def test_requests_join_and_leave_at_any_step(tiny_model) -> None:
    rng = random.Random(5)
    requests = [mixed_request(rng) for _ in range(30)]
    engine = checked(tiny_model, max_num_sequences=8)
    waiting, numbers, tokens = list(enumerate(requests)), {}, {}
    while waiting or engine.has_work:
        if waiting and rng.random() < 0.3:
            place, request = waiting.pop()
            numbers[engine.add(request)] = place
        for event in engine.step():
            tokens.setdefault((numbers[event.request], event.index), []).extend(event.token_ids)
    plain = PlainEngine(tiny_model, cache_dtype=torch.float32)
    for place, request in enumerate(requests):
        [wanted] = plain.generate([request])
        assert [tokens[place, index] for index in range(len(wanted.sequences))] == [
            s.token_ids for s in wanted.sequences
        ]


def test_a_long_prompt_stalls_nobody(tiny_gptj) -> None:
    engine = checked(tiny_gptj, max_batch_tokens=20)
    stream = engine.add(greedy([1, 2, 3], max_new_tokens=60))
    engine.step()
    engine.add(greedy(list(range(100))))
    for _ in range(8):
        assert [event.request for event in engine.step()].count(stream) == 1


def test_a_cancelled_request_frees_its_blocks_at_the_next_step(tiny_model) -> None:
    engine = checked(tiny_model)
    kinds = [{}, {"do_sample": True, "seed": 1, "num_return_sequences": 3}, {"num_beams": 4, "num_return_sequences": 2}]
    numbers = [engine.add(greedy([row, 2, 3], max_new_tokens=50, **kind)) for row, kind in enumerate(kinds)]
    for _ in range(5):
        engine.step()
    waiting = engine.add(greedy([1, 2]))
    for number in [*numbers, waiting, waiting, 77]:  # nobody has the number 77
        engine.cancel(number)
    events = engine.step()
    assert [(event.request, event.index) for event in events] == [
        (0, 0), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (3, 0),
    ]  # fmt: skip
    assert {event.finish_reason for event in events} == {FinishReason.CANCELLED}
    assert [event.request for event in events if event.usage is not None] == [0, 1, 2, 3]
    assert events[0].usage.generated_tokens == 5
    assert not engine.has_work
    assert engine.statistics().held_blocks == 0


def test_who_stops_listening_cancels(tiny_model) -> None:
    engine = checked(tiny_model)
    events = engine.stream([greedy([1, 2, 3], max_new_tokens=50)])
    next(events)
    events.close()
    engine.step()
    assert engine.statistics().held_blocks == 0


def test_two_streams_share_an_engine(tiny_model) -> None:
    engine = checked(tiny_model)
    first, second = engine.stream([greedy([1, 2])]), engine.stream([greedy([3, 4]), greedy([5])])
    found = {"first": [], "second": []}
    for _ in range(8):
        found["first"] += next(first).token_ids
        found["second"] += next(second).token_ids
    found["second"] += [token for event in second for token in event.token_ids]
    assert list(first) == []
    wanted = PlainEngine(tiny_model, cache_dtype=torch.float32).generate([greedy([1, 2])])
    assert found["first"] == wanted[0].token_ids
    assert len(found["second"]) == 16


def test_threads_share_an_engine(tiny_model) -> None:
    """Each gets its own answers, whoever takes the steps."""
    engine, rng = checked(tiny_model), random.Random(2)
    asked = [[mixed_request(rng) for _ in range(8)] for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(engine.generate, asked))
    for requests, outputs in zip(asked, found, strict=True):
        for output, wanted in zip(outputs, checked(tiny_model).generate(requests), strict=True):
            assert_same(output, wanted)


def test_usage_and_times(tiny_model) -> None:
    now = iter(range(1000))
    engine = Engine(Network(tiny_model), EngineOptions(**EXACT), clock=lambda: float(next(now)))
    number = engine.add(greedy(list(range(20)), max_new_tokens=4))
    usage = run(engine)[number][-1].usage
    assert (usage.prompt_tokens, usage.cached_tokens, usage.generated_tokens) == (20, 0, 4)
    assert 0 < usage.queued_s < usage.first_token_s
    assert usage.per_token_s > 0


def test_prompt_logprobs_come_with_the_first_event(tiny_model) -> None:
    engine = checked(tiny_model)
    engine.add(greedy([5, 6, 7], prompt_logprobs=1, max_new_tokens=2))
    first, last = run(engine)[0]
    assert [one and one.token_id for one in first.prompt_logprobs] == [None, 6, 7]
    assert last.prompt_logprobs is None


def test_max_time_counts_from_the_first_step(tiny_model) -> None:
    now = [0.0]
    engine = Engine(Network(tiny_model), EngineOptions(**EXACT), clock=lambda: now[0])
    engine.add(greedy([1, 2], max_time=2.5, max_new_tokens=50))
    now[0] = 100.0  # it waited
    events = []
    while engine.has_work:
        events += engine.step()
        now[0] += 1
    assert len(events) == 4
    assert events[-1].finish_reason == FinishReason.LENGTH


def test_what_can_never_fit_is_refused_with_the_numbers(tiny_gptj) -> None:
    engine = checked(tiny_gptj, cache_memory_bytes=4 * 16 * 2 * 2 * 32 * 4)
    message = "2 sequences of 20 tokens of prompt and up to 30 new ones need room for 112 tokens, .* holds 64"
    with pytest.raises(InvalidRequest, match=message) as error:
        engine.add(greedy([1] * 20, max_new_tokens=30, num_beams=2))
    assert error.value.param == "max_new_tokens"
    assert not engine.has_work
    engine.add(greedy([1] * 20, max_new_tokens=30))


def test_all_are_taken_or_none(tiny_gptj) -> None:
    engine = checked(tiny_gptj)
    for take in (engine.stream, engine.generate):
        with pytest.raises(InvalidRequest, match="token ids"):
            take([greedy([1]), greedy([999])])
    assert not engine.has_work


def test_nothing_runs_for_whom_nobody_listens(tiny_gptj) -> None:
    engine = checked(tiny_gptj)
    unheard = engine.stream([greedy([1])])
    assert not engine.has_work
    assert len(list(unheard)) == 8


def test_a_failing_model_ends_requests_and_not_the_engine(tiny_gptj) -> None:
    engine = checked(tiny_gptj, max_stall=0)
    forward = engine._runner.forward
    engine.add(greedy([1, 2], max_new_tokens=30))
    engine.step()
    engine.add(greedy([3, 4], do_sample=True, num_return_sequences=2))
    engine._runner.forward = lambda readings: 1 / 0
    events = engine.step()
    assert [(event.request, event.index, event.finish_reason) for event in events] == [
        (0, 0, "error"), (1, 0, "error"), (1, 1, "error"),
    ]  # fmt: skip
    assert events[0].error == "ZeroDivisionError: division by zero"
    assert engine.statistics().held_blocks == 0
    with pytest.raises(EngineError, match="division by zero"):
        engine.generate([greedy([1, 2])])
    engine._runner.forward = forward
    assert len(engine.generate([greedy([1, 2])])[0].token_ids) == 8


def test_what_a_failing_step_has_decided_counts(tiny_gptj) -> None:
    engine = checked(tiny_gptj, max_stall=0)
    engine.add(greedy([1, 2], max_new_tokens=1))
    engine.add(greedy([3, 4], num_beams=2))
    engine._answers._search = lambda request: 1 / 0
    ended = engine.step()
    assert [(event.request, event.finish_reason) for event in ended] == [(0, "length"), (1, "error")]
    assert len(ended[0].token_ids) == 1
    assert not engine.has_work


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_answers_of_beams_are_scored_in_as_much_room_as_was_asked_for(tiny_gptj, prefix_cache) -> None:
    """A prompt of whole blocks: the last of them is read again for each answer."""
    request = greedy(list(range(48)), num_beams=4, num_return_sequences=4, logprobs=0, max_new_tokens=20)
    needed = 2 + 4 * 3  # blocks: what all share, and each answer's own
    with pytest.raises(InvalidRequest):
        checked(tiny_gptj, cache_memory_bytes=(needed - 1) * 16 * 512).add(request)
    engine = checked(
        tiny_gptj, cache_memory_bytes=needed * 16 * 512, prefix_cache=prefix_cache, max_batch_tokens=50, max_stall=0
    )
    number = engine.add(request)
    for _ in range(300):
        engine.step()
    assert not engine.has_work, number


def test_usage_of_beams_counts_their_answers(tiny_gptj) -> None:
    now = [0.0]
    engine = Engine(Network(tiny_gptj), EngineOptions(**EXACT), clock=lambda: now[0])
    number = engine.add(greedy([1, 2], num_beams=4, max_new_tokens=11))
    events = []
    while engine.has_work:
        now[0] += 1
        events += engine.step()
    usage = events[-1].usage
    assert (events[-1].request, usage.generated_tokens) == (number, 11)
    assert usage.first_token_s == 1
    assert usage.per_token_s == 1


def test_logits_that_are_no_numbers_end_one_request(tiny_gptj) -> None:
    engine = checked(tiny_gptj)
    with torch.no_grad():
        tiny_gptj.transformer.wte.weight[9] = torch.nan
    sick, well = engine.generate([
        greedy([9], do_sample=True, seed=1), greedy([1, 2])
    ])  # fmt: skip
    assert (sick.token_ids, sick.finish_reason) == ([], "error")
    assert len(well.token_ids) == 8


def test_steps_are_paced_by_the_watch(tiny_gptj) -> None:
    """A token of a prompt takes a tenth of a decoding step: with a stall of 2, ten of them go along."""
    now = [0.0]
    engine = Engine(Network(tiny_gptj), EngineOptions(**EXACT, max_stall=2.0), clock=lambda: now[0])
    forward = engine._runner.forward
    chunks = []

    def timed(readings):
        chunk = sum(len(reading.token_ids) for reading in readings if len(reading.token_ids) > 1)
        now[0] += 1.0 + 0.1 * chunk
        chunks.append(chunk)
        return forward(readings)

    engine._runner.forward = timed
    engine.add(greedy([1], max_new_tokens=120))
    for _ in range(20):
        engine.step()
    engine.add(greedy(list(range(100))))
    while engine.statistics().running < 2 or engine.statistics().prompt_tokens < 101 or chunks[-1]:
        engine.step()
    read = [chunk for chunk in chunks if chunk]
    assert sum(read) == 100
    # The first has nothing to go by; the last one takes what is left.
    assert set(read[1:-1]) <= {9, 10, 11}


def test_options_are_checked_all_at_once() -> None:
    with pytest.raises(ConfigError, match=r"max_num_sequences is 0.*max_stall is 0.5.*cache_dtype is 'int3'"):
        EngineOptions(max_num_sequences=0, max_stall=0.5, cache_dtype="int3")
    with pytest.raises(ConfigError, match=r"max_stall is '2'.*cache_memory_bytes is '4 GB'.*prefix_cache is 'no'"):
        EngineOptions(max_stall="2", cache_memory_bytes="4 GB", prefix_cache="no")
    for endless in (math.nan, math.inf, 1e300, 10**400):
        with pytest.raises(ConfigError, match=r"max_stall is .*, expected a number above 1 to 1,000,000, or 0"):
            EngineOptions(max_stall=endless)


def test_any_text_names_a_tenant(tiny_gptj) -> None:
    engine = checked(tiny_gptj)
    requests = [replace(greedy(list(range(40))), tenant=name) for name in ("\ud800", "\ud801", "\ud800")]
    assert [engine.generate([request])[0].usage.cached_tokens for request in requests] == [0, 0, 32]


def test_a_cache_smaller_than_a_block_is_refused(tiny_gptj) -> None:
    with pytest.raises(ConfigError, match="a block of 16 tokens takes 8,192"):
        checked(tiny_gptj, cache_memory_bytes=1000)


def test_the_cache_is_no_larger_than_what_can_run(tiny_gptj) -> None:
    assert Engine(Network(tiny_gptj), EngineOptions(max_num_sequences=3)).num_cache_tokens == 3 * 128


def test_priorities_come_first(tiny_gptj) -> None:
    engine = checked(tiny_gptj, max_num_sequences=1)
    for priority in (0, 0, 5):
        engine.add(replace(greedy([1, 2], max_new_tokens=2), priority=priority))
    order = [event.request for event in [e for _ in range(6) for e in engine.step()] if event.usage]
    assert order == [2, 0, 1]


class Costless:
    """A model whose forward pass costs nothing."""

    def __init__(self, config) -> None:
        self.config = config
        self._hidden = torch.zeros(512, config.n_embd)
        self._logits = torch.zeros(64, config.vocab_size)

    def __call__(self, input_ids, positions, attend):
        return self._hidden[: len(input_ids)]

    def logits(self, hidden_states):
        return self._logits[: len(hidden_states)]


def test_a_step_of_sixteen_costs_a_millisecond_of_python(tiny_gptj) -> None:
    """Scheduler, tensors, choice and events; the best of many steps, as the machine is not ours alone."""
    engine = Engine(Network(Costless(tiny_gptj.config)), EngineOptions())
    for row in range(16):
        engine.add(greedy([row, *range(60)], max_new_tokens=60))
    took = []
    while engine.has_work:
        began = time.perf_counter()
        engine.step()
        took.append(time.perf_counter() - began)
    assert min(took[5:-5]) < 1e-3
