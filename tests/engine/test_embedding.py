"""Texts that an engine embeds in chunks, against the same texts in one pass."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from bluejay.decoding import SamplingParams
from bluejay.engine.embedding import Embedding
from bluejay.engine.network import Network
from bluejay.engine.options import EngineOptions
from bluejay.engine.request import GenerationRequest
from bluejay.engine.scorer import Scorer
from bluejay.errors import ContextLengthExceeded, EngineError, InvalidRequest

from .requests import EXACT, CheckedEngine, checked

TEXTS = [[5, 6, 7], [200, 3], [9] * 128, [41], [*range(100)], [9] * 40]
BLOCK_BYTES = 16 * 2 * 2 * 32 * 4


def endless(prompt: list[int]) -> GenerationRequest:
    return GenerationRequest(prompt, SamplingParams(max_new_tokens=100, ignore_eos=True))


def finish(engine: CheckedEngine, embedding: Embedding) -> torch.Tensor:
    while (vectors := embedding.result()) is None:
        assert engine.has_work
        engine.step()
    return vectors


@pytest.mark.parametrize(
    "options",
    [{}, {"max_batch_tokens": 7}, {"block_size": 3, "max_num_sequences": 2}, {"prefix_cache": False}],
    ids=str,
)
def test_chunks_bring_what_one_pass_brings(tiny_model, options) -> None:
    engine, one_pass = checked(tiny_model, **options), Scorer(Network(tiny_model))
    for _ in range(2):  # what was read before is not taken from the cache
        torch.testing.assert_close(finish(engine, Embedding(engine, TEXTS)), one_pass.embed(TEXTS))
    assert (engine.statistics().held_blocks, engine.has_work) == (0, False)
    assert finish(engine, Embedding(engine, [])).shape == (0, 32)


def test_beside_streams_and_preempted(tiny_model) -> None:
    """A text that must be read again counts each of its tokens once; who streams says what it says alone."""
    requests = [endless([5, number]) for number in range(2)]
    wanted = checked(tiny_model).generate(requests)
    engine = checked(tiny_model, max_batch_tokens=12)
    said: dict[int, list[int]] = {engine.add(request): [] for request in requests}
    embedding = Embedding(engine, TEXTS)
    while engine.has_work:
        for event in engine.step():
            said[event.request] += event.token_ids
        if engine.statistics().steps in (8, 25, 30):
            engine._scheduler._preempt(engine._scheduler.running[-1])
    assert engine.statistics().preemptions == 3
    torch.testing.assert_close(embedding.result(), Scorer(Network(tiny_model)).embed(TEXTS))
    assert list(said.values()) == [output.token_ids for output in wanted]


def test_a_stream_goes_on_between_the_chunks(tiny_gptj) -> None:
    """By a clock by which each token read costs a tenth of a step; five texts at once stall it no more than one."""
    now = [0.0]
    engine = CheckedEngine(Network(tiny_gptj), EngineOptions(**EXACT, max_stall=2.0), clock=lambda: now[0])
    model = engine._runner.network.model.forward

    def timed(input_ids, *others):
        now[0] += 1.0 + 0.1 * input_ids.numel()
        return model(input_ids, *others)

    engine._runner.network.model.forward = timed
    engine.add(endless([1, 2]))
    for _ in range(10):
        engine.step()
    embedding = Embedding(engine, [[number] * 100 for number in range(5)])
    times = []
    while engine.has_work and embedding.result() is None:
        [event] = engine.step()
        assert len(event.token_ids) == 1
        times.append(now[0])
    assert len(times) > 50  # 500 tokens, some 8 in each step
    assert max(after - before for before, after in pairwise(times)) < 1.1 * 2.0 * 1.1


def test_what_a_tenant_had_embedded_is_found_by_nobody(tiny_gptj) -> None:
    engine = checked(tiny_gptj)
    finish(engine, Embedding(engine, [[9] * 100]))
    assert engine.statistics().cached_blocks == 0


def test_who_no_longer_waits_frees_its_blocks(tiny_gptj) -> None:
    engine = checked(tiny_gptj, max_batch_tokens=10)
    embedding = Embedding(engine, TEXTS)
    engine.step()
    assert engine.statistics().held_blocks > 0
    embedding.cancel()
    engine.step()
    assert (engine.statistics().held_blocks, engine.has_work) == (0, False)


def test_all_texts_are_taken_or_none(tiny_gptj) -> None:
    engine = checked(tiny_gptj, cache_memory_bytes=4 * BLOCK_BYTES)
    for text, error, words in (
        ([], InvalidRequest, "no token"),
        ([300], InvalidRequest, "token ids"),
        ([5] * 129, ContextLengthExceeded, "129 tokens"),
        ([5] * 65, InvalidRequest, "65 tokens to read, and the cache holds 64"),
    ):
        with pytest.raises(error, match=words):
            Embedding(engine, [[5], text])
    assert not engine.has_work


def test_a_failing_step_is_told_and_ends_the_others(tiny_gptj) -> None:
    engine = checked(tiny_gptj, max_batch_tokens=10)
    engine._runner.forward = lambda readings: 1 / 0
    embedding = Embedding(engine, TEXTS)
    engine.step()
    with pytest.raises(EngineError, match="ZeroDivisionError"):
        embedding.result()
    engine.step()
    assert not engine.has_work
