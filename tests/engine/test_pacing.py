from __future__ import annotations

from bluejay.engine.pacing import FIRST_CHUNK, LEAST_CHUNK, Pacing
from bluejay.engine.scheduler import Part, Schedule
from bluejay.engine.sequence import Sequence


def step(*counts: int) -> Schedule:
    return Schedule([Part(Sequence(None, 0, []), 0, count) for count in counts], [])


def paced(max_stall: float = 2.0) -> Pacing:
    """A decoding step takes 100 ms, a token of a prompt 4 ms."""
    pacing = Pacing(max_stall)
    pacing.learn(step(1, 1), 0.1)
    pacing.learn(step(1, 1, 10), 0.14)
    return pacing


def test_a_chunk_takes_as_long_as_the_stall_allows() -> None:
    assert paced(2.0).max_prefill_tokens(1, 2) in (24, 25)
    assert paced(1.2).max_prefill_tokens(1, 2) == LEAST_CHUNK
    assert paced(3.0).max_prefill_tokens(1, 2) in (49, 50)


def test_many_that_wait_for_their_first_token_get_more() -> None:
    assert paced().max_prefill_tokens(2, 2) in (24, 25)
    assert paced().max_prefill_tokens(8, 2) in (99, 100)


def test_steps_that_nobody_notices_may_be_longer() -> None:
    pacing = Pacing(2.0)
    pacing.learn(step(1, 1), 0.002)
    pacing.learn(step(1, 1, 10), 0.003)
    assert pacing.max_prefill_tokens(1, 2) in (179, 180)  # 18 ms of them


def test_where_nobody_decodes_there_is_no_limit() -> None:
    assert paced().max_prefill_tokens(1, 0) is None
    assert paced(0).max_prefill_tokens(1, 2) is None


def test_before_anything_was_timed_chunks_are_short() -> None:
    pacing = Pacing(2.0)
    assert pacing.max_prefill_tokens(1, 1) == 0  # a step without prompts comes first, and is timed
    pacing.learn(step(1), 0.1)
    assert pacing.max_prefill_tokens(1, 1) == FIRST_CHUNK
    pacing = Pacing(2.0)
    pacing.learn(step(1), 0.0)
    pacing.learn(step(50), 0.0)
    assert pacing.max_prefill_tokens(1, 1) == FIRST_CHUNK  # a clock that stands still tells nothing


def test_a_prompt_alone_tells_what_its_tokens_cost() -> None:
    pacing = Pacing(2.0)
    pacing.learn(step(1), 0.1)
    pacing.learn(step(50), 0.5)
    assert pacing.max_prefill_tokens(1, 1) == 10


def test_chunks_follow_a_machine_that_slows_down() -> None:
    pacing = paced()
    for _ in range(30):
        pacing.learn(step(1, 1, 10), 0.18)
    assert pacing.max_prefill_tokens(1, 2) == 12


def test_one_slow_step_changes_nothing() -> None:
    pacing = paced()
    for _ in range(8):
        pacing.learn(step(1, 1), 0.1)
        pacing.learn(step(1, 1, 10), 0.14)
    before = pacing.max_prefill_tokens(1, 2)
    pacing.learn(step(1, 1), 0.5)
    assert pacing.max_prefill_tokens(1, 2) == before
    pacing.learn(step(1, 1, 10), 0.5)
    assert pacing.max_prefill_tokens(1, 2) == before


def test_where_steps_differ_most_keep_within_the_stall() -> None:
    pacing = paced()
    for number in range(16):
        pacing.learn(step(1, 1, 10), 0.18 if number % 4 == 0 else 0.14)
    assert pacing.max_prefill_tokens(1, 2) == 12  # 8 ms a token, not 5 on average


def test_a_step_without_prompts_is_looked_at_now_and_then() -> None:
    pacing, chunks = paced(), []
    for _ in range(100):
        chunks.append(pacing.max_prefill_tokens(1, 2))
        pacing.learn(step(1, 1, chunks[-1]) if chunks[-1] else step(1, 1), 0.1 + 0.004 * chunks[-1])
    assert chunks.count(0) == 3
    assert min(chunk for chunk in chunks if chunk) >= 24
