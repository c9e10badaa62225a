from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from bluejay import ops
from bluejay.errors import KernelError
from bluejay.ops import reference

NATIVE = [name for name in ops.available_voices() if name != ops.REFERENCE]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
DTYPES = [*FLOATS, torch.int8]


@pytest.fixture(autouse=True)
def as_before():
    """Leave the process's choice as it was."""
    voice, threads = ops.voice(), ops.num_threads()
    yield
    ops.choose(voice)
    ops.set_num_threads(threads)


@dataclass
class Batch:
    """The arguments of paged_attention."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_tables: torch.Tensor
    context_lens: torch.Tensor
    query_starts: torch.Tensor
    scale: float = 0.25
    window: int | None = None

    def run(self, attend=ops.paged_attention):
        return attend(
            self.q,
            self.k_cache,
            self.v_cache,
            self.block_tables,
            self.context_lens,
            self.query_starts,
            scale=self.scale,
            window=self.window,
        )


def stored(x, dtype):
    """Keys or values as a cache of that dtype holds them."""
    return reference.quantize_kv(x) if dtype == torch.int8 else x.to(dtype)


def opened(packed):
    """The integers and the scales of heads in an int8 cache."""
    return packed[..., :-4], packed[..., -4:].clone().view(torch.float32)


def read(cache):
    """What numbers a cache holds."""
    if cache.dtype != torch.int8:
        return cache.float()
    integers, scales = opened(cache)
    return integers * scales


def batch_of(sequences, *, heads=2, dim=32, block=4, dtype=torch.float32, window=None, seed=0):
    """Sequences of (queries, context); blocks lie in any order, and every slot that none of them uses holds NaN."""
    generator = torch.Generator().manual_seed(seed)
    needed = [-(-context // block) for _, context in sequences]
    order = torch.randperm(sum(needed) + 3, generator=generator).tolist()
    caches = torch.full((2, len(order), block, heads, dim), float("nan"))
    tables = torch.full((len(sequences), max(needed, default=0) + 1), -1, dtype=torch.int32)
    for s, (_, context) in enumerate(sequences):
        blocks = [order.pop() for _ in range(needed[s])]
        tables[s, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        for place in range(0, context, block):
            slots = min(block, context - place)
            caches[:, blocks[place // block], :slots] = torch.randn(2, slots, heads, dim, generator=generator)
    starts = torch.tensor([0, *(n for n, _ in sequences)]).cumsum(0).int()
    lens = torch.tensor([context for _, context in sequences], dtype=torch.int32)
    q = torch.randn(int(starts[-1]), heads, dim, generator=generator)
    return Batch(q, *stored(caches, dtype), tables, lens, starts, scale=dim**-0.5, window=window)


def assert_native_is_reference(batch, tolerance=2e-6):
    expected = batch.run(reference.paged_attention)
    assert expected.isfinite().all()
    for name in NATIVE:
        ops.choose(name)
        torch.testing.assert_close(
            batch.run(), expected, atol=tolerance, rtol=10 * tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


MIX = [(1, 1), (1, 2), (1, 700), (5, 40), (8, 8), (9, 33), (0, 10), (30, 30), (1, 64), (100, 300), (3, 3)]


@pytest.mark.parametrize("window", [None, 1, 7, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_is_torchs_attention(dtype, window):
    batch = batch_of(MIX, dtype=dtype, window=window)
    out = batch.run(reference.paged_attention)
    for s, (queries, context) in enumerate(MIX):
        blocks = batch.block_tables[s, : -(-context // 4)].long()
        k, v = (read(cache[blocks].flatten(0, 1)[:context]) for cache in (batch.k_cache, batch.v_cache))
        rows = slice(int(batch.query_starts[s]), int(batch.query_starts[s + 1]))
        age = torch.arange(context - queries, context)[:, None] - torch.arange(context)
        mask = (age >= 0) & (age < (window or context + 1))
        q, k, v = (x.transpose(0, 1) for x in (batch.q[rows], k, v))
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=batch.scale)
        torch.testing.assert_close(out[rows], expected.transpose(0, 1), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 50, 256])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 24, 64, 80, 128, 256])
def test_native_is_reference(dim, dtype, window):
    assert_native_is_reference(batch_of(MIX, dim=dim, dtype=dtype, window=window))


@pytest.mark.parametrize("dim", [1, 3, 4, 7, 9, 15, 17, 31, 100, 257])
def test_any_head_size_is_served(dim):
    for dtype in DTYPES:
        assert_native_is_reference(batch_of(MIX[:8], dim=dim, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
@pytest.mark.parametrize("block", [1, 2, 16, 63, 64, 4096])
def test_blocks_of_any_size(block, dtype):
    assert_native_is_reference(batch_of(MIX, block=block, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
@pytest.mark.parametrize("window", [None, 256, 2900])
def test_long_contexts(window, dtype):
    sequences = [(1, 3000), (2, 2047), (150, 3000), (1, 512), (1, 513), (1, 1025)]
    assert_native_is_reference(batch_of(sequences, dim=64, block=16, dtype=dtype, window=window))


def sequences():
    def queries_of(context):
        return st.tuples(st.integers(0, min(context, 60)), st.just(context))

    return st.lists(st.integers(0, 200).flatmap(queries_of), min_size=1, max_size=5)


@given(
    sequences=sequences(),
    heads=st.integers(1, 4),
    dim=st.integers(1, 40),
    block=st.integers(1, 64),
    dtype=st.sampled_from(DTYPES),
    window=st.none() | st.integers(1, 250),
    seed=st.integers(0, 1000),
)
@settings(max_examples=150, deadline=None)
def test_native_is_reference_for_any_batch(sequences, heads, dim, block, dtype, window, seed):
    batch = batch_of(sequences, heads=heads, dim=dim, block=block, dtype=dtype, window=window, seed=seed)
    assert_native_is_reference(batch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("name", NATIVE)
def test_results_do_not_depend_on_threads_or_neighbours(name, dtype):
    ops.choose(name)
    sequences = [*MIX, (1, 3000), (200, 450), (2, 1500)]
    batch = batch_of(sequences, dim=64, block=16, dtype=dtype)
    outs = []
    for threads in (1, 2, 3):
        ops.set_num_threads(threads)
        outs.append(batch.run())
    assert all(torch.equal(out, outs[0]) for out in outs)
    for s in range(len(sequences)):
        start, end = batch.query_starts[s : s + 2].tolist()
        alone = replace(
            batch,
            q=batch.q[start:end],
            block_tables=batch.block_tables[s : s + 1],
            context_lens=batch.context_lens[s : s + 1],
            query_starts=torch.tensor([0, end - start], dtype=torch.int32),
        )
        assert torch.equal(alone.run(), outs[0][start:end])


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
@pytest.mark.parametrize("layout", ["a layer of each block", "keys beside values", "one row of blocks"])
def test_caches_may_be_views(layout, dtype):
    batch = batch_of(MIX, dtype=dtype)
    caches = torch.stack((batch.k_cache, batch.v_cache))  # [2, N, P, H, K]
    if layout == "a layer of each block":
        batch.k_cache, batch.v_cache = caches.permute(1, 0, 2, 3, 4).contiguous().unbind(1)
    elif layout == "keys beside values":
        batch.k_cache, batch.v_cache = caches.permute(1, 2, 0, 3, 4).contiguous().unbind(2)
    else:
        batch.k_cache, batch.v_cache = caches.permute(0, 2, 1, 3, 4).contiguous().transpose(1, 2).unbind(0)
    assert not batch.k_cache.is_contiguous()
    assert_native_is_reference(batch)


@pytest.mark.parametrize("scale", [1.0, 30.0, -1.0, 0.0])
def test_large_scores_neither_overflow_nor_vanish(scale):
    batch = replace(batch_of(MIX, dim=64), scale=scale)
    assert_native_is_reference(batch, tolerance=2e-4)


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("queries", [1, 2, 20])
def test_the_exponential_is_true_to_three_millionths_of_a_percent(name, queries):
    """Two keys with scores 0 and x, values 0 and 1: the result is e^x / (1 + e^x)."""
    ops.choose(name)
    x = torch.cat((-torch.logspace(-6, 1.93, 2000), torch.linspace(-86.9, 0, 3000)))
    S = len(x)
    k_cache, v_cache = torch.zeros(2, S, queries + 1, 1, 1)
    k_cache[:, 1, 0, 0] = x
    v_cache[:, 1] = 1
    k_cache[:, 2:] = -1000.0
    batch = Batch(
        torch.ones(S * queries, 1, 1),
        k_cache,
        v_cache,
        torch.arange(S, dtype=torch.int32)[:, None],
        torch.full((S,), queries + 1, dtype=torch.int32),
        queries * torch.arange(S + 1, dtype=torch.int32),
        scale=1.0,
    )
    out = batch.run()[queries - 1 :: queries, 0, 0].double()
    error = (out / x.double().sigmoid() - 1).abs().max().item()
    assert error < 3e-7


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_number_is_read_as_it_is(name, dtype):
    ops.choose(name)
    numbers = torch.arange(-32768, 32768).to(torch.int16).view(dtype)
    numbers = numbers[numbers.isfinite()].reshape(-1, 1, 1, 16)
    for queries in (1, 2):
        batch = Batch(
            torch.zeros(queries * len(numbers), 1, 16),
            torch.zeros_like(numbers).repeat(1, queries, 1, 1),
            numbers.repeat(1, queries, 1, 1),
            torch.arange(len(numbers), dtype=torch.int32)[:, None],
            torch.full((len(numbers),), queries, dtype=torch.int32),
            queries * torch.arange(len(numbers) + 1, dtype=torch.int32),
        )
        # Where two halves of it are added up, the largest float32 numbers have no room for a rounding.
        assert torch.equal(batch.run()[::queries, 0], numbers[:, 0, 0].float())


@pytest.mark.parametrize("name", [*NATIVE, ops.REFERENCE])
@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 0.0123, 3e-33, 2.5e36])
def test_every_8_bit_number_is_read_as_it_is(name, queries, scale):
    """A query whose scores are all alike, which sees one key alone, gets its value."""
    ops.choose(name)
    integers = torch.arange(-127, 129).to(torch.int8).view(16, 1, 1, 16)  # the last is -128, which is never written
    scales = torch.full((16, 1, 1, 1), scale)
    packed = torch.cat((integers, scales.view(torch.int8)), -1)
    values = torch.cat((packed, torch.zeros(16, queries - 1, 1, 20, dtype=torch.int8)), 1)
    batch = Batch(
        torch.zeros(queries * 16, 1, 16),
        torch.zeros_like(values),
        values,
        torch.arange(16, dtype=torch.int32)[:, None],
        torch.full((16,), queries, dtype=torch.int32),
        queries * torch.arange(17, dtype=torch.int32),
    )
    assert torch.equal(batch.run()[::queries], (integers * scales)[:, 0])


def awkward_heads(dim):
    """Heads that a format of integers and scales may stumble over, [heads, dim] float32."""
    generator = torch.Generator().manual_seed(dim)
    bits = torch.randint(-(2**31), 2**31, (200, dim), generator=generator).to(torch.int32)  # NaN and infinity, too
    wide = torch.randn(200, dim, generator=generator) * torch.logspace(-32, 37, 200)[:, None]
    near_the_least = torch.linspace(0.9e-30, 1.1e-30, 50)[:, None] * torch.ones(dim)
    ties = torch.randint(-127, 127, (200, dim), generator=generator) + 0.5
    ties[:, 0] = 127.0
    ties *= 2.0 ** torch.arange(-20, 20).repeat(5)[:, None]
    broken = torch.randn(6, dim, generator=generator)
    broken[torch.arange(6), [0, 0, 0, -1, -1, -1]] = torch.tensor([torch.nan, torch.inf, -torch.inf] * 2)
    edges = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-30, torch.finfo().max, -torch.finfo().max])[:, None]
    return torch.cat((bits.view(torch.float32), wide, near_the_least, ties, broken, edges * torch.ones(dim)))


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("dim", [1, 3, 4, 8, 15, 16, 17, 80, 257])
def test_8_bits_are_written_as_the_reference_rounds_them(name, dim):
    ops.choose(name)
    heads = awkward_heads(dim)
    k = heads[: len(heads) // 3 * 3].view(-1, 3, dim)
    caches = torch.full((2, len(k), 1, 3, dim + 4), 7, dtype=torch.int8)
    ops.write_kv(k, -k, *caches, torch.arange(len(k)))
    assert torch.equal(caches[0, :, 0], reference.quantize_kv(k))
    assert torch.equal(caches[1, :, 0], reference.quantize_kv(-k))


@pytest.mark.parametrize("dim", [1, 5, 64, 256])
def test_8_bits_are_off_by_half_a_step_at_most(dim):
    x = awkward_heads(dim)
    x = x[x.isfinite().all(1) & (x.abs().amax(1) >= 1e-30)]
    packed = reference.quantize_kv(x)
    integers, scales = (part.double() for part in opened(packed))
    assert packed.shape == (len(x), dim + 4)
    assert (integers.abs().amax(1) == 127).all()
    assert torch.equal(scales[:, 0].float(), x.abs().amax(1) / 127)
    # x / scale is below 128 and is rounded to 24 bits before it is rounded to an integer.
    assert ((x - integers * scales).abs() <= (0.5 + 2.0**-18) * scales).all()
    finite = x.abs().amax(1) < 3e38  # the largest float32 is one rounding away from infinity
    assert torch.equal(reference.dequantize_kv(packed)[finite], (integers * scales).float()[finite])


def test_8_bits_of_nothing_and_of_what_is_no_number():
    x = torch.tensor([[0.0, -0.0, 0.0], [9e-31, 0.0, 0.0], [1.0, torch.nan, 0.0], [-torch.inf, 2.0, 0.0]])
    packed = reference.quantize_kv(x)
    integers, scales = opened(packed)
    assert not integers.any()
    assert scales.flatten().tolist()[:2] == [0.0, 0.0]
    assert scales.flatten()[2:].isnan().all()
    assert not reference.dequantize_kv(packed)[:2].any()
    assert reference.dequantize_kv(packed)[2:].isnan().all()
    assert torch.equal(
        reference.quantize_kv(torch.tensor([[0.5, 1.5, 2.5, -0.5, -127.0]]))[0, :-4].int(),
        torch.tensor([0, 2, 2, 0, -127], dtype=torch.int32),
    )


@pytest.mark.parametrize("name", [*NATIVE, ops.REFERENCE])
@pytest.mark.parametrize("queries", [1, 3])
def test_a_head_of_8_bits_that_is_no_number_is_noticed_and_spoils_no_other(name, queries):
    ops.choose(name)
    batch = batch_of([(queries, 40), (queries, 40)], heads=3, dtype=torch.int8)
    broken = torch.zeros(1, 3, 32)
    broken[0, 1, 4] = torch.inf
    slot = batch.block_tables[0, 0].long()[None] * 4
    ops.write_kv(torch.zeros(1, 3, 32), broken, batch.k_cache, batch.v_cache, slot)
    out = batch.run()
    assert out[:queries, 1].isnan().all()
    assert out[:queries, [0, 2]].isfinite().all()
    assert out[queries:].isfinite().all()


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("dtype", FLOATS)
def test_numbers_are_written_as_torch_rounds_them(name, dtype):
    ops.choose(name)
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1 << 16,), generator=generator).to(torch.int32)
    every = torch.arange(-32768, 32768).to(torch.int16).view(torch.float16).float()
    between = (every[1:] + every[:-1]) / 2  # where rounding is a tie, to even
    edges = torch.tensor([65504.0, 65519.996, 65520.0, 1e-8, 2.0**-25, 2.0**-24, 3e38, float("inf"), 0.0, -0.0])
    k = torch.cat((bits.view(torch.float32), every, between, edges, -edges))
    k = k[~k.isnan()]
    k = torch.cat((k, torch.full((-len(k) % 21,), float("nan")))).reshape(-1, 3, 7)
    caches = torch.zeros(2, len(k), 1, 3, 7, dtype=dtype)
    ops.write_kv(k, -k, *caches, torch.arange(len(k)))
    for cache, x in zip(caches, (k, -k), strict=True):
        written, expected = cache[:, 0], x.to(dtype)
        assert torch.equal(written.isnan(), expected.isnan())
        as_int = torch.int32 if dtype == torch.float32 else torch.int16
        assert torch.equal(written.nan_to_num().view(as_int), expected.nan_to_num().view(as_int))


@pytest.mark.parametrize("name", [*NATIVE, ops.REFERENCE])
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_token_is_written_into_its_slot(name, dtype):
    ops.choose(name)
    k, v = torch.randn(2, 6, 3, 20, generator=torch.Generator().manual_seed(0))
    width = stored(k, dtype).shape[-1]
    whole = torch.full((5, 2, 4, 3, width), 7, dtype=dtype)  # keys and values of a block side by side
    expected = whole.clone()
    slots = torch.tensor([13, 0, -1, 6, 19, -1])
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[slot // 4, 0, slot % 4] = stored(k[token], dtype)
            expected[slot // 4, 1, slot % 4] = stored(v[token], dtype)
    ops.write_kv(k, v, *whole.unbind(1), slots)
    assert torch.equal(whole, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("name", [*NATIVE, ops.REFERENCE])
def test_many_tokens_are_written_by_all_threads(name, dtype):
    ops.choose(name)
    ops.set_num_threads(3)
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 300, 4, 64, generator=generator)
    expected = stored(torch.stack((k, v)), dtype)
    caches = torch.zeros(2, 20, 16, 4, expected.shape[-1], dtype=dtype)
    slots = torch.randperm(320, generator=generator)[:300]
    ops.write_kv(k, v, *caches, slots)
    assert torch.equal(caches.flatten(1, 2)[:, slots], expected)


@pytest.mark.parametrize("name", [*NATIVE, ops.REFERENCE])
def test_nothing_to_do_is_done(name):
    ops.choose(name)
    assert batch_of([]).run().shape == (0, 2, 32)
    assert batch_of([(0, 0), (0, 5)]).run().shape == (0, 2, 32)
    cache = torch.zeros(2, 4, 2, 32)
    ops.write_kv(torch.ones(0, 2, 32), torch.ones(0, 2, 32), cache, cache.clone(), torch.zeros(0, dtype=torch.int64))
    assert not cache.any()


def with_entry(tensor, place, value):
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


WRONG_BATCHES = {
    "q of another dtype": (lambda b: replace(b, q=b.q.half()), "q is float16"),
    "q of two dims": (lambda b: replace(b, q=b.q[0]), "q is float32"),
    "q without heads": (lambda b: replace(b, q=b.q[:, :0]), "at least one head"),
    "k_cache of another dtype": (lambda b: replace(b, k_cache=b.k_cache.double()), "k_cache is float64"),
    "k_cache of integers": (lambda b: replace(b, k_cache=b.k_cache.to(torch.int16)), "k_cache is int16"),
    "k_cache of bytes": (lambda b: replace(b, k_cache=b.k_cache.to(torch.uint8)), "k_cache is uint8"),
    "k_cache of int8 without scales": (
        lambda b: replace(b, k_cache=torch.zeros((*b.k_cache.shape[:3], 32), dtype=torch.int8)),
        r"k_cache is int8 .* head dim \+ 4 as in q",
    ),
    "v_cache alone of int8": (
        lambda b: replace(
            b,
            k_cache=torch.zeros((*b.k_cache.shape[:3], 32)),
            v_cache=torch.zeros((*b.k_cache.shape[:3], 36), dtype=torch.int8),
        ),
        "v_cache is int8 .* k_cache's float32",
    ),
    "k_cache of three dims": (lambda b: replace(b, k_cache=b.k_cache[0]), "k_cache is"),
    "k_cache of other heads": (lambda b: replace(b, k_cache=b.k_cache[:, :, :1]), "k_cache is .* as in q"),
    "v_cache of another head dim": (lambda b: replace(b, v_cache=b.v_cache[..., :8]), "v_cache is .* as in q"),
    "v_cache of another dtype": (lambda b: replace(b, v_cache=b.v_cache.half()), "v_cache is float16"),
    "v_cache of fewer blocks": (lambda b: replace(b, v_cache=b.v_cache[:-1]), "v_cache is .* k_cache's"),
    "k_cache without slots": (lambda b: replace(b, k_cache=b.k_cache[:, :0]), "k_cache is"),
    "k_cache of scattered heads": (
        lambda b: replace(b, k_cache=b.k_cache.transpose(1, 2).contiguous().transpose(1, 2)),
        "k_cache has strides",
    ),
    "k_cache of scattered dims": (lambda b: replace(b, k_cache=b.k_cache.repeat(1, 1, 1, 2)[..., ::2]), "has strides"),
    "v_cache of one block shown often": (lambda b: replace(b, v_cache=b.v_cache[:1].expand_as(b.v_cache)), "strides"),
    "block_tables of int64": (lambda b: replace(b, block_tables=b.block_tables.long()), "block_tables is int64"),
    "block_tables of one dim": (lambda b: replace(b, block_tables=b.block_tables[0]), "block_tables is int32"),
    "a block past the end": (
        lambda b: replace(b, block_tables=with_entry(b.block_tables, (1, 0), b.k_cache.shape[0])),
        "block_tables of .*1.* not there",
    ),
    "a block before the first": (
        lambda b: replace(b, block_tables=with_entry(b.block_tables, (1, 2), -1)),
        "block_tables of .*1.* not there",
    ),
    "context_lens of int64": (lambda b: replace(b, context_lens=b.context_lens.long()), "context_lens is int64"),
    "context_lens of another size": (lambda b: replace(b, context_lens=b.context_lens[1:]), "context_lens is .* [2]"),
    "a context shorter than its queries": (
        lambda b: replace(b, context_lens=with_entry(b.context_lens, 1, 2)),
        "context_lens of .*1.* is .*2.*3",
    ),
    "a negative context": (lambda b: replace(b, context_lens=with_entry(b.context_lens, 0, -1)), "context_lens of"),
    "a context longer than its table": (
        lambda b: replace(b, context_lens=with_entry(b.context_lens, 1, 17)),
        "context_lens of .*17.* at most the 16",
    ),
    "query_starts of int64": (lambda b: replace(b, query_starts=b.query_starts.long()), "query_starts is int64"),
    "query_starts of another size": (lambda b: replace(b, query_starts=b.query_starts[:-1]), "query_starts is .* [3]"),
    "query_starts not from 0": (lambda b: replace(b, query_starts=with_entry(b.query_starts, 0, 1)), "rise from 0"),
    "query_starts that fall": (lambda b: replace(b, query_starts=with_entry(b.query_starts, 1, 5)), "rise from 0"),
    "query_starts past the rows": (lambda b: replace(b, query_starts=with_entry(b.query_starts, 2, 5)), "the 4 rows"),
    "an infinite scale": (lambda b: replace(b, scale=float("inf")), "scale is inf"),
    "a scale that is no number": (lambda b: replace(b, scale=float("nan")), "scale is nan"),
    "an empty window": (lambda b: replace(b, window=0), "window is 0"),
    "a negative window": (lambda b: replace(b, window=-5), "window is -5"),
}


@pytest.mark.parametrize("name", [*NATIVE, ops.REFERENCE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("what", WRONG_BATCHES)
def test_a_wrong_batch_is_named(what, dtype, name):
    ops.choose(name)
    change, message = WRONG_BATCHES[what]
    wrong = change(batch_of([(1, 3), (3, 11)], dtype=dtype))
    with pytest.raises(KernelError, match=message.replace("[", r"\[").replace("]", r"\]")):
        wrong.run()


WRONG_WRITES = {
    "k of another dtype": ({"k": torch.zeros(2, 2, 8).half()}, "k is float16"),
    "k of two dims": ({"k": torch.zeros(2, 8)}, "k is float32"),
    "v of another dtype": ({"v": torch.zeros(2, 2, 8).bfloat16()}, "v is bfloat16"),
    "v of another shape": ({"v": torch.zeros(3, 2, 8)}, "v is .* k's"),
    "caches of another head dim": ({"k_cache": torch.zeros(3, 4, 2, 9)}, "k_cache is .* as in k"),
    "a cache of int8 without scales": (
        {"k_cache": torch.zeros(3, 4, 2, 8, dtype=torch.int8)},
        r"k_cache is int8 .* head dim \+ 4 as in k",
    ),
    "caches of different dtypes": ({"v_cache": torch.zeros(3, 4, 2, 8).half()}, "v_cache is float16"),
    "slots of int32": ({"slots": torch.tensor([0, 1], dtype=torch.int32)}, "slots is int32"),
    "slots of another size": ({"slots": torch.tensor([0, 1, 2])}, "slots is int64 .* one for each token"),
    "a slot past the end": ({"slots": torch.tensor([0, 12])}, "slots holds .*12.* -1 or 0 to 11"),
    "a slot before the first": ({"slots": torch.tensor([-2, 0])}, "slots holds .*-2"),
    "a slot for two": ({"slots": torch.tensor([5, 5])}, "slots holds .*5.* more than once"),
}


@pytest.mark.parametrize("name", [*NATIVE, ops.REFERENCE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("what", WRONG_WRITES)
def test_a_wrong_write_is_named_and_writes_nothing(what, dtype, name):
    ops.choose(name)
    change, message = WRONG_WRITES[what]
    arguments = {
        "k": torch.ones(2, 2, 8),
        "v": torch.ones(2, 2, 8),
        "k_cache": torch.zeros_like(stored(torch.zeros(3, 4, 2, 8), dtype)),
        "v_cache": torch.zeros_like(stored(torch.zeros(3, 4, 2, 8), dtype)),
        "slots": torch.tensor([0, 7]),
    } | change
    with pytest.raises(KernelError, match=message):
        ops.write_kv(**arguments)
    assert not arguments["k_cache"].any()
    assert not arguments["v_cache"].any()
