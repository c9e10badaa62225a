from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bluejay import ops
from bluejay.decoding import SamplingParams
from bluejay.engine.kernel_cache import KernelAttention, KernelCache
from bluejay.engine.network import Network
from bluejay.engine.plain import PlainEngine
from bluejay.engine.request import GenerationRequest
from bluejay.engine.scorer import Scorer
from bluejay.errors import KernelError
from bluejay.model import CausalAttention
from bluejay.model.quantized import quantize

H, K = 2, 4
ROUNDING = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
PROMPTS = [[5, 6, 7], [200, 3], [9] * 20, [41]]


def texts(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, n, H, K, generator=generator) for n in lengths]


def expected(qkv, window):
    """What the last token of a whole text sees, without any cache."""
    q, k, v = qkv[:, None]
    return CausalAttention()(0, q, k, v, scale=0.5, window=window)[0, -1]


def prefill(cache, rows, lengths, window):
    """Read the first tokens of each row, padded on the right with rubbish."""
    padded = torch.full((3, len(rows), max(lengths), H, K), 99.0)
    for i, (row, n) in enumerate(zip(rows, lengths, strict=True)):
        padded[:, i, :n] = row[:, :n]
    cache.begin([0] * len(rows), max(lengths))
    out = cache(0, *padded, scale=0.5, window=window)
    return [out[i, n - 1] for i, n in enumerate(lengths)]


def decode(cache, rows, lengths, window):
    """Read one more token of each row."""
    cache.begin(lengths, 1)
    q, k, v = (torch.stack([row[part, n : n + 1] for row, n in zip(rows, lengths, strict=True)]) for part in range(3))
    return cache(0, q, k, v, scale=0.5, window=window)[:, 0]


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    window=st.sampled_from([None, 1, 3, 50]),
    capacity=st.integers(1, 4),
    dtype=st.sampled_from(list(ROUNDING)),
)
@settings(max_examples=60, deadline=None)
def test_each_row_sees_its_own_past_within_the_window(lengths, window, capacity, dtype):
    rows = texts([n + 9 for n in lengths])
    cache = KernelCache(32, capacity, dtype=dtype)
    out = prefill(cache, rows, lengths, window)
    for step in range(9):
        for row, n, seen in zip(rows, lengths, out, strict=True):
            assert torch.allclose(seen, expected(row[:, : n + step], window), atol=ROUNDING[dtype])
        out = decode(cache, rows, [n + step for n in lengths], window)
    assert cache._keys[0].dtype == cache._values[0].dtype == dtype


@pytest.mark.parametrize("lengths", [[5, 5, 5], [2, 7, 4]])
def test_rows_fork_move_and_leave(lengths):
    rows = texts([n + 4 for n in lengths], seed=1)
    cache = KernelCache(32, 8, dtype=torch.float32)
    prefill(cache, rows, lengths, None)
    order = [2, 0, 0]
    cache.select(order)
    out = decode(cache, [rows[i] for i in order], [lengths[i] for i in order], None)
    for i, seen in zip(order, out, strict=True):
        assert torch.allclose(seen, expected(rows[i][:, : lengths[i] + 1], None), atol=1e-5)


@pytest.mark.parametrize("window", [None, 4])
def test_attention_without_a_cache_is_causal_attention(window):
    q, k, v = torch.randn(3, 2, 30, H, K)
    seen = KernelAttention()(0, q, k, v, scale=0.5, window=window)
    assert torch.allclose(seen, CausalAttention()(0, q, k, v, scale=0.5, window=window), atol=1e-5)


def greedy(engine):
    outputs = engine.generate([GenerationRequest(prompt, SamplingParams(max_new_tokens=12)) for prompt in PROMPTS])
    return [output.sequences[0].token_ids for output in outputs]


def test_an_engine_with_a_cache_dtype_says_the_same(tiny_model):
    plain = PlainEngine(tiny_model)
    kernels = PlainEngine(tiny_model, cache_dtype=torch.float32)
    assert greedy(kernels) == greedy(plain)
    beams = [GenerationRequest(PROMPTS[0], SamplingParams(num_beams=3, max_new_tokens=8))]
    assert kernels.generate(beams)[0].sequences[0].token_ids == plain.generate(beams)[0].sequences[0].token_ids


def test_a_quantised_model_is_attended_to_by_the_kernels_alone(tiny_model, monkeypatch):
    """It keeps keys and values in float16, and what it says is what PyTorch's attention would make it say."""
    quantize(tiny_model, 8)
    written = set()
    write_kv = ops.write_kv
    monkeypatch.setattr(ops, "write_kv", lambda *a: written.add(a[2].dtype) or write_kv(*a))
    with_torch = tiny_model(torch.arange(20)[None], torch.arange(20)[None], CausalAttention()).mean(1)[0]
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
    engine = PlainEngine(tiny_model)
    scorer = Scorer(Network(tiny_model))
    assert scorer.embed([list(range(20))])[0].allclose(with_torch, atol=1e-4)
    assert [len(ids) for ids in greedy(engine)] == [12] * 4
    assert written == {torch.float16}
    exact = PlainEngine(tiny_model, cache_dtype=torch.float32)
    scores = scorer.score([(prompt, said) for prompt, said in zip(PROMPTS, greedy(exact), strict=True)])
    assert all(score.is_greedy for score in scores)


def test_a_dtype_that_no_cache_has_is_named(tiny_model):
    with pytest.raises(KernelError, match="k_cache is float64"):
        greedy(PlainEngine(tiny_model, cache_dtype=torch.float64))
