"""Whatever happens in whatever order: the books stay right, no block is lost, and every answer is the plain loop's."""

from __future__ import annotations

import random

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from bluejay.engine.embedding import Embedding
from bluejay.engine.network import Network
from bluejay.engine.plain import PlainEngine
from bluejay.engine.request import GenerationRequest
from bluejay.engine.scorer import Scorer
from bluejay.model import ModelConfig
from bluejay.model.gptj import GPTJ

from .requests import checked, mixed_request

CONFIG = ModelConfig(
    model_type="gptj", vocab_size=40, n_positions=64, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, eos_token_id=0
)
NUM_STEPS = 10_000
BLOCKS = 24  # of 4 tokens: a beam search of 4 with 40 tokens just fits, two do not


class Machine(RuleBasedStateMachine):
    """Requests arrive, run, are preempted, are cancelled; forks come of beams and of several answers."""

    model: GPTJ
    plain: PlainEngine
    one_pass: Scorer
    num_steps = 0
    num_forks = 0
    num_preemptions = 0

    def __init__(self) -> None:
        super().__init__()
        memory = BLOCKS * 4 * 2 * 16 * 4
        limits = {"max_batch_tokens": 20, "max_num_sequences": 6, "max_stall": 0}  # no watch: steps are repeatable
        self.engine = checked(self.model, block_size=4, cache_memory_bytes=memory, **limits)
        self.asked: dict[int, GenerationRequest] = {}
        self.tokens: dict[tuple[int, int], list[int]] = {}
        self.cancelled: set[int] = set()
        self.embeddings: list[tuple[list[list[int]], Embedding]] = []

    @rule(seed=st.integers(0, 10**6))
    def arrive(self, seed: int) -> None:
        request = mixed_request(random.Random(seed), vocab_size=40, longest=24, most_new=12)
        self.asked[self.engine.add(request)] = request

    @rule(seed=st.integers(0, 10**6))
    def embed(self, seed: int) -> None:
        rng = random.Random(seed)
        texts = [[rng.randrange(40) for _ in range(rng.randint(1, 40))] for _ in range(2)]
        self.embeddings.append((texts, Embedding(self.engine, texts)))

    @rule(count=st.integers(1, 12), disturbed=st.booleans())
    def step(self, count: int, disturbed: bool = False) -> None:
        for place in range(count):
            if disturbed and place % 2 == 0 and (running := self.engine._scheduler.running):
                self.engine._scheduler._preempt(running[-1])
            type(self).num_steps += 1
            for event in self.engine.step():
                self.tokens.setdefault((event.request, event.index), []).extend(event.token_ids)
            widths = [len(request.sequences) for request in self.engine._scheduler.running]
            type(self).num_forks += max(widths, default=0) > 1

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.asked)))
        self.engine.cancel(number)
        self.cancelled.add(number)

    @precondition(lambda self: self.engine._scheduler.running)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        scheduler = self.engine._scheduler
        scheduler._preempt(data.draw(st.sampled_from(scheduler.running)))

    @invariant()
    def books_are_right(self) -> None:
        self.engine.check_integrity()

    def teardown(self) -> None:
        while self.engine.has_work:
            self.step(count=1)
        statistics = self.engine.statistics()
        assert (statistics.running, statistics.waiting, statistics.held_blocks) == (0, 0, 0)
        type(self).num_preemptions += statistics.preemptions
        for texts, embedding in self.embeddings:
            torch.testing.assert_close(embedding.result(), self.one_pass.embed(texts), rtol=1e-4, atol=1e-4)
        for number, request in self.asked.items():
            if number in self.cancelled:
                continue
            [wanted] = self.plain.generate([request])
            for index, sequence in enumerate(wanted.sequences):
                assert self.tokens.get((number, index), []) == sequence.token_ids, (number, index)


def test_whatever_happens_the_books_are_right_and_so_are_the_answers(make_model) -> None:
    class Seeded(Machine):
        model = make_model(CONFIG)
        plain = PlainEngine(model, cache_dtype=torch.float32)
        one_pass = Scorer(Network(model))

    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    run_state_machine_as_test(
        Seeded,
        settings=settings(
            max_examples=110, stateful_step_count=50, deadline=None, derandomize=True, suppress_health_check=checks
        ),
    )
    assert Seeded.num_steps >= NUM_STEPS
    assert Seeded.num_forks > 500
    assert Seeded.num_preemptions > 300
