from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bluejay.engine.block_pool import BlockPool, chain_hashes


def taken(pool: BlockPool, count: int) -> list[int]:
    return [pool.allocate() for _ in range(count)]


def test_blocks_are_handed_out_in_order_and_come_back_at_the_end() -> None:
    pool = BlockPool(4, 16)
    first = taken(pool, 2)
    assert first == [0, 1]
    pool.release(first)
    assert (pool.num_free, pool.num_held) == (4, 0)
    assert taken(pool, 4) == [2, 3, 1, 0]  # the end of a table comes back before its beginning
    assert pool.num_free == 0


def test_a_shared_block_is_free_when_its_last_holder_lets_go() -> None:
    pool = BlockPool(2, 16)
    table = taken(pool, 1)
    pool.share(table)
    assert not pool.may_write(0)
    pool.release(table)
    assert pool.may_write(0)
    assert pool.num_free == 1
    pool.release(table)
    assert pool.num_free == 2


def test_what_is_published_is_found_until_its_block_is_needed() -> None:
    pool = BlockPool(3, 2)
    hashes = list(chain_hashes([1, 2, 3, 4], 2, b"salt"))
    table = taken(pool, 2)
    for block, block_hash in zip(table, hashes, strict=True):
        pool.publish(block, block_hash)
    assert pool.find(hashes) == [0, 1]
    assert not pool.may_write(0)
    pool.release(table)
    assert pool.find(hashes) == [0, 1]
    assert pool.num_free == 3
    assert pool.num_cached([0, 1]) == 2
    assert pool.allocate() == 2  # what remembers nothing goes first
    assert pool.allocate() == 1  # then the least recently used, ends before beginnings
    assert pool.find(hashes) == [0]
    pool.share([0])
    assert pool.num_free == 0
    pool.check_integrity([[2], [1], [0]])


def test_what_was_used_lately_is_forgotten_last() -> None:
    pool = BlockPool(2, 1)
    tables = [taken(pool, 1), taken(pool, 1)]
    hashes = [next(chain_hashes([token], 1, b"")) for token in (5, 6)]
    for table, block_hash in zip(tables, hashes, strict=True):
        pool.publish(table[0], block_hash)
        pool.release(table)
    pool.share([0])
    pool.release([0])
    assert pool.allocate() == 1
    assert pool.find(hashes[:1]) == [0]
    assert pool.find(hashes[1:]) == []


def test_the_first_of_equal_blocks_is_kept() -> None:
    pool = BlockPool(2, 1)
    taken(pool, 2)
    pool.publish(0, b"same")
    pool.publish(1, b"same")
    assert pool.find([b"same"]) == [0]
    assert pool.may_write(1)
    assert pool.num_published == 1
    pool.check_integrity([[0], [1]])


def test_a_new_holder_is_told_by_the_stamp() -> None:
    pool = BlockPool(1, 1)
    pool.allocate()
    before = pool.stamps[0]
    pool.release([0])
    pool.allocate()
    assert pool.stamps[0] == before + 1


def test_a_hash_tells_the_tokens_all_before_them_and_the_salt() -> None:
    first, second = chain_hashes([1, 2, 3, 4, 5], 2, b"a")
    assert first == hashlib.sha256(b"a" + (1).to_bytes(8, "little") + (2).to_bytes(8, "little")).digest()
    assert list(chain_hashes([3, 4], 2, first)) == [second]
    assert list(chain_hashes([3, 4], 2, b"a")) != [second]
    assert list(chain_hashes([1, 2], 2, b"b")) != [first]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda pool: pool.share([0]), "holders"),
        (lambda pool: pool._free.pop(), "lost"),
        (lambda pool: pool._published.clear(), "found differ"),
        (lambda pool: pool._free.append(1), "twice"),
    ],
)
def test_broken_books_are_seen(break_it, message) -> None:
    pool = BlockPool(4, 1)
    taken(pool, 2)
    pool.publish(0, b"x")
    pool.check_integrity([[0, 1]])
    break_it(pool)
    with pytest.raises(AssertionError, match=message):
        pool.check_integrity([[0, 1]])


@given(
    st.lists(st.tuples(st.sampled_from(["take", "share", "drop", "publish", "find"]), st.integers(0, 9)), max_size=60)
)
@settings(max_examples=60, deadline=None)
def test_no_block_is_lost_whatever_is_done(actions) -> None:
    pool, tables = BlockPool(6, 2), []
    hashes = list(chain_hashes(range(12), 2, b""))
    for action, number in actions:
        if action == "take" and pool.num_free:
            tables.append([pool.allocate()])
        elif action == "find":
            found = pool.find(hashes[: number % 6])
            pool.share(found)
            tables.append(found)
        elif tables:
            table = tables[number % len(tables)]
            if action == "share":
                pool.share(table)
                tables.append(list(table))
            elif action == "drop":
                pool.release(table)
                tables.remove(table)
            elif action == "publish" and table:
                pool.publish(table[0], hashes[number % 6])
        pool.check_integrity(tables)
    for table in tables:
        pool.release(table)
    assert pool.num_free == 6
