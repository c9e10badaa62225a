from __future__ import annotations

import pytest
import torch

from bluejay.engine.kv_cache import KVCache, bytes_per_token
from bluejay.engine.options import CACHE_DTYPES, EngineOptions
from bluejay.model import PRESETS

# tiny_gptj: 2 heads of 16 dims in 2 layers, keys and values; int8 has 4 bytes for a head's scale.
TOKEN_BYTES = {"float32": 2 * 2 * 2 * 64, "float16": 2 * 2 * 2 * 32, "bfloat16": 2 * 2 * 2 * 32, "int8": 2 * 2 * 2 * 20}
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", TOKEN_BYTES)
def test_a_cache_takes_what_it_says(tiny_gptj, name):
    dtype = EngineOptions(cache_dtype=name).torch_cache_dtype(torch.float32)
    cache = KVCache(tiny_gptj.config, 5, 8, dtype, CPU)
    width = 20 if name == "int8" else 16
    assert [t.shape for t in (*cache.keys, *cache.values)] == [(5, 8, 2, width)] * 4
    assert {t.dtype for t in (*cache.keys, *cache.values)} == {dtype}
    assert bytes_per_token(tiny_gptj.config, dtype) == TOKEN_BYTES[name]
    assert sum(t.nbytes for t in (*cache.keys, *cache.values)) == 5 * 8 * TOKEN_BYTES[name]


def test_every_dtype_has_its_size_here():
    assert set(CACHE_DTYPES) == set(TOKEN_BYTES)


@pytest.mark.parametrize(("name", "num_bytes"), [("float32", 917_504), ("float16", 458_752), ("int8", 232_960)])
def test_a_token_of_gpt_j_6b(name, num_bytes):
    assert bytes_per_token(PRESETS["gpt-j-6b"], getattr(torch, name)) == num_bytes


@pytest.mark.parametrize("name", TOKEN_BYTES)
def test_a_budget_is_cut_into_whole_blocks(tiny_gptj, name):
    options = EngineOptions(cache_dtype=name, block_size=8, cache_memory_bytes=3 * 8 * TOKEN_BYTES[name] - 1)
    assert options.num_blocks(tiny_gptj.config, getattr(torch, name), CPU) == 2


@pytest.mark.parametrize("name", TOKEN_BYTES)
@pytest.mark.parametrize(
    "pairs",
    [
        [],
        [(0, 3)],
        [(0, 1), (1, 2), (2, 3)],  # a chain: each gets what its source held before
        [(0, 1), (1, 0)],  # a swap
        [(4, 0), (4, 2), (0, 4)],  # one block for two, and itself another's
    ],
)
def test_blocks_are_copied_all_at_once(tiny_gptj, name, pairs):
    cache = KVCache(tiny_gptj.config, 5, 8, getattr(torch, name), CPU)
    tensors = [*cache.keys, *cache.values]
    for place, tensor in enumerate(tensors):
        tensor.copy_(torch.arange(5).view(5, 1, 1, 1) + 10 * place)
    before = [tensor.clone() for tensor in tensors]
    cache.copy(pairs)
    source = {target: source for source, target in pairs}
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(tensor, old[[source.get(block, block) for block in range(5)]])
