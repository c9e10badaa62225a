from __future__ import annotations

from bluejay.decoding import SamplingParams
from bluejay.engine.block_pool import BlockPool
from bluejay.engine.continuation import Continuation
from bluejay.engine.request import GenerationRequest
from bluejay.engine.scheduler import Schedule, Scheduler
from bluejay.engine.sequence import Request, Sequence, Status


def scheduler(num_blocks: int = 16, block_size: int = 4, **options: int | bool) -> Scheduler:
    limits = {"max_batch_tokens": 64, "max_num_sequences": 8} | options
    return Scheduler(BlockPool(num_blocks, block_size), **limits)


def request(number: int, prompt: list[int], *, priority: int = 0, tenant: str = "", **options: object) -> Request:
    params = SamplingParams(**{"max_new_tokens": 8, **options})
    asked = GenerationRequest(prompt, params, priority, tenant)
    made = Request(number, asked, Continuation(number, 0, list(prompt), params, (), 8, None, None))
    made.sequences = [Sequence(made, 0, list(prompt))]
    return made


def plan(schedule: Schedule) -> list[tuple[int, int, int]]:
    """Which request, from where, how many tokens."""
    return [(part.sequence.request.id, part.start, part.num_tokens) for part in schedule.parts]


def run(books: Scheduler, schedule: Schedule, token: int = 99) -> None:
    """What an engine would do: read, and append a token to what has been read to its end."""
    for part in schedule.parts:
        books.computed(part.sequence, part.num_tokens)
        if part.end == part.sequence.num_tokens:
            part.sequence.token_ids.append(token)
    books.check_integrity()


def step(books: Scheduler, **options: object) -> list[tuple[int, int, int]]:
    schedule = books.schedule(**options)
    made = plan(schedule)
    run(books, schedule)
    return made


def test_prompts_are_read_in_chunks_and_decoding_comes_first() -> None:
    books = scheduler(max_batch_tokens=6)
    books.add(request(0, [1, 2]))
    assert step(books) == [(0, 0, 2)]
    books.add(request(1, list(range(10, 20))))
    assert step(books) == [(0, 2, 1), (1, 0, 5)]
    assert step(books) == [(0, 3, 1), (1, 5, 5)]
    assert step(books) == [(0, 4, 1), (1, 10, 1)]


def test_chunks_are_short_while_somebody_waits_for_a_token() -> None:
    books = scheduler()
    books.add(request(0, list(range(10))))
    told = []

    def at_most(num_reading: int, num_decoding: int) -> int | None:
        told.append((num_reading, num_decoding))
        return 3 if num_decoding else None

    assert step(books, max_prefill_tokens=at_most) == [(0, 0, 10)]
    books.add(request(1, list(range(20, 30))))
    books.add(request(2, list(range(40, 50))))
    assert step(books, max_prefill_tokens=at_most) == [(0, 10, 1), (1, 0, 3)]
    assert step(books, max_prefill_tokens=at_most) == [(0, 11, 1), (1, 3, 3)]
    assert told == [(1, 0), (2, 1), (2, 1)]


def test_blocks_are_taken_as_tokens_come() -> None:
    books = scheduler()
    one, two = request(0, list(range(6))), request(1, list(range(10, 14)))
    books.add(one)
    books.add(two)
    step(books)
    assert [r.sequences[0].block_table for r in (one, two)] == [[0, 1], [2]]
    step(books)
    assert [r.sequences[0].block_table for r in (one, two)] == [[0, 1], [2, 3]]
    step(books)
    step(books)
    assert [r.sequences[0].block_table for r in (one, two)] == [[0, 1, 4], [2, 3]]


def test_who_came_first_is_served_first_but_for_the_priority() -> None:
    books = scheduler(max_num_sequences=1)
    for number, priority in enumerate((0, 0, 2, 1)):
        books.add(request(number, [1, 2], priority=priority))
    served = []
    for _ in range(4):
        served += [number for number, _, _ in step(books)]
        books.finish(books.running[0])
    assert served == [2, 3, 0, 1]


def test_a_second_prompt_pays_only_for_what_is_new() -> None:
    books = scheduler()
    books.add(request(0, list(range(10))))
    step(books)
    books.add(request(1, [*range(10), 50]))
    assert step(books) == [(0, 10, 1), (1, 8, 3)]
    first, second = (r.sequences[0].block_table for r in books.running)
    assert (first, second) == ([0, 1, 2], [0, 1, 3])
    assert books.running[1].num_cached_tokens == 8
    assert (books.num_prompt_tokens, books.num_cached_tokens) == (21, 8)


def test_the_last_token_is_read_also_where_all_blocks_are_known() -> None:
    books = scheduler()
    books.add(request(0, list(range(8))))
    step(books)
    books.add(request(1, list(range(8))))
    assert step(books)[1] == (1, 4, 4)


def test_tenants_share_nothing() -> None:
    books = scheduler()
    books.add(request(0, list(range(10)), tenant="a"))
    step(books)
    books.add(request(1, list(range(10)), tenant="b"))
    assert step(books)[1] == (1, 0, 10)


def test_without_a_prefix_cache_all_is_read() -> None:
    books = scheduler(prefix_cache=False)
    books.add(request(0, list(range(10))))
    step(books)
    books.add(request(1, list(range(10))))
    assert step(books)[1] == (1, 0, 10)


def test_a_burst_waits_for_the_first_to_read_what_all_share() -> None:
    books = scheduler(num_blocks=32)
    for number in range(4):
        books.add(request(number, [*range(12), 50 + number]))
    books.add(request(4, [70, 71]))
    assert step(books) == [(0, 0, 13), (4, 0, 2)]
    assert step(books) == [(0, 13, 1), (4, 2, 1), (1, 12, 1), (2, 12, 1), (3, 12, 1)]


def test_scores_of_a_prompt_are_not_taken_from_the_cache() -> None:
    books = scheduler()
    books.add(request(0, list(range(12))))
    step(books)
    again = request(1, list(range(12)), prompt_logprobs=0)
    again.sequences[0].score_from = 0
    books.add(again)
    assert step(books)[1] == (1, 0, 12)


def test_the_youngest_gives_its_blocks_and_reads_again_what_was_forgotten() -> None:
    books = scheduler(num_blocks=5)
    old, young = request(0, list(range(4))), request(1, list(range(20, 24)))
    books.add(old)
    books.add(young)
    for _ in range(5):
        assert len(step(books)) == 2
    assert (old.sequences[0].block_table, young.sequences[0].block_table) == ([0, 2], [1, 3])
    assert step(books) == [(0, 8, 1)]
    assert (old.sequences[0].block_table, young.sequences[0].block_table) == ([0, 2, 4], [])
    assert (young.status, young.sequences[0].num_computed_tokens) == (Status.WAITING, 0)
    assert books.num_preemptions == 1
    step(books)
    assert young.status == Status.WAITING  # its three blocks and a spare one for the other do not fit
    books.finish(old)
    assert step(books) == [(1, 8, 1)]  # what it had read was not yet forgotten
    assert young.num_cached_tokens == 0  # of its prompt, when it began


def test_a_fork_is_copied_when_it_is_written_and_not_before() -> None:
    books = scheduler()
    asked = request(0, list(range(6)), do_sample=True, num_return_sequences=3)
    books.add(asked)
    run(books, books.schedule())
    [root] = asked.sequences
    for index, token in ((1, 71), (2, 72)):
        child = root.fork(index, [*root.token_ids[:-1], token])
        books.fork(root, child)
        asked.sequences.append(child)
    assert [s.block_table for s in asked.sequences] == [[0, 1]] * 3
    schedule = books.schedule()
    assert schedule.copies == [(1, 2), (1, 3)]  # the last one keeps the block
    assert [s.block_table for s in asked.sequences] == [[0, 2], [0, 3], [0, 1]]
    books.check_integrity()


def test_forks_that_were_preempted_share_again_what_they_have_in_common() -> None:
    books = scheduler(prefix_cache=False)
    asked = request(0, list(range(6)), do_sample=True, num_return_sequences=2)
    books.add(asked)
    run(books, books.schedule())
    [root] = asked.sequences
    child = root.fork(1, [*root.token_ids[:-1], 71])
    books.fork(root, child)
    asked.sequences.append(child)
    step(books)
    books._preempt(asked)
    books.check_integrity()
    assert asked.leader_tokens == 6
    schedule = books.schedule()
    assert plan(schedule) == [(0, 0, 8)]  # the first one reads for both
    run(books, schedule)
    assert child.num_computed_tokens == 6
    assert child.block_table == root.block_table
    schedule = books.schedule()
    assert plan(schedule) == [(0, 8, 1), (0, 6, 2)]
    assert len(schedule.copies) == 1
    books.check_integrity()


def test_guesses_take_only_what_is_free() -> None:
    books = scheduler(num_blocks=2)
    books.add(request(0, list(range(4))))
    step(books)
    schedule = books.schedule(num_drafts=lambda sequence, num_decoding: 9 * num_decoding)
    assert [(part.num_tokens, part.num_drafts) for part in schedule.parts] == [(1, 3)]
    books.check_integrity()


def test_a_request_that_is_wider_than_allowed_runs_alone() -> None:
    books = scheduler(max_num_sequences=2)
    books.add(request(0, [1, 2]))
    books.add(request(1, [3, 4], num_beams=5))
    books.add(request(2, [5, 6]))
    assert step(books) == [(0, 0, 2)]
    books.finish(books.running[0])
    assert step(books) == [(1, 0, 2)]
    books.finish(books.running[0])
    assert step(books) == [(2, 0, 2)]
