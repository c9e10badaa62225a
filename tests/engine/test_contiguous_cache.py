from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bluejay.engine.contiguous_cache import ContiguousCache
from bluejay.model import CausalAttention

H, K = 2, 4


def texts(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, n, H, K, generator=generator) for n in lengths]


def expected(qkv, window):
    """What the last token of a whole text sees, without any cache."""
    q, k, v = qkv[:, None]
    return CausalAttention()(0, q, k, v, scale=0.5, window=window)[0, -1]


def prefill(cache, rows, lengths, window):
    """Read the first tokens of each row, padded on the right with rubbish."""
    width = max(lengths)
    padded = torch.full((3, len(rows), width, H, K), 99.0)
    for i, (row, n) in enumerate(zip(rows, lengths, strict=True)):
        padded[:, i, :n] = row[:, :n]
    cache.begin([0] * len(rows), width)
    out = cache(0, *padded, scale=0.5, window=window)
    return [out[i, n - 1] for i, n in enumerate(lengths)]


def decode(cache, rows, lengths, window):
    """Read one more token of each row."""
    cache.begin(lengths, 1)
    q, k, v = (torch.stack([row[part, n : n + 1] for row, n in zip(rows, lengths, strict=True)]) for part in range(3))
    return cache(0, q, k, v, scale=0.5, window=window)[:, 0]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.sampled_from([None, 1, 3, 50]), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_each_row_sees_its_own_past_within_the_window(lengths, window, capacity):
    rows = texts([n + 9 for n in lengths])
    cache = ContiguousCache(32, capacity)
    out = prefill(cache, rows, lengths, window)
    for step in range(9):
        for row, n, seen in zip(rows, lengths, out, strict=True):
            assert torch.allclose(seen, expected(row[:, : n + step], window), atol=1e-5)
        out = decode(cache, rows, [n + step for n in lengths], window)


@pytest.mark.parametrize("lengths", [[5, 5, 5], [2, 7, 4]])
def test_rows_fork_move_and_leave(lengths):
    rows = texts([n + 4 for n in lengths], seed=1)
    cache = ContiguousCache(32, 8)
    prefill(cache, rows, lengths, None)
    order = [2, 0, 0]
    cache.select(order)
    out = decode(cache, [rows[i] for i in order], [lengths[i] for i in order], None)
    for i, seen in zip(order, out, strict=True):
        assert torch.allclose(seen, expected(rows[i][:, : lengths[i] + 1], None), atol=1e-5)
    cache.select([1])
    [seen] = decode(cache, [rows[0]], [lengths[0] + 1], None)
    assert torch.allclose(seen, expected(rows[0][:, : lengths[0] + 2], None), atol=1e-5)


def test_unseen_slots_are_never_read():
    """Memory is given back full of NaN before the cache is made: none of it may come through."""
    rubbish = [torch.full((2, 64, H, K), float("nan")) for _ in range(4)]
    del rubbish
    rows = texts([3, 20])
    cache = ContiguousCache(64)
    prefill(cache, rows, [1, 10], None)
    for step in range(2):
        assert decode(cache, rows, [1 + step, 10 + step], None).isfinite().all()


def test_room_doubles_and_never_exceeds_the_context():
    cache = ContiguousCache(20, 4)
    [row] = texts([20])
    capacities = []
    prefill(cache, [row], [3], None)
    for n in range(3, 20):
        decode(cache, [row], [n], None)
        capacities.append(cache._keys[0].shape[1])
    assert sorted(set(capacities)) == [4, 8, 16, 20]
